# SPDX-License-Identifier: Apache-2.0
"""Steps that stop an operation inside the kernel, see that it is, and let it go on."""

from __future__ import annotations

from chaos import steps as s
from chaos.fleet import StepFailed
from chaos.history import Held
from chaos.poll import LOOK_AGAIN, TimedOut
from chaos.scene import Scene
from chaos.schedule import holds
from chaos.schedule.firmware import FirmwareStall
from chaos.schedule.places import KernelEntry, Place, Unarmed
from chaos.script.actor import Actor


def require(scene: Scene, step: s.Arm) -> None:
    """Raises `Unsupported` if the host has no such place."""
    if step.kernel is not None:
        scene.kfault().require(step.kernel.function)
    if step.firmware is not None:
        scene.firmware.require()


def arm(actor: Actor, step: s.Arm) -> None:
    """What is armed is released at the end, if no step does it before."""
    if step.hold in actor.armed:
        raise StepFailed(f"the hold {step.hold} is armed already")
    actor.armed[step.hold] = _arm(actor, step)
    actor.undo.callback(_release, actor, step.hold)


def _arm(actor: Actor, step: s.Arm) -> Place:
    if step.kernel is not None:
        pid = actor.scene.vmm(step.kernel.vmm).pid if step.kernel.vmm is not None else None
        return KernelEntry.arm(actor.scene.kfault(), step.kernel.function, nth=step.kernel.nth, pid=pid)
    if step.firmware is not None:
        return FirmwareStall.arm(actor.scene.firmware, step.firmware.command, nth=step.firmware.nth)
    raise StepFailed(f"the hold {step.hold} has no place")


def hold(actor: Actor, step: s.Hold) -> None:
    pending = actor.under_way(step.vm)
    pid = actor.stage.guests[step.vm].vmm.pid
    place = actor.armed.get(step.at) or Unarmed(step.at)
    sleeper: holds.Sleeper | None = None
    reached = False

    def there() -> bool:
        nonlocal sleeper, reached
        if pending.tid:
            sleeper = holds.look(pid, pending.tid)
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
            t=actor.now(), op=pending.op, step=actor.step, hold=step.at, reached=reached, function=place.function,
            state=sleeper.state if sleeper else "", sleeping=sleeper.sleeping if sleeper else "",
            stack=sleeper.stack if sleeper else (),
        )
    )  # fmt: skip
    if not reached:
        raise StepFailed(failure or f"{pending.f} of {step.vm} ended before it was stopped at {step.at}")


def release(actor: Actor, step: s.Release) -> None:
    if step.hold not in actor.armed:
        raise StepFailed(f"the hold {step.hold} is not armed")
    _release(actor, step.hold)


def _release(actor: Actor, name: str) -> None:
    place = actor.armed.pop(name, None)
    if place is not None:
        place.release()
