# SPDX-License-Identifier: Apache-2.0
"""Steps that stop an operation inside the kernel, see that it is, and let it go on."""

from __future__ import annotations

from typing import Literal

from chaos.errors import Unsupported
from chaos.experiment import steps as s
from chaos.history.reading import explained
from chaos.history.records import Held, Released
from chaos.kvm import userfault
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.linux import task
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.runner.fault_context import Scene
from chaos.runner.guests import Guest
from chaos.runner.holds.failpoints import FirmwareStall
from chaos.runner.holds.places import KernelEntry, MissingPage, Place, Unarmed
from chaos.runner.script.executor import Actor
from chaos.runner.vmms import Pending, StepFailed
from chaos.vmm import messages as m

# At its entry the driver's lock is kept, for which whoever asks the firmware would wait.
DRIVER_LOCKED = "__sev_do_cmd_locked"


def require(scene: Scene, step: s.Arm) -> None:
    """Raises `Unsupported` if the host has no such place."""
    if step.kernel is not None:
        scene.kfault().require(step.kernel.function)
    if step.firmware is not None:
        scene.firmware.require()
    if step.page is not None and (lacking := userfault.lacking()) is not None:
        raise Unsupported(lacking[0], remedy=lacking[1])


def arm(actor: Actor, step: s.Arm) -> None:
    """What is armed is released at the end, if no step does it before."""
    if step.hold in actor.armed:
        raise StepFailed(f"the hold {step.hold} is armed already")
    actor.armed[step.hold] = _arm(actor, step)
    if step.kernel is not None and step.kernel.function == DRIVER_LOCKED:
        actor.scene.firmware.kept.add(step.hold)
    actor.undo.callback(_release, actor, step.hold)


def _arm(actor: Actor, step: s.Arm) -> Place:
    if step.kernel is not None:
        pid = actor.scene.vmm(step.kernel.vmm).pid if step.kernel.vmm is not None else None
        return KernelEntry.arm(actor.scene.kfault(), step.kernel.function, nth=step.kernel.nth, pid=pid)
    if step.firmware is not None:
        return FirmwareStall.arm(actor.scene.firmware, step.firmware.command, nth=step.firmware.nth)
    if step.page is not None:
        vm = actor.stage.guest(step.page.vm)
        actor.stage.fleet.ask(vm.vmm, m.ArmPage(vm=vm.name))
        return MissingPage(lambda: _put_page(actor, vm))
    raise StepFailed(f"the hold {step.hold} has no place")


def _put_page(actor: Actor, vm: Guest) -> None:
    if vm.created and vm.vmm.alive:
        actor.stage.fleet.ask(vm.vmm, m.PutPage(vm=vm.name))


def hold(actor: Actor, step: s.Hold) -> None:
    pending = actor.under_way(step.vm)
    pid = actor.stage.guests[step.vm].vmm.pid
    place = actor.armed.get(step.at) or (Unarmed(step.at) if step.at in s.UNARMED else None)
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
        actor.stage.fleet.loop.wait(there, step.within, what, look=LOOK_AGAIN)
    except TimedOut as late:
        failure = f"{late}; its thread: {sleeper or 'gone'}"
    actor.write(
        Held(
            t=actor.now(), op=pending.op, step=actor.step, hold=step.at, reached=reached, place=place.kind,
            side=_side(actor, pending) if reached and place.kind == "vcpu" else "",
            function=place.function, command=place.command,
            state=sleeper.state if sleeper else "", sleeping=sleeper.sleeping if sleeper else "",
            call=sleeper.called if sleeper else "", stack=sleeper.stack if sleeper else (),
        )
    )  # fmt: skip
    if not reached:
        raise StepFailed(failure or _ended(pending, step))


def _ended(pending: Pending, step: s.Hold) -> str:
    how = explained(pending.done) if pending.done is not None and pending.done.outcome != "ok" else "it is done"
    return f"{pending.f} of {step.vm} ended before it was stopped at {step.at}: {how}"


def _side(actor: Actor, pending: Pending) -> Literal["", "source", "destination"]:
    """Whose vCPU a move waits for: it locks those of its destination first. One that leaves the guest now and then may
    have been overtaken."""
    ends: tuple[tuple[Literal["source", "destination"], str], ...] = (("destination", "vm"), ("source", "source"))
    for side, argument in ends:
        guest = actor.stage.guests[pending.args[argument]]
        if guest.running:
            return side if guest.every == 0 else ""
    return ""


def release(actor: Actor, step: s.Release) -> None:
    if step.hold not in actor.armed:
        raise StepFailed(f"the hold {step.hold} is not armed")
    _release(actor, step.hold)


def _release(actor: Actor, name: str) -> None:
    place = actor.armed.pop(name, None)
    if place is not None:
        actor.write(Released(t=actor.now(), step=actor.step, hold=name))
        place.release()
        actor.scene.firmware.kept.discard(name)
