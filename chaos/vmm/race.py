# SPDX-License-Identifier: Apache-2.0
"""Moves and mirrors by native threads, which begin at one moment with those of other VMMs.

Between the moment and the system call there is nothing of Python, in which a thread waits for its turn longer than a
move lasts. Of a loop every call is on record, in a memory file that whoever gave it can read, also after the VMM was
killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.kvm.call import KernelError, mark, outside
from chaos.kvm.numbers import Cap, Ioctl
from chaos.kvm.vm import KvmVm, enabling
from chaos.linux.fd import OwnedFd
from chaos.native import LoopOutcome, LoopProgram, LoopStep, NativeLoop, RunningLoop
from chaos.native.board import new_memory

# Whoever waits for the answer gives up long before, and says what of.
JOIN_WITHIN = 3600.0
# Whoever is to do something meanwhile gets its turn, also where there are fewer CPUs than loops.
NICE = 10


@dataclass(frozen=True, slots=True)
class At:
    """When: once `gate` opens, as number `place` beside `others`."""

    gate: int
    place: int
    others: int


def once(vm: KvmVm, cap: Cap, source: int, *, flags: int, at: At) -> None:
    """KVM_ENABLE_CAP of the move or the mirror, when the gate opens. Raises `KernelError`."""
    program = LoopProgram((_step(vm, cap, source, flags),), cpu=_cpu(at))
    outcome = _joined(NativeLoop((program,), ring=1).start(gate=at.gate))
    (call,) = outcome.calls()
    mark(call.began, call.ended)
    if call.errno:
        raise KernelError(call.errno, f"KVM_ENABLE_CAP {cap.name}")


def moves(vm: KvmVm, sources: Sequence[int], *, rounds: int, threads: int, memory: int, at: At) -> LoopOutcome:
    """Threads of moves into `vm`, each from all sources in turn; all that is answered is taken. `memory` comes from
    `memory_of`."""
    steps = tuple(_step(vm, Cap.MOVE_ENC_CONTEXT_FROM, source, 0) for source in sources)
    program = LoopProgram(steps, rounds=rounds, nice=NICE, cpu=_cpu(at) if threads == 1 else None)
    programs = (program,) * threads
    loop = NativeLoop(programs, ring=ring_of(rounds * len(steps)))
    outcome = _joined(loop.start(memory=memory, gate=at.gate))
    mark(min(thread.began for thread in outcome.threads), outcome.ended)
    return outcome


def memory_of(calls: int, threads: int) -> OwnedFd:
    """A memory file for `moves` that makes so many calls a thread. Raises OSError."""
    return new_memory((ring_of(calls),) * threads)


def ring_of(calls: int) -> int:
    """Of places enough for so many calls."""
    return 1 << (calls - 1).bit_length()


def _step(vm: KvmVm, cap: Cap, source: int, flags: int) -> LoopStep:
    return LoopStep(vm.fd.number, Ioctl.KVM_ENABLE_CAP, bytes(enabling(cap, source, flags)))


def _cpu(at: At) -> int | None:
    """One of its own, if there are enough: two that are to begin together must not share one."""
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[at.place] if at.others < len(cpus) else None


def _joined(running: RunningLoop) -> LoopOutcome:
    with outside(running.tids[0]):
        return running.join(JOIN_WITHIN)
