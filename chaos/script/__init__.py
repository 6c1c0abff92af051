# SPDX-License-Identifier: Apache-2.0
"""Carrying out a script, step by step.

A step is a function of the actor; the table below says which is whose. Operations that the kernel refuses are answers,
and the script goes on: what they mean is for the checkers. What makes the rest of a script meaningless (a launch that
fails, a guest that does not count, a hold that is not reached) raises `StepFailed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chaos import fault as faults
from chaos.errors import Unsupported
from chaos.experiment import steps as s
from chaos.fleet import StepFailed
from chaos.scene import Scene
from chaos.script import guests, holding, launching, looking, moving, striking, together
from chaos.script.actor import Actor

_STEPS: dict[type, Callable[[Actor, Any], None]] = {
    s.Launch: launching.launch,
    s.Create: launching.create,
    s.Call: launching.call,
    s.Init: launching.init,
    s.Vcpu: launching.vcpu,
    s.Command: launching.command,
    s.Finish: launching.finish,
    s.Mirror: launching.mirror,
    s.Close: launching.close,
    s.Run: guests.run,
    s.Count: guests.count,
    s.Pause: guests.pause,
    s.Storm: guests.storm,
    s.Calm: guests.calm,
    s.Migrate: lambda actor, step: moving.migrate(actor, step, carry_out),
    s.Move: moving.move,
    s.Together: lambda actor, step: together.together(actor, step, carry_out),
    s.Join: moving.join,
    s.Arm: holding.arm,
    s.Hold: holding.hold,
    s.Release: holding.release,
    s.Ask: looking.ask,
    s.Status: looking.status,
    s.Observe: looking.observe,
    s.Strike: striking.strike,
    s.Undo: striking.undo,
}


def perform(actor: Actor) -> None:
    """Carry the experiment's script out. Raises `StepFailed`, having said which step it was."""
    script = actor.stage.experiment.script
    for number, step in enumerate(script):
        actor.stage.fleet.step = number
        try:
            carry_out(actor, step)
        except StepFailed as failed:
            name = step.__struct_config__.tag
            raise StepFailed(f"step {number} ({name}): {failed}", step=number) from failed
    actor.stage.fleet.step = len(script)


def require_all(scene: Scene, *, shared: bool) -> None:
    """Whether the host can do what the script's faults and holds want, and may have it done to it: on a `shared` one
    nothing is touched that others need. Raises `Unsupported`, `UsageError`."""
    if shared and (mirror := moved_mirror(scene.stage.experiment.script)):
        raise _theirs_too(f"a move of the mirror {mirror} may cost the host an ASID until its next boot (finding 0004)")
    for _, step in s.walk(scene.stage.experiment.script):
        if isinstance(step, s.Strike):
            fault = faults.find(step.fault, step.options)
            if shared and not step.target:
                raise _theirs_too(f"the fault {step.fault} strikes the whole host")
            fault.require(scene, step.target)
        elif isinstance(step, s.Arm):
            if shared and step.kernel is not None and step.kernel.vmm is None:
                raise _theirs_too(f"the hold {step.hold} stops whoever calls {step.kernel.function}")
            holding.require(scene, step)


def moved_mirror(script: tuple[s.Step, ...]) -> str:
    """A mirror that is to be moved, "" if none is."""
    mirrors: set[str] = set()
    for _, step in s.walk(script):
        match step:
            case s.Mirror(vm=vm):
                mirrors.add(vm)
            case s.Move(source=str(source)) | s.Migrate(source=source) if source in mirrors:
                return source
            case s.Moves(sources=sources) if mirrors & set(sources):
                return min(mirrors & set(sources))
    return ""


def _theirs_too(what: str) -> Unsupported:
    return Unsupported(f"{what}, and this one is shared with others", remedy="use a host of its own, or the lab")


def carry_out(actor: Actor, step: s.Step) -> None:
    """One step, also one inside another. Raises `StepFailed`, and what a fault or a hold cannot do here."""
    _STEPS[type(step)](actor, step)
