# SPDX-License-Identifier: Apache-2.0
"""The whole catalogue on a host that has somebody else's SEV guest, which must not notice.

    python bench/shared_host.py [--kernel K]… [NAME…]

In a lab of each kernel a process that is none of ours owns a SEV guest (tests/lab/programs/foreign_guest.py), and
`sevchaos run --host local --shared-host` is run beside it. Said is what the owner saw before and after, which
experiments were skipped and why, and what the others came to; not, why what a finding or the experiment explains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chaos.errors import ExitCode
from chaos.lab.kernel.find import default_kernels

PROGRAM = Path(__file__).parent.parent / "tests/lab/programs/foreign_guest.py"
TIMEOUT = "10800"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: the whole catalogue")
    options = parser.parse_args()
    kernels = options.kernel or default_kernels()
    noticed = [not show(kernel, options.names or ["--all"]) for kernel in kernels]
    raise SystemExit(ExitCode.BROKEN if any(noticed) else ExitCode.KEPT)


def show(kernel: str, names: list[str]) -> bool:
    """Print what was seen; whether the guest is as it was."""
    began = time.monotonic()
    lab = ["lab", "run", "--quiet", "--kernel", kernel, "--timeout", TIMEOUT, "--copy", str(PROGRAM)]
    run = ["sevchaos", "run", "--host", "local", "--shared-host", "--accept-known", "--json", "--quiet"]
    command = [*lab, "--", "python3", PROGRAM.name, *run, "--runs", "/tmp/runs", *names]
    done = subprocess.run([sys.executable, "-m", "chaos.cli", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the lab ended with {done.returncode}:\n{done.stderr[-2000:]}")
    guest = json.loads(done.stdout)
    runs = json.loads(done.stderr[done.stderr.index("{\n") :])["runs"]
    print(f"{kernel}, {time.monotonic() - began:.0f} s: {len(runs)} runs, exit code {guest['code']}")
    print(f"  the guest before: {told(guest['before'])}\n  the guest after:  {told(guest['after'])}")
    print(f"  outcomes: {dict(Counter(run['outcome'] for run in runs))}")
    for outcome in ("skipped", "unknown", "broken"):
        for reason, those in reasons(
            [run for run in runs if run["exit_code"] or outcome == "skipped"], outcome
        ).items():
            print(f"  {outcome}: {', '.join(those)}\n      {reason}")
    return bool(guest["before"] == guest["after"] and guest["after"]["ticked"])


def told(guest: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value).split(chr(10))[0]}" for key, value in guest.items())


def reasons(runs: list[dict[str, Any]], outcome: str) -> dict[str, list[str]]:
    """Why runs came to this, and which did for that reason."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run["outcome"] == outcome:
            why = dict.fromkeys(v["reason"] for v in run["verdicts"] if v["outcome"] == outcome and v["listed"])
            found.setdefault("; ".join(why), []).append(run["experiment"])
    return found


if __name__ == "__main__":
    main()
