# SPDX-License-Identifier: Apache-2.0
"""Steps that apply faults and undo them."""

from __future__ import annotations

from chaos import fault as faults
from chaos.experiment import steps as s
from chaos.runner.script.applied import Struck
from chaos.runner.script.executor import Actor
from chaos.runner.vmms import StepFailed


def strike(actor: Actor, step: s.Strike) -> None:
    """The undo is registered first: what was half applied is undone as well."""
    fault = faults.find(step.fault, step.options)
    recorder, withheld = actor.stage.fleet.recorder, step.fault in actor.withhold
    struck = Struck(step.fault, fault, step.target, actor.step, actor.scene, recorder, withheld=withheld)
    actor.struck.append(struck)
    actor.undo.callback(struck.undo)
    try:
        struck.apply()
    except OSError as error:
        raise StepFailed(f"{step.fault} could not be applied to {step.target or 'the host'}: {error}") from error


def undo(actor: Actor, step: s.Undo) -> None:
    for struck in reversed(actor.struck):
        if (struck.name, struck.target) == (step.fault, step.target) and not struck.undone:
            struck.undo()
            return
    raise StepFailed(f"{step.fault} is not applied to {step.target or 'the host'}")
