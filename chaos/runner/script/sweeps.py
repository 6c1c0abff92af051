# SPDX-License-Identifier: Apache-2.0
"""Sweeps: one operation again and again, and each time another of the kernel's fault points on its way fails."""

from __future__ import annotations

from collections.abc import Mapping

from chaos.experiment import steps as s
from chaos.history.records import Value
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed
from chaos.vmm.messages import ArmFailNth, FailedNth


def sweep(executor: Executor, step: s.SweepStep) -> None:
    """Every operation says itself whether a point failed in it (`fail_nth`, `struck`)."""
    vm, operation = step.operation
    for nth in range(1, step.at_most + 1):
        for inner in step.before:
            executor.carry_out(inner)
        executor.vmms.ask(executor.guests[vm].vmm, ArmFailNth(vm=vm, operation=operation, nth=nth))
        told = _made(executor, step)
        for inner in step.after:
            executor.carry_out(inner)
        if not told.get("struck"):
            executor.note("progress", f"{operation} of {vm} has {nth - 1} fault points, and each of them failed once")
            return
    raise StepFailed(f"{operation} of {vm} has more than {step.at_most} fault points")


def _made(executor: Executor, step: s.SweepStep) -> Mapping[str, Value]:
    """Carry out what is swept; what its VMM says of the point."""
    vm, operation = step.operation
    refused: StepFailed | None = None
    try:
        executor.carry_out(step.step)
    except StepFailed as failed:  # of a step that makes no sense if it is refused
        refused = failed
    vmm = executor.guests[vm].vmm
    told = executor.vmms.ask(vmm, FailedNth(vm=vm, disarm=True)).value
    if not told.get("done"):
        raise refused or StepFailed(f"nothing made {operation} of {vm}")
    if told.get("struck") and told.get("errno"):
        executor.carry_out(s.ObserveStep(label=f"failed-{executor.log.step}"))
        if not (isinstance(step.step, s.VcpuStep) and told.get("call")):  # the vCPU is there, and there is only one
            executor.carry_out(step.step)
    elif refused is not None:
        raise refused
    return told
