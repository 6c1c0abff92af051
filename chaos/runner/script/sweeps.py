# SPDX-License-Identifier: Apache-2.0
"""Sweeps: one operation again and again, and each time another of the kernel's fault points on its way fails.

How many there are differs a little from one time to the next: a slab that has to be refilled has more of them, and so
has whatever else is put off. So they are counted first, several times, which also gets done what is done but once, and
when all is over once more; and a number that is not met is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from chaos.experiment import steps as s
from chaos.history.records import Value
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed, VmmProcess
from chaos.vmm.messages import ArmFailNth, FailedNth

COUNTED = 3
TRIED = 3  # each number that was not met


def sweep(executor: Executor, step: s.SweepStep) -> None:
    """Every operation says itself whether a point failed in it (`fail_nth`, `struck`), and how many there were."""
    counts = [int(str(_round(executor, step, 0)["points"])) for _ in range(COUNTED)]
    if max(counts) > step.at_most:
        raise StepFailed(f"{step.swept} has {max(counts)} fault points, more than {step.at_most}")
    fail_each(max(counts), lambda nth: bool(_round(executor, step, nth).get("struck")))
    for _ in range(COUNTED):  # by now nothing is done any more that is done but once
        _round(executor, step, 0)


def fail_each(most: int, fails: Callable[[int], bool]) -> None:
    """Have `fails` let each point fail, by its number from 1; those that it did not meet, again."""
    left: Sequence[int] = range(1, most + 1)
    for _ in range(TRIED):
        left = [nth for nth in left if not fails(nth)]


def _round(executor: Executor, step: s.SweepStep, nth: int) -> Mapping[str, Value]:
    """With the nth point to fail, none with 0; what the VMM says of it."""
    vm, operation = step.operation
    for inner in step.before:
        executor.carry_out(inner)
    executor.vmms.ask(_vmm(executor, step), ArmFailNth(vm=vm, operation=operation, nth=nth))
    told = _made(executor, step)
    for inner in step.after:
        executor.carry_out(inner)
    return told


def _vmm(executor: Executor, step: s.SweepStep) -> VmmProcess:
    """Whose operation it is."""
    if isinstance(step.step, s.PlatformStep):
        return executor.vmms[step.step.vmm]
    return executor.guests[step.operation[0]].vmm


def _made(executor: Executor, step: s.SweepStep) -> Mapping[str, Value]:
    """Carry out what is swept; what its VMM says of the point."""
    vm, operation = step.operation
    refused: StepFailed | None = None
    try:
        executor.carry_out(step.step)
    except StepFailed as failed:  # of a step that makes no sense if it is refused
        refused = failed
    told = executor.vmms.ask(_vmm(executor, step), FailedNth(vm=vm, operation=operation, disarm=True)).value
    if not told.get("done"):
        raise refused or StepFailed(f"nothing made {step.swept}")
    if told.get("struck") and told.get("errno"):
        executor.carry_out(s.ObserveStep(label=f"failed-{executor.log.step}"))
        for inner in step.refused:
            executor.carry_out(inner)
        if not (isinstance(step.step, s.VcpuStep) and told.get("call")):  # the vCPU is there, and there is only one
            executor.carry_out(step.step)
    elif refused is not None:
        raise refused
    return told
