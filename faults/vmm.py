# SPDX-License-Identifier: Apache-2.0
"""Faults of a VMM process as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from signal import Signals, pidfd_send_signal
from typing import ClassVar, Literal

from chaos.fault import Evidence, Fault, Scene, Target

# A process that sleeps in the kernel where only a fatal signal can reach it takes a moment to unwind.
GONE_WITHIN = 30.0


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
        victim = scene.vmm(target)
        if not victim.wait_end(GONE_WITHIN):
            return Evidence(False, f"{target} was still there after {GONE_WITHIN:g} s")
        if victim.status != -self.number:
            return Evidence(False, f"{target} ended with status {victim.status}, not by SIG{self.signal}")
        return Evidence(True, f"{target} was ended by SIG{self.signal}")
