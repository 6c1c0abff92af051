# SPDX-License-Identifier: Apache-2.0
"""Steps that stop an operation inside the kernel, see that it is, and let it go on."""

from __future__ import annotations

from typing import Literal

from chaos.errors import Unsupported
from chaos.experiment import steps as s
from chaos.fault import FaultContext
from chaos.history.reading import explained
from chaos.history.records import Held, Released
from chaos.kvm import userfault
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.linux import task
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.runner.guests import Guest
from chaos.runner.holds.failpoints import FirmwareStall
from chaos.runner.holds.places import KernelEntry, MissingPageHold, Place, Unarmed
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import PendingOperation, StepFailed
from chaos.vmm import messages as m

# At its entry the driver's lock is kept, for which whoever asks the firmware would wait.
DRIVER_LOCKED = "__sev_do_cmd_locked"


def require(ctx: FaultContext, step: s.ArmStep) -> None:
    """Raises `Unsupported` if the host has no such place."""
    if step.kernel is not None:
        ctx.kfault().require(step.kernel.function)
    if step.firmware is not None:
        ctx.firmware.require()
    if step.page is not None and (lacking := userfault.lacking()) is not None:
        raise Unsupported(lacking[0], remedy=lacking[1])


def arm(executor: Executor, step: s.ArmStep) -> None:
    """What is armed is released at the end, if no step does it before."""
    if step.hold in executor.armed:
        raise StepFailed(f"the hold {step.hold} is armed already")
    executor.armed[step.hold] = _arm(executor, step)
    if step.kernel is not None and step.kernel.function == DRIVER_LOCKED:
        executor.ctx.firmware.kept.add(step.hold)
    executor.undo.callback(_release, executor, step.hold)


def _arm(executor: Executor, step: s.ArmStep) -> Place:
    if step.kernel is not None:
        pid = executor.vmms[step.kernel.vmm].pid if step.kernel.vmm is not None else None
        return KernelEntry.arm(executor.ctx.kfault(), step.kernel.function, nth=step.kernel.nth, pid=pid)
    if step.firmware is not None:
        return FirmwareStall.arm(executor.ctx.firmware, step.firmware.command, nth=step.firmware.nth)
    if step.page is not None:
        vm = executor.guests.launched(step.page.vm)
        executor.vmms.ask(vm.vmm, m.ArmPage(vm=vm.name))
        return MissingPageHold(lambda: _put_page(executor, vm))
    raise StepFailed(f"the hold {step.hold} has no place")


def _put_page(executor: Executor, vm: Guest) -> None:
    if vm.created and vm.vmm.alive:
        executor.vmms.ask(vm.vmm, m.PutPage(vm=vm.name))


def hold(executor: Executor, step: s.HoldStep) -> None:
    pending = executor.under_way(step.vm)
    pid = executor.guests[step.vm].vmm.pid
    place = executor.armed.get(step.at) or (Unarmed(step.at) if step.at in s.UNARMED else None)
    if place is None:
        raise StepFailed(f"the hold {step.at} is not armed")
    sleeper: task.Sleeper | None = None
    reached = False

    def there() -> bool:
        nonlocal sleeper, reached
        if pending.tid:
            sleeper = task.look(pid, pending.tid, ioctls=IOCTL_NAMES)
            reached = sleeper is not None and place.stops(sleeper, pending.tid)
        return reached or pending.over

    what = f"{pending.f} of {step.vm} to be stopped at {step.at}"
    failure = ""
    try:
        executor.loop.wait(there, step.within, what, look=LOOK_AGAIN)
    except TimedOut as late:
        failure = f"{late}; its thread: {sleeper or 'gone'}"
    executor.write(
        Held(
            t=executor.now(), op=pending.op, step=executor.step, hold=step.at, reached=reached, place=place.kind,
            side=_side(executor, pending) if reached and place.kind == "vcpu" else "",
            function=place.function, command=place.command,
            state=sleeper.state if sleeper else "", sleeping=sleeper.sleeping if sleeper else "",
            call=sleeper.called if sleeper else "", stack=sleeper.stack if sleeper else (),
        )
    )  # fmt: skip
    if not reached:
        raise StepFailed(failure or _ended(pending, step))


def _ended(pending: PendingOperation, step: s.HoldStep) -> str:
    how = explained(pending.done) if pending.done is not None and pending.done.outcome != "ok" else "it is done"
    return f"{pending.f} of {step.vm} ended before it was stopped at {step.at}: {how}"


def _side(executor: Executor, pending: PendingOperation) -> Literal["", "source", "destination"]:
    """Whose vCPU a move waits for: it locks those of its destination first. One that leaves the guest now and then may
    have been overtaken."""
    ends: tuple[tuple[Literal["source", "destination"], str], ...] = (("destination", "vm"), ("source", "source"))
    for side, argument in ends:
        guest = executor.guests[pending.args[argument]]
        if guest.running:
            return side if guest.every == 0 else ""
    return ""


def release(executor: Executor, step: s.ReleaseStep) -> None:
    if step.hold not in executor.armed:
        raise StepFailed(f"the hold {step.hold} is not armed")
    _release(executor, step.hold)


def _release(executor: Executor, name: str) -> None:
    place = executor.armed.pop(name, None)
    if place is not None:
        executor.write(Released(t=executor.now(), step=executor.step, hold=name))
        place.release()
        executor.ctx.firmware.kept.discard(name)
