# SPDX-License-Identifier: Apache-2.0
"""Threads that the interpreter lock does not hold back.

What a move races with is over in microseconds, and a Python thread gets its turn after milliseconds. So loops of
ioctls and vCPUs run in a small library in C (`native.h`), and Python prepares, starts, stops and reads them.

    NativeLoop(programs) n threads, each with its own program of ioctls, beginning together or at offsets in ns
      .start() ──▶ RunningLoop ── .join() ──▶ LoopOutcome what each call answered, and when
    VcpuThread(…)        one vCPU in KVM_RUN, its guest's ticks counted without Python
      .start() ──▶ RunningVcpu ── .join() ──▶ Left        why it stopped

What a thread has done stands in a memory file (`board`). Give that file to another process beforehand, and it can read
the calls of a VMM that was killed in the middle of them: `read`. Where among them an answer begins: `edge`.

`library` compiles the sources when they are first needed and keeps the result in the cache; the lab's image brings it
along. Times are CLOCK_MONOTONIC in ns everywhere, as those of `chaos.kvm.call`, and may be compared with them.
"""

from chaos.native.board import NativeCall, Ran, UnderWay, Why
from chaos.native.edge import Edge, edge
from chaos.native.loops import LoopOutcome, LoopProgram, LoopStep, NativeLoop, RunningLoop, read
from chaos.native.vcpus import Left, RunningVcpu, Seen, VcpuThread, read_vcpu

__all__ = [
    "Edge", "Left", "LoopOutcome", "LoopProgram", "LoopStep", "NativeCall", "NativeLoop", "Ran", "RunningLoop",
    "RunningVcpu", "Seen", "UnderWay", "VcpuThread", "Why", "edge", "read", "read_vcpu",
]  # fmt: skip
