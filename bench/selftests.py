# SPDX-License-Identifier: Apache-2.0
"""The kernel's own sev_migrate_tests and sev_init2_tests beside our conformance set, case by case, in the same lab.

    python bench/selftests.py PATH-OF-A-KERNEL-SOURCE-TREE [--kernel K]

Builds the two from the tree (it needs its headers: `make headers`), runs them and our experiments on each kernel, and
prints a table. Theirs ends at the first assertion that fails, so its exit code says of every case that it held, or
nothing; ours is read from the histories. Ends with 1 if a case of ours was answered otherwise than theirs asserts.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chaos.history import file
from chaos.history.records import History
from chaos.lab.kernel.find import default_kernels

MIGRATE, INIT2 = "sev_migrate_tests", "sev_init2_tests"
BUILD_WITHIN, RUN_WITHIN = 900, 3600


@dataclass(frozen=True, slots=True)
class Case:
    """What the selftest asserts of one case, and where ours makes the same calls: operations `f` on `vm` from
    `source`, in this experiment, each of which must be answered `expected`."""

    name: str
    test: str
    expected: str
    experiment: str
    f: str
    vm: tuple[str, ...] = ()
    source: str = ""
    args: tuple[tuple[str, object], ...] = ()


CASES = (
    Case("A1 moved through three VMs", MIGRATE, "ok", "chain-and-back", "move", ("dst0", "dst1", "dst2")),
    Case("A2 and back", MIGRATE, "EIO", "chain-and-back", "move", ("src",)),
    Case("A3 the same, SEV-ES", MIGRATE, "ok", "chain-and-back-es", "move", ("dst0", "dst1", "dst2")),
    Case("A4 and back, SEV-ES", MIGRATE, "EIO", "chain-and-back-es", "move", ("src",)),
    Case("B three threads, three VMs", MIGRATE, "ok", "moves-in-a-ring", "moves"),
    Case("C1 from a VM without SEV", MIGRATE, "EINVAL", "move-parameters", "move", ("no-vcpu",), "no-sev"),
    Case("C2 SEV-ES into SEV", MIGRATE, "EINVAL", "move-parameters", "move", ("sev",), "sev-es"),
    Case("C3 SEV into SEV-ES", MIGRATE, "EINVAL", "move-parameters", "move", ("sev-es",), "sev"),
    Case("C4 SEV-ES into no vCPUs", MIGRATE, "EINVAL", "move-parameters", "move", ("no-vcpu",), "sev-es"),
    Case("C5 SEV-ES without VMSA", MIGRATE, "EINVAL", "move-parameters", "move", ("no-vcpu",), "no-vmsa"),
    Case("D1 owner and mirror moved", MIGRATE, "ok", "owners-and-mirrors-moved", "move"),
    Case("D2 owners freed first", MIGRATE, "ok", "owners-and-mirrors-moved", "close"),
    Case("D3 mirrors freed first", MIGRATE, "ok", "mirrors-closed-first", "close"),
    Case("E1 a mirror", MIGRATE, "ok", "mirror-commands", "mirror"),
    Case("E2 its commands", MIGRATE, "EINVAL", "mirror-commands", "command"),
    Case("E3 its status", MIGRATE, "ok", "mirror-commands", "guest_status", ("dst",)),
    Case("E4 a mirror, SEV-ES", MIGRATE, "ok", "mirror-commands-es", "mirror"),
    Case("E5 its commands, SEV-ES", MIGRATE, "EINVAL", "mirror-commands-es", "command"),
    Case("E6 its status, SEV-ES", MIGRATE, "ok", "mirror-commands-es", "guest_status", ("dst",)),
    Case("F1 a mirror of itself", MIGRATE, "EINVAL", "mirror-parameters", "mirror", ("sev",), "sev"),
    Case("F2 of a VM without SEV", MIGRATE, "EINVAL", "mirror-parameters", "mirror", ("no-vcpu",), "with-vcpu"),
    Case("F3 with vCPUs", MIGRATE, "EINVAL", "mirror-parameters", "mirror", ("with-vcpu",), "sev"),
    Case("F4 SEV-ES onto SEV", MIGRATE, "EINVAL", "mirror-parameters", "mirror", ("sev",), "sev-es"),
    Case("F5 SEV onto SEV-ES", MIGRATE, "EINVAL", "mirror-parameters", "mirror", ("sev-es",), "sev"),
    Case("INIT2 of types 2 and 3", INIT2, "ok", "init2-flags", "init", ("sev", "sev-es"), args=(("flags", None),)),
    Case("INIT2 of type 0", INIT2, "EINVAL", "init2-types", "init", ("plain",), args=(("command", "init2"),)),
    Case("32 flags", INIT2, "EINVAL", "init2-flags", "init", args=(("flags", any),)),
    Case("64 features", INIT2, "EINVAL", "init2-features", "init", args=(("features", any),)),
)


class Row(NamedTuple):
    """Of one case on one kernel."""

    theirs: str
    ours: str
    same: str
    besides: str


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tree", type=Path)
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="selftests-") as directory:
        binaries = [build(options.tree.resolve(), test, Path(directory)) for test in (MIGRATE, INIT2)]
        rows: dict[str, list[Row]] = {}
        for kernel in options.kernel or default_kernels():
            theirs = {path.name: run_theirs(path, kernel) for path in binaries}
            ours = run_ours(kernel, Path(directory) / kernel.replace(":", "-"))
            release = next(iter(ours.values()))[0]["kernel"]
            rows[release] = [row(case, theirs, ours) for case in CASES]
    show(rows)
    return any(each.same == "NO" for found in rows.values() for each in found)


def build(tree: Path, test: str, where: Path) -> Path:
    selftests = tree / "tools" / "testing" / "selftests" / "kvm"
    architecture = "x86_64" if (selftests / "x86_64").is_dir() else "x86"
    target = where / architecture / test
    headers = f"KHDR_INCLUDES=-isystem {tree / 'usr' / 'include'}"
    command = ["make", "-s", "-C", str(selftests), "ARCH=x86_64", f"OUTPUT={where}", headers, str(target)]
    subprocess.run(command, check=True, timeout=BUILD_WITHIN)
    return target


def sevchaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from chaos.cli import main; raise SystemExit(main())", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_WITHIN, check=False, env=os.environ)


def run_theirs(binary: Path, kernel: str) -> str:
    done = sevchaos("lab", "run", "--quiet", "--kernel", kernel, "--copy", str(binary), "--", f"./{binary.name}")
    return {0: "passes", 4: "skipped"}.get(done.returncode, f"exit {done.returncode}")  # 4: KSFT_SKIP


def run_ours(kernel: str, runs: Path) -> dict[str, tuple[dict[str, Any], History]]:
    names = sorted({case.experiment for case in CASES})
    done = sevchaos("run", *names, "--kernel", kernel, "--json", "--accept-known", "--runs", str(runs))
    return {
        run["experiment"]: (run, file.read(Path(run["directory"]) / "history.jsonl"))
        for run in json.loads(done.stdout)["runs"]
    }


def row(case: Case, theirs: dict[str, str], ours: dict[str, tuple[dict[str, Any], History]]) -> Row:
    run, told = ours[case.experiment]
    seen = answers(case, told)
    same = "not made" if not seen else "yes" if seen == {case.expected} else "NO"
    return Row(theirs[case.test], " ".join(sorted(seen)) or "-", same, besides(run))


def show(rows: dict[str, list[Row]]) -> None:
    """What is the same on all kernels once, and otherwise with the kernel before it."""
    print(f"on {' and '.join(rows)}\n")
    print(
        "| case | asserted | theirs | ours | the same | experiment | what else ours says |", "|" + "---|" * 7, sep="\n"
    )
    for index, case in enumerate(CASES):
        on = {kernel: found[index] for kernel, found in rows.items()}
        cells = [_merged({kernel: cell[place] for kernel, cell in on.items()}) for place in range(4)]
        print("|", " | ".join((case.name, case.expected, *cells[:3], f"`{case.experiment}`", cells[3])), "|")


def _merged(on: dict[str, str]) -> str:
    values = set(on.values())
    return values.pop() if len(values) == 1 else "; ".join(f"{kernel}: {value}" for kernel, value in on.items())


def answers(case: Case, told: History) -> set[str]:
    """How the case's operations were answered: errnos by name, or "ok"."""
    seen = set()
    for invoke, done in told.operations():
        if invoke.f != case.f or done is None or (case.vm and invoke.args.get("vm") not in case.vm):
            continue
        if case.source and invoke.args.get("source") != case.source:
            continue
        if all(
            bool(invoke.args.get(key)) if value is any else invoke.args.get(key) == value for key, value in case.args
        ):
            seen.add(errno.errorcode.get(done.errno, str(done.errno)) if done.outcome == "fail" else done.outcome)
    return seen


def besides(run: dict[str, Any]) -> str:
    """The promises that did not hold, each with its finding."""
    told = [
        f"{verdict['promise']} {verdict['accepted'].partition(':')[0] or verdict['outcome']}"
        for verdict in run["verdicts"]
        if verdict["outcome"] != "kept" and (verdict["listed"] or verdict["outcome"] == "broken")
    ]
    return ", ".join(told) or f"all {run['counts']['kept']} promises kept"


if __name__ == "__main__":
    sys.exit(main())
