# SPDX-License-Identifier: Apache-2.0
"""Faults of a VMM process as a whole."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
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
class KillAll(Fault):
    """End every VMM with SIGKILL, one right after the other, so that no side sees the other one's end first."""

    TARGET: ClassVar[Target] = "host"
    PROOF: ClassVar[str] = "every VMM that lived was reaped, ended by SIGKILL"

    _hit: tuple[Victim, ...] = field(init=False, default=())
    _took: int = field(init=False, default=0)

    def ends(self, scene: Scene, target: str) -> tuple[str, ...]:
        return tuple(victim.name for victim in scene.vmms)

    def apply(self, scene: Scene, target: str) -> None:
        self._hit = scene.vmms
        began = time.monotonic_ns()
        for victim in self._hit:
            pidfd_send_signal(victim.pidfd, Signals.SIGKILL)
        self._took = time.monotonic_ns() - began

    def evidence(self, scene: Scene, target: str) -> Evidence:
        if not self._hit:
            return Evidence(False, "nobody was hit")
        each = [ended(victim, Signals.SIGKILL) for victim in self._hit]
        told = "; ".join(one.detail for one in each)
        return Evidence(all(one.struck for one in each), f"within {self._took / 1000:.0f} µs: {told}")

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
