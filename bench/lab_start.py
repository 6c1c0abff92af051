# SPDX-License-Identifier: Apache-2.0
"""How soon the first command runs: the lab cold and restored, beside virtme-ng with the same kernel and command.

    make bench, or: python bench/lab_start.py [--rounds N] [--kernel K]

Both boot the same Debian kernel under TCG with two CPUs and 1 GiB, and run `echo first-command`; the clock stops when
those words come out. virtme-ng has no SEV to set up; that is in our favour nowhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from timing import ratio, take_turns, told, until_output

from chaos.lab.kernel.find import default_kernels, find_busybox, find_kernel

WORD = b"first-command"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    options = parser.parse_args()
    for source in options.kernel or default_kernels():
        compare(source, options.rounds)


def compare(source: str, rounds: int) -> None:
    image = find_kernel(source).image
    ours = [sys.executable, "-m", "chaos.cli", "lab", "run", "--quiet", "--kernel", source]
    echo = ["--", "echo", WORD.decode()]
    with tempfile.TemporaryDirectory() as tools:
        contenders: dict[str, Callable[[], float]] = {
            "sevchaos, cold": lambda: until_output([*ours, "--cold", *echo], WORD),
            "sevchaos, restored": lambda: until_output([*ours, *echo], WORD),
        }
        vng = shutil.which("vng", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if vng:
            # It wants a static busybox on the path; the lab's own will do.
            (Path(tools) / "busybox").symlink_to(find_busybox())
            path = f"{Path(vng).parent}:{tools}:{os.environ['PATH']}"
            theirs = [vng, "--run", str(image), "--disable-kvm", "--cpus", "2", "--memory", "1G", *echo]
            contenders["virtme-ng"] = lambda: until_output(theirs, WORD, {**os.environ, "PATH": path})
        times = take_turns(contenders, rounds)
    print(f"\n{source}: start to first command")
    for name, values in times.items():
        print("  " + told(name, values))
    if vng:
        print(f"  cold / virtme-ng: {ratio(times['sevchaos, cold'], times['virtme-ng'])}; goal: at most 0.50")
    else:
        print("  virtme-ng is not installed: pip install -r bench/requirements.txt")
    worst = max(times["sevchaos, restored"])
    print(f"  restored, slowest of all: {worst:.2f} s; goal: at most 1.50 s on two cores")


if __name__ == "__main__":
    main()
