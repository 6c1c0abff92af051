# SPDX-License-Identifier: Apache-2.0
"""Steps that apply faults and undo them."""

from __future__ import annotations

from chaos import fault as faults
from chaos.experiment import steps as s
from chaos.runner.script.applied import AppliedFault
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed


def apply(executor: Executor, step: s.FaultStep) -> None:
    """The undo is registered first: what was half applied is undone as well."""
    fault = faults.find(step.fault, step.options)
    log, withheld = executor.log, step.fault in executor.withhold
    applied = AppliedFault(step.fault, fault, step.target, log.step, executor.ctx, log, withheld=withheld)
    executor.applied.append(applied)
    executor.undo.callback(applied.undo)
    try:
        applied.apply()
    except OSError as error:
        raise StepFailed(f"{step.fault} could not be applied to {step.target or 'the host'}: {error}") from error


def undo(executor: Executor, step: s.UndoStep) -> None:
    for applied in reversed(executor.applied):
        if (applied.name, applied.target) == (step.fault, step.target) and not applied.undone:
            applied.undo()
            return
    raise StepFailed(f"{step.fault} is not applied to {step.target or 'the host'}")
