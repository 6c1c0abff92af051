# SPDX-License-Identifier: Apache-2.0
"""Faults of a VMM process as a whole."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGSTOP, Signals, pidfd_send_signal
from typing import ClassVar, Literal

from chaos.fault import Evidence, Fault, Scene, Target, Victim
from chaos.schedule.holds import parse_state

# A process that sleeps in the kernel where only a fatal signal can reach it takes a moment to unwind.
GONE_WITHIN = 30.0
STOPPED_WITHIN = 5.0


@dataclass(kw_only=True, slots=True)
class Kill(Fault):
    """End the process with a signal. What it owned goes with it, and what it was doing is never answered."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "the process was reaped, ended by just this signal"

    signal: Literal["KILL", "TERM", "ABRT", "SEGV"] = "KILL"

    @property
    def number(self) -> Signals:
        return Signals[f"SIG{self.signal}"]

    def apply(self, scene: Scene, target: str) -> None:
        pidfd_send_signal(scene.vmm(target).pidfd, self.number)

    def undo(self, scene: Scene, target: str) -> str:
        return "the dead stay dead" if scene.vmm(target).status is not None else "it lives"

    def evidence(self, scene: Scene, target: str) -> Evidence:
        return ended(scene.vmm(target), self.number)


@dataclass(kw_only=True, slots=True)
class KillBoth(Fault):
    """End two VMMs with SIGKILL, one right after the other, so that neither side sees the other one's end first."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "both were reaped, ended by SIGKILL; how long it took to signal them is told"
    NAMES: ClassVar[Mapping[str, Target]] = {"other": "vmm"}

    other: str
    _took: int = field(init=False, default=0)

    def ends(self, scene: Scene, target: str) -> tuple[str, ...]:
        return (target, self.other)

    def apply(self, scene: Scene, target: str) -> None:
        first, second = scene.vmm(target).pidfd, scene.vmm(self.other).pidfd
        began = time.monotonic_ns()
        pidfd_send_signal(first, Signals.SIGKILL)
        pidfd_send_signal(second, Signals.SIGKILL)
        self._took = time.monotonic_ns() - began

    def evidence(self, scene: Scene, target: str) -> Evidence:
        each = [ended(scene.vmm(name), Signals.SIGKILL) for name in (target, self.other)]
        told = "; ".join(one.detail for one in each)
        return Evidence(all(one.struck for one in each), f"{told}; signalled within {self._took / 1000:.0f} µs")

    def undo(self, scene: Scene, target: str) -> str:
        return "the dead stay dead"


@dataclass(kw_only=True, slots=True)
class Stop(Fault):
    """Stop the process with SIGSTOP: every thread where it next leaves the kernel, a vCPU out of its guest. It goes on
    (SIGCONT) when this is undone."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "the process's first thread is in state T, and every other too unless it waits in the kernel"

    def ends(self, scene: Scene, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, scene: Scene, target: str) -> None:
        pidfd_send_signal(scene.vmm(target).pidfd, SIGSTOP)

    def evidence(self, scene: Scene, target: str) -> Evidence:
        victim = scene.vmm(target)
        if victim.status is not None:
            return Evidence(False, f"{target} has ended")
        stopped = scene.wait(lambda: _stopped(victim.pid), STOPPED_WITHIN, f"{target} to stop")
        return Evidence(stopped, f"threads of {target} by state: {_listed(states(victim.pid))}")

    def undo(self, scene: Scene, target: str) -> str:
        victim = scene.vmm(target)
        if victim.status is not None:
            return "it has ended"
        with contextlib.suppress(ProcessLookupError):  # it may be ending just now
            pidfd_send_signal(victim.pidfd, SIGCONT)
        gone_on = scene.wait(lambda: "T" not in states(victim.pid), STOPPED_WITHIN, f"{target} to go on")
        return "it goes on" if gone_on else "it does not go on"


def ended(victim: Victim, number: Signals) -> Evidence:
    """Whether it was this signal that ended the process."""
    if not victim.wait_end(GONE_WITHIN):
        return Evidence(False, f"{victim.name} was still there after {GONE_WITHIN:g} s")
    if victim.status != -number:
        return Evidence(False, f"{victim.name} ended with status {victim.status}, not by {number.name}")
    return Evidence(True, f"{victim.name} was ended by {number.name}")


def states(pid: int) -> Counter[str]:
    """How many threads of the process are in each state; nothing if it is gone."""
    found: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[parse_state(task.read_text())] += 1
    return found


def _stopped(pid: int) -> bool:
    """A thread that sleeps where no signal but a fatal one reaches it (D) stops when it leaves the kernel."""
    found = states(pid)
    return found["T"] > 0 and set(found) <= {"T", "D"}


def _listed(found: Counter[str]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(found.items())) or "none"
