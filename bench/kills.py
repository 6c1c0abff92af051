# SPDX-License-Identifier: Apache-2.0
"""A thousand runs with the controller killed in a hundred of them: is anything left?

    python bench/kills.py [--kernel K]… [--runs 1000] [--kills 100] [--seed 4] [--minutes M]
    python bench/kills.py --outside 50 [--kernel K]…

In a lab of each kernel `sevchaos run --host local` carries out experiments of every family, and is killed at random
moments; now and then its runner is killed with it, and the warden too (tests/lab/programs/leaks). After each kill and
at the end what the machine holds is compared with what it held before. First, leaks of every kind are planted: the
audit must see them. With --outside it is `sevchaos run --host lab` that is killed, and this machine that is looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos.errors import ExitCode
from chaos.lab.kernel.find import default_kernels

# Of every family that a host without kfault and with its own firmware can do, those that take least.
EXPERIMENTS = (
    "kill-source-in-move", "kill-destination-in-move", "kill-both-in-move", "kill-cgroup-of-both-in-move",
    "first-thread-ends", "lose-source-descriptors", "stop-source-in-move", "oom-destination-in-move",
    "freeze-destination-in-move", "enter-in-move", "remove-cgroup-while-charged", "limit-es-move",
    "limit-of-shared-parent", "network-partition-before-state", "network-flaps-before-move", "signal-storm-in-move",
    "cpu-offline-before-move", "move-across-cgroups-es", "move-in-one-cgroup-es", "move-with-mirror-es",
)  # fmt: skip
PROGRAM = ("python3", "-m", "tests.lab.programs.leaks")
# The program, and where it fails what the kernel has to say of it.
AND_LOG = '"$@"; code=$?; [ $code = 0 ] || { echo "ended with $code"; free -m; dmesg | tail -n 60; } >&2; exit $code'
TESTS = Path(__file__).parent.parent / "tests"
MARK = "SEVCHAOS_BENCH_KILLS"
GONE_WITHIN = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=180.0, help="stop after so many, with what was done by then")
    parser.add_argument("--outside", type=int, metavar="N", help="kill N controllers of labs instead")
    options = parser.parse_args()
    kernels = options.kernel or default_kernels()
    measure = outside if options.outside else inside
    raise SystemExit(ExitCode.UNCLEAN if sum(measure(kernel, options) for kernel in kernels) else ExitCode.KEPT)


# -- in the lab -----------------------------------------------------------------------------------------------


def inside(kernel: str, options: argparse.Namespace) -> int:
    """Print what was seen; how many leaks there were, or planted ones that the audit did not see."""
    missed = 0
    for name, seen in in_lab(kernel, 900, "plant").items():
        blind = name.split()[0].strip(":") not in seen["during"]
        missed += blind or bool(seen["after"])
        if blind:
            print(f"  NOT SEEN by the audit: a {name} planted on purpose")
    numbers = ("--runs", "--kills", "--seed", "--minutes")
    wanted = [word for name in numbers for word in (name, str(getattr(options, name[2:])))]
    told = in_lab(kernel, 60 * options.minutes + 900, "kill", *wanted, *EXPERIMENTS)
    print(f"{kernel}, {told['seconds']} s, seed {options.seed}: {told['runs']} runs of {len(EXPERIMENTS)} experiments")
    for cast, number in told["killed"].items():
        print(f"  {number} of them ended by SIGKILL to {cast}")
    print(f"  {told['lost']} more kills came when no run was under way")
    print(f"  the others ended {told['outcomes']}; controllers that were left alone ended with {told['codes']}")
    for leak in told["leaks"]:
        print(f"  LEFT: {leak}")
    print(f"  {len(told['leaks'])} times something was left")
    return missed + len(told["leaks"])


def in_lab(kernel: str, timeout: float, *argv: str) -> dict[str, Any]:
    options = ["--kernel", kernel, "--timeout", str(timeout), "--asids", "4:4", "--copy", str(TESTS)]
    program = ["sh", "-c", AND_LOG, "sh", *PROGRAM, *argv]
    command = [sys.executable, "-m", "chaos.cli", "lab", "run", *options, "--", *program]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


# -- on this machine ------------------------------------------------------------------------------------------


def outside(kernel: str, options: argparse.Namespace) -> int:
    """Print what was left of labs whose controller was killed; how many times something was."""
    chance, left, ended = random.Random(options.seed), 0, 0
    for number in range(options.outside):
        with tempfile.TemporaryDirectory() as directory:
            before, mark = listed(), secrets.token_hex(8)
            command = ["run", chance.choice(EXPERIMENTS), "--kernel", kernel, "--runs", f"{directory}/runs", "--quiet"]
            controller = subprocess.Popen(
                [sys.executable, "-m", "chaos.cli", *command], stdout=subprocess.DEVNULL,
                env={**os.environ, MARK: mark, "TMPDIR": directory},
            )  # fmt: skip
            time.sleep(chance.random() * 6)
            ended += controller.poll() is not None
            controller.kill()
            controller.wait()
            found = [*gone(mark), *(str(path) for path in Path(directory).iterdir() if path.name != "runs")]
            found += sorted(listed() - before)
        if found:
            left += 1
            print(f"  LEFT after kill {number}: {found}")
    print(
        f"{kernel}: {options.outside} controllers of labs killed, {ended} of them when they had ended; {left} left some"
    )
    return left


def gone(mark: str) -> list[str]:
    """The processes with this mark in their environment that do not go."""
    deadline = time.monotonic() + GONE_WITHIN
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def marked(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                found.append(f"{path.name} {(path / 'cmdline').read_bytes()[:80]!r}")
    return found


def listed() -> set[str]:
    """What a lab might leave outside of its processes and its own directory: cgroups, and files in shared memory."""
    groups = {path for path, _, _ in os.walk("/sys/fs/cgroup")}
    return groups | {str(path) for path in Path("/dev/shm").iterdir()}


if __name__ == "__main__":
    main()
