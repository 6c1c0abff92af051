# SPDX-License-Identifier: Apache-2.0
"""Attempted moves per second: the native loop beside the same loop in plain C, in turns, in one lab.

    python bench/moves.py [KERNEL]

Three threads over three VMs, as in the locking test of the kernel's sev_migrate_tests (see `reference_moves.c`). The
native loop is measured without records and with all of them. Wanted: a ratio of at least 0.9 to plain C without, and
at most 5 % less with.

One go varies by half of itself, because three threads share two CPUs, and those a machine. So goes are short and many,
each contender is first in a third of the turns, and a ratio is the median over the turns, with the interval in which
95 of 100 medians of turns drawn anew from these lie.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import timing

if TYPE_CHECKING:
    from chaos.native import NativeLoop

HERE = Path(__file__).parent
THREADS, VCPUS = 3, 4
ROUNDS = 2_000  # of three moves each; some 50 ms
TURNS = 300
DRAWN = 2_000
CONTENDERS = ("plain C", "native, counted", "native, recorded")


def outside(kernel: str) -> int:
    """Compile the reference and run ourselves in the lab."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference_moves"
        source = HERE / "reference_moves.c"
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", reference, source], check=True)
        copies = (reference, HERE / "moves.py", HERE / "timing.py")
        options = [word for path in copies for word in ("--copy", str(path))]
        lab = [sys.executable, "-m", "chaos.cli", "lab", "run", "--quiet", "--kernel", kernel, *options]
        return subprocess.run([*lab, "--", "python3", "moves.py", "inside"], check=False).returncode


def plain_c(stack: ExitStack) -> Callable[[], float]:
    """A go of the reference."""
    argv = ["./reference_moves", str(ROUNDS)]
    process = stack.enter_context(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def go() -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline().split()[0])

    return go


def native(stack: ExitStack, *rings: int) -> Iterator[Callable[[], float]]:
    """A go of the native loop for each of these numbers of records."""
    from chaos.kvm.numbers import Cap, Ioctl
    from chaos.kvm.sev import Platform, Sev
    from chaos.kvm.structs import EnableCap
    from chaos.kvm.system import System
    from chaos.native import LoopProgram, LoopStep, NativeLoop

    system, platform = System.open(), Platform.open()
    moves: dict[int, bytes] = {}
    for _ in range(THREADS):
        vm = system.create_vm()
        stack.callback(vm.close)
        sev = Sev(vm.fd.number, platform.fd.number)
        sev.init()
        for number in range(VCPUS):
            stack.callback(vm.create_vcpu(number).close)
        sev.launch_start(0)
        move = EnableCap(cap=Cap.MOVE_ENC_CONTEXT_FROM)
        move.args[0] = vm.fd.number
        moves[vm.fd.number] = bytes(move)
    steps = (tuple(LoopStep(vm, Ioctl.KVM_ENABLE_CAP, move) for move in moves.values()) for vm in moves)
    programs = tuple(LoopProgram(each, rounds=ROUNDS) for each in steps)
    return (partial(rate, NativeLoop(programs, ring=ring)) for ring in rings)


def rate(loop: NativeLoop) -> float:
    return loop.start().join(60).rate


def inside() -> int:
    with ExitStack() as stack:
        everything = 1 << (ROUNDS * THREADS).bit_length()
        goes = dict(zip(CONTENDERS, (plain_c(stack), *native(stack, 0, everything)), strict=True))
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for turn in range(-3, TURNS):
            first = turn % len(CONTENDERS)
            for name in CONTENDERS[first:] + CONTENDERS[:first]:
                value = goes[name]()
                if turn >= 0:
                    rates[name].append(value)
    for name, values in rates.items():
        print(timing.told(name, values, "thousand attempts/s", 1e-3))
    plain, counted, recorded = (rates[name] for name in CONTENDERS)
    print("counted to plain C    ", ratio(counted, plain))
    print("recorded to counted   ", ratio(recorded, counted))
    print("recorded to plain C   ", ratio(recorded, plain))
    return 0


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    dice = random.Random(1)
    drawn = sorted(statistics.median(dice.choices(each, k=len(each))) for _ in range(DRAWN))
    low, high = drawn[DRAWN // 40], drawn[-DRAWN // 40]
    return f"{statistics.median(each):.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[1:] == ["inside"] else outside(sys.argv[1] if sys.argv[1:] else "debian:6.12"))
