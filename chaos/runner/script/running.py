# SPDX-License-Identifier: Apache-2.0
"""Steps that let a guest run and see how far it has come."""

from __future__ import annotations

from chaos.experiment import steps as s
from chaos.history.records import Counted
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.runner.guests import Guest
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed
from chaos.vmm import messages as m


def run(executor: Executor, step: s.RunStep) -> None:
    vm = executor.guests.launched(step.vm)
    if _may_run(executor, vm, "run"):
        executor.guests.enter(vm, step.every)


def pause(executor: Executor, step: s.PauseStep) -> None:
    executor.guests.leave(executor.guests.launched(step.vm))


def count(executor: Executor, step: s.CountStep) -> None:
    """Of a guest that never leaves, the vCPU has to be taken out to read its counter: not while a move waits.

    A guest that stops by itself is an answer like a refused operation, and the script goes on.
    """
    vm = executor.guests.launched(step.vm)
    if not _may_run(executor, vm, "count"):
        return
    if not vm.running:
        raise StepFailed(f"{vm.name} does not run")
    if vm.every == 0:
        executor.none_under_way("counting would take its vCPU out of the guest")
    first = latest = _sample(executor, vm)

    def counted() -> bool:
        nonlocal latest
        latest = _sample(executor, vm)
        further = (now - then for now, then in zip(latest.each, first.each, strict=True))
        return min(further) >= step.ticks or bool(latest.ended)

    failure = ""
    try:
        executor.loop.wait(counted, step.within, f"{vm.name} to count {step.ticks}", look=LOOK_AGAIN)
    except TimedOut as late:
        failure = str(late)
    executor.write(
        Counted(
            t=executor.now(), vm=vm.name, agent=vm.vmm.name, step=executor.step, where=latest.where,
            ticks=latest.ticks, stale=latest.stale, ended=latest.ended,
            each=latest.each if len(latest.each) > 1 else (), first_ticks=latest.first_ticks,
            last_ticks=latest.last_ticks, sound=latest.sound,
        )
    )  # fmt: skip
    if failure:
        executor.guests.leave(vm)  # so that it is told where it was
        raise StepFailed(failure)


def look_at_paused(executor: Executor, vm: Guest) -> None:
    """Where a guest stands that is out and stays there."""
    found = _sample(executor, vm)
    executor.write(
        Counted(
            t=executor.now(), vm=vm.name, agent=vm.vmm.name, step=executor.step, where=found.where, ticks=found.ticks,
            stale=found.stale, ended=found.ended, each=found.each if len(found.each) > 1 else (), paused=True,
        )
    )  # fmt: skip


def _may_run(executor: Executor, vm: Guest, what: str) -> bool:
    able = executor.guests.may_run(vm)
    if not able:
        executor.note("skipped", f"SEV-ES guests cannot be entered on this host: {vm.name} does not {what}")
    return able


def _sample(executor: Executor, vm: Guest) -> m.Sampled:
    sampled = executor.vmms.ask(vm.vmm, m.Sample(vm=vm.name)).sampled
    assert sampled is not None
    return sampled
