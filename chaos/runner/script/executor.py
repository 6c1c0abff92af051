# SPDX-License-Identifier: Apache-2.0
"""Who carries a script out, and what the steps have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from chaos.experiment.steps import MigrateStep, Step
from chaos.history.records import Counted, Fault, Held, Overdue, Released
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.linux import task
from chaos.linux.loop import Loop, TimedOut
from chaos.runner.fault_context import RunContext
from chaos.runner.guests import Guest, Guests
from chaos.runner.holds.places import Place
from chaos.runner.migration import attempt
from chaos.runner.observer import Observer
from chaos.runner.operations import OperationLog
from chaos.runner.script.applied import AppliedFault
from chaos.runner.tracing import Untraced
from chaos.runner.vmms import ANSWER_WITHIN, PendingOperation, StepFailed, VmmProcesses
from chaos.vmm.messages import Operation, ReceiveFd

Handlers = Mapping[type, Callable[["Executor", Any], None]]
"""What carries a step of each class out."""


@dataclass(slots=True)
class Executor:
    """What has to be undone afterwards is put on `undo`. `armed` are the holds by name, `applied` the faults that were
    applied, the latest last. Those of the names in `withhold` are not. Nothing that is done `untraced` is among the
    kernel's events. `between` is called when an attempt of a migration has failed and another one is to follow."""

    guests: Guests
    vmms: VmmProcesses
    log: OperationLog
    loop: Loop
    observer: Observer
    undo: ExitStack
    ctx: RunContext
    handlers: Handlers
    untraced: Untraced
    withhold: frozenset[str] = frozenset()
    armed: dict[str, Place] = field(default_factory=dict)
    applied: list[AppliedFault] = field(default_factory=list)
    between: Callable[[MigrateStep], None] = lambda step: None

    def carry_out(self, step: Step) -> None:
        """One step, also one inside another. Raises `StepFailed`, and what a fault or a hold cannot do here."""
        self.handlers[type(step)](self, step)

    def provide(self, vm: Guest, source: str | None, *, keep: bool = False) -> None:
        """Send `vm` the descriptor that it is to take, to `keep` until then, or to find in its socket. It needs none of
        its own, and gets a wrong one by itself."""
        if source is not None and source != vm.name:
            giver = self.guests.launched(source)
            attempt.connect(self.guests, giver, vm)
            attempt.send(self.guests, giver, vm)
            if keep:
                self.guests.must(vm, ReceiveFd(vm=vm.name, source=source))

    # -- operations that may be left under way ------------------------------------------------------------

    def begin(self, vm: Guest, operation: Operation, *, wait: bool, within: float = ANSWER_WITHIN) -> None:
        """Hand an operation over in a thread of its own, and wait for it, or leave it under way."""
        self.free(vm)
        self.guests.under_way[vm.name] = self.vmms.invoke(vm.vmm, operation, aside=True)
        if wait:
            self.join(vm, within)

    def free(self, vm: Guest) -> None:
        pending = self.guests.under_way.get(vm.name)
        if pending is not None:
            raise StepFailed(f"{pending.f} of {vm.name} is under way")

    def join(self, vm: Guest, within: float) -> None:
        """Wait for the operation on `vm`. Raises `StepFailed`, and says where it is instead."""
        pending = self.under_way(vm.name)
        try:
            self.vmms.wait(pending, within)
        except TimedOut as late:
            raise StepFailed(f"{late}; its thread: {self.overdue(pending)}") from late
        del self.guests.under_way[vm.name]

    def overdue(self, pending: PendingOperation) -> str:
        """Write down where an operation is that should have ended by now; in words, too."""
        sleeper = task.look(pending.pid, pending.tid, ioctls=IOCTL_NAMES) if pending.tid else None
        in_guest = any(vm.running and vm.every == 0 for vm in self.guests.all)
        free = not self.armed and not in_guest and all(applied.undone for applied in self.applied)
        self.write(
            Overdue(
                t=self.now(), op=pending.op, step=self.step, free=free, state=sleeper.state if sleeper else "",
                sleeping=sleeper.sleeping if sleeper else "", call=sleeper.called if sleeper else "",
                stack=sleeper.stack if sleeper else (),
            )
        )  # fmt: skip
        return str(sleeper or "gone")

    def under_way(self, vm: str) -> PendingOperation:
        """The script's own, or else the oldest that a fault has made. Raises `StepFailed` if there is none."""
        left = self.guests[vm].vmm.pending.values()
        others = (pending for pending in left if pending.recorded and pending.args.get("vm") == vm)
        pending = self.guests.under_way.get(vm) or next(others, None)
        if pending is None:
            raise StepFailed(f"no operation on {vm} is under way")
        return pending

    def none_under_way(self, why: str) -> None:
        names = [name for name, pending in self.guests.under_way.items() if not pending.over]
        if names:
            raise StepFailed(f"an operation on {', '.join(names)} is under way: {why}")

    # -- in short -----------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.log.step

    def now(self) -> int:
        return self.log.now()

    def write(self, record: Counted | Held | Released | Overdue | Fault) -> None:
        self.log.write(record)

    def note(self, topic: Literal["skipped", "progress"], text: str) -> None:
        self.log.note(topic, text)
