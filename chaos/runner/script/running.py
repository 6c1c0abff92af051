# SPDX-License-Identifier: Apache-2.0
"""Steps that let a guest run and see how far it has come, and storms on its descriptors."""

from __future__ import annotations

from chaos.experiment import steps as s
from chaos.history.records import Counted
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.runner.guests import Guest
from chaos.runner.script.executor import Actor
from chaos.runner.vmms import StepFailed
from chaos.vmm import messages as m


def run(actor: Actor, step: s.Run) -> None:
    vm = actor.stage.guest(step.vm)
    if _may_run(actor, vm, "run"):
        actor.stage.enter(vm, step.every)


def pause(actor: Actor, step: s.Pause) -> None:
    actor.stage.leave(actor.stage.guest(step.vm))


def count(actor: Actor, step: s.Count) -> None:
    """Of a guest that never leaves, the vCPU has to be taken out to read its counter: not while a move waits.

    A guest that stops by itself is an answer like a refused operation, and the script goes on.
    """
    vm = actor.stage.guest(step.vm)
    if not _may_run(actor, vm, "count"):
        return
    if not vm.running:
        raise StepFailed(f"{vm.name} does not run")
    if vm.every == 0:
        actor.none_under_way("counting would take its vCPU out of the guest")
    first = latest = _sample(actor, vm)

    def counted() -> bool:
        nonlocal latest
        latest = _sample(actor, vm)
        further = (now - then for now, then in zip(latest.each, first.each, strict=True))
        return min(further) >= step.ticks or bool(latest.ended)

    failure = ""
    try:
        actor.stage.fleet.loop.wait(counted, step.within, f"{vm.name} to count {step.ticks}", look=LOOK_AGAIN)
    except TimedOut as late:
        failure = str(late)
    actor.write(
        Counted(
            t=actor.now(), vm=vm.name, agent=vm.vmm.name, step=actor.step, where=latest.where,
            ticks=latest.ticks, stale=latest.stale, ended=latest.ended,
            each=latest.each if len(latest.each) > 1 else (), first_ticks=latest.first_ticks,
            last_ticks=latest.last_ticks, sound=latest.sound,
        )
    )  # fmt: skip
    if failure:
        actor.stage.leave(vm)  # so that it is told where it was
        raise StepFailed(failure)


def storm(actor: Actor, step: s.Storm) -> None:
    actor.stage.storm(actor.stage.guest(step.vm), step.calls, step.threads)


def calm(actor: Actor, step: s.Calm) -> None:
    actor.stage.calm(actor.stage.guest(step.vm))


def _may_run(actor: Actor, vm: Guest, what: str) -> bool:
    able = actor.stage.may_run(vm)
    if not able:
        actor.note("skipped", f"SEV-ES guests cannot be entered on this host: {vm.name} does not {what}")
    return able


def _sample(actor: Actor, vm: Guest) -> m.Sampled:
    sampled = actor.stage.fleet.ask(vm.vmm, m.Sample(vm=vm.name)).sampled
    assert sampled is not None
    return sampled
