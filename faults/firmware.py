# SPDX-License-Identifier: Apache-2.0
"""Faults of the firmware: commands that fail, come late, are never answered or answered with garbage; its death, and a
platform that is shut down under those who use it.

Only a lab's firmware can be broken. Elsewhere a run with one of these is skipped.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import ClassVar

from chaos.fault import Evidence, FailpointHits, Fault, FaultContext, PlanInForce, StorageState, Target
from chaos.lab.psp import failpoints
from chaos.lab.psp.plan import Die

# Of the driver, with a firmware that will never answer: somebody waits for it.
PATIENCE_WITH_THE_DEAD = 2
NS = 1_000_000_000
UNINIT = 0  # SEV_STATE_UNINIT
CHANGE_STATE = ("INIT_EX", "PEK_GEN", "PDH_GEN")
"""After which the driver writes the firmware's state down."""


@dataclass(kw_only=True, slots=True)
class Firmware(Fault):
    """Follow the failpoints of `plan` (docs/firmware.md) until it is undone. Each of them must strike.

    `patience` is how many seconds the driver waits for an answer before it takes the firmware for dead, for good; 0
    leaves that as it is, 100 on a stock kernel, unless the plan has the firmware die.
    """

    TARGET: ClassVar[Target] = "host"
    NEEDS: ClassVar[str] = "a lab: no other machine's firmware is ours to break"
    PROOF: ClassVar[str] = "the firmware says of each failpoint when it struck and how often; each must have"

    plan: str
    patience: int = 0
    _armed: PlanInForce | None = field(init=False, default=None)
    _patience_before: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        rules = failpoints.parse(self.plan)
        if not 0 <= self.patience <= 600:
            raise ValueError(f"patience is 0 to 600 seconds, not {self.patience}")
        if not self.patience and any(isinstance(rule.action, Die) for rule in rules):
            self.patience = PATIENCE_WITH_THE_DEAD

    def require(self, ctx: FaultContext, target: str) -> None:
        ctx.firmware.require()

    def apply(self, ctx: FaultContext, target: str) -> None:
        if self.patience:
            self._patience_before = ctx.firmware.set_patience(self.patience)
        self._armed = ctx.firmware.arm(self.plan)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        if self._armed is None:
            return Evidence(False, "the plan was not followed")
        points = self._armed.look().points
        missed = any(not point.count for point in points)
        return Evidence(None if missed else True, "; ".join(map(_told, points)))

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._armed is not None:
            self._armed.withdraw()
        if self._patience_before is not None:
            with contextlib.suppress(OSError):  # a firmware that is dead is not asked any more
                ctx.firmware.set_patience(self._patience_before)
        return "the plan is followed no more"


@dataclass(kw_only=True, slots=True)
class PlatformReset(Fault):
    """Shut the firmware's platform down, as an administrator may (SEV_FACTORY_RESET). The next INIT starts it anew,
    and so can be made to fail by the firmware. There must be no guest."""

    TARGET: ClassVar[Target] = "host"
    WHERE: ClassVar[str] = "at any step at which no guest is launched"
    NEEDS: ClassVar[str] = "a lab: a real machine would lose its identity for good"
    PROOF: ClassVar[str] = "the platform says that it is not initialised"

    def require(self, ctx: FaultContext, target: str) -> None:
        ctx.firmware.require()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.firmware.reset()

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        state = ctx.firmware.platform.status().state
        return Evidence(state == UNINIT, f"the platform is in state {state}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "the next guest initialises it"


@dataclass(kw_only=True, slots=True)
class FirmwareStorage(Fault):
    """Keep the host from writing the firmware's state down (`init_ex_path` of ccp): the folder is `missing`, `full` or
    `read-only`. The platform has to be down, as `platform-reset` leaves it, and to be initialised meanwhile, or to be
    given new keys (PEK_GEN, PDH_GEN). Or the file is `torn`, half of it gone: the driver reads it when it is loaded
    anew, which has to come next."""

    TARGET: ClassVar[Target] = "host"
    WHERE: ClassVar[str] = "at any step at which the platform is down, or is given new keys next"
    NEEDS: ClassVar[str] = "a lab whose ccp keeps the firmware's state in a file (ccp: {init_ex_path: …})"
    PROOF: ClassVar[str] = (
        "the state cannot be written there by anybody, or is torn, and a command came that changes it"
    )

    state: StorageState
    _torn: bool | None = field(init=False, default=None)
    _counted: PlanInForce | None = field(init=False, default=None)

    def require(self, ctx: FaultContext, target: str) -> None:
        ctx.firmware.require()
        _ = ctx.storage.file

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.storage.spoil(self.state)
        to_hear_of = "; ".join(f"{command}=delay:1ns" for command in CHANGE_STATE)  # nothing else is changed
        self._counted = ctx.firmware.arm(to_hear_of)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        told = self._torn_file(ctx) if self.state == "torn" else _unwritable(ctx)
        if self._counted is None or not told:
            return Evidence(False, f"{ctx.storage.file} can be written, and is whole")
        came = zip(CHANGE_STATE, self._counted.look().points, strict=True)
        counted = [f"{command} came to the firmware {point.count} times" for command, point in came if point.count]
        if not counted:
            return Evidence(None, f"{told}; nobody had the platform initialised, or given new keys")
        return Evidence(True, "; ".join((told, *counted)))

    def undo(self, ctx: FaultContext, target: str) -> str:
        try:
            if self._counted is not None:
                self._counted.withdraw()
        finally:
            ctx.storage.mend()
        return "the firmware's state can be written again"

    def _torn_file(self, ctx: FaultContext) -> str:
        """As it was when this was asked first: whoever reads it writes it anew."""
        if self._torn is None:
            self._torn = ctx.storage.torn
        return f"{ctx.storage.file} was torn" if self._torn else ""


def _unwritable(ctx: FaultContext) -> str:
    error = ctx.storage.takes()
    return "" if error is None else f"{ctx.storage.file} cannot be written: {error.strerror}"


def _told(point: FailpointHits) -> str:
    """With the time at which it struck first and last, in seconds by the host's clock."""
    if not point.count:
        return f"{point.failpoint} did not strike"
    when = f"at {point.first / NS:.6f}"
    if point.count > 1:
        when = f"{point.count} times, from {point.first / NS:.6f} to {point.last / NS:.6f}"
    return f"{point.failpoint} struck {when}"
