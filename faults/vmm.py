# SPDX-License-Identifier: Apache-2.0
"""Faults of a VMM process as a whole."""

from __future__ import annotations

from signal import Signals, pidfd_send_signal
from typing import Literal

import msgspec

from chaos.fault import Evidence, Victim

# A process that sleeps in the kernel where only a fatal signal can reach it takes a moment to unwind.
GONE_WITHIN = 30.0


class Kill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """End the process with a signal. What it owned goes with it, and what it was doing is never answered."""

    signal: Literal["KILL", "TERM", "ABRT", "SEGV"] = "KILL"

    @property
    def number(self) -> Signals:
        return Signals[f"SIG{self.signal}"]

    def apply(self, victim: Victim) -> None:
        pidfd_send_signal(victim.pidfd, self.number)

    def undo(self, victim: Victim) -> str:
        return "the dead stay dead" if victim.status is not None else "it lives"

    def evidence(self, victim: Victim) -> Evidence:
        if not victim.wait_end(GONE_WITHIN):
            return Evidence(False, f"{victim.name} was still there after {GONE_WITHIN:g} s")
        if victim.status != -self.number:
            return Evidence(False, f"{victim.name} ended with status {victim.status}, not by SIG{self.signal}")
        return Evidence(True, f"{victim.name} was ended by SIG{self.signal}")
