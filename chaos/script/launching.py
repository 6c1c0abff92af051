# SPDX-License-Identifier: Apache-2.0
"""Steps that make VMs and end them."""

from __future__ import annotations

from chaos import steps as s
from chaos.experiment import Kind
from chaos.kvm.numbers import Policy
from chaos.migration import handover
from chaos.script.actor import Actor
from chaos.stage import Guest, Stage
from chaos.vmm import messages as m

_LAUNCH = ("init", "launch_start", "launch_update_data")


def launch(actor: Actor, step: s.Launch) -> None:
    stage, vm = actor.stage, actor.stage.guests[step.vm]
    stage.create(vm)
    if vm.spec.kind is Kind.PLAIN:
        return
    for name in (*_LAUNCH, "launch_update_vmsa") if vm.spec.kind is Kind.SEV_ES else _LAUNCH:
        stage.must(vm, _operation(stage, vm, name))
    if step.finish:
        _finish(stage, vm)


def create(actor: Actor, step: s.Create) -> None:
    actor.stage.create(actor.stage.guests[step.vm])


def call(actor: Actor, step: s.Call) -> None:
    vm = actor.stage.guest(step.vm)
    actor.begin(vm, _operation(actor.stage, vm, step.operation), wait=step.wait)


def finish(actor: Actor, step: s.Finish) -> None:
    _finish(actor.stage, actor.stage.guest(step.vm))


def mirror(actor: Actor, step: s.Mirror) -> None:
    """What the kernel refuses is an answer, also where the mirror's registers cannot be encrypted any more."""
    stage, owner, vm = actor.stage, actor.stage.guest(step.source), actor.stage.guests[step.vm]
    if not vm.created:
        stage.create(vm)
    if owner is not vm:
        handover.connect(stage, owner, vm)
        handover.send(stage, owner, vm)
    done = stage.do(vm, m.Mirror(vm=vm.name, source=owner.name))
    if done.outcome == "ok" and stage.is_es(owner):
        stage.do(vm, m.LaunchUpdateVmsa(vm=vm.name))


def close(actor: Actor, step: s.Close) -> None:
    vm = actor.stage.guest(step.vm)
    actor.free(vm)
    actor.stage.close(vm)


def _finish(stage: Stage, vm: Guest) -> None:
    stage.must(vm, m.LaunchMeasure(vm=vm.name))
    stage.must(vm, m.LaunchFinish(vm=vm.name))


def _operation(stage: Stage, vm: Guest, name: str) -> m.Operation:  # noqa: PLR0911 - a table
    match name:
        case "init":
            return m.Init(vm=vm.name, key=vm.spec.kind.key)
        case "launch_start":
            return m.LaunchStart(vm=vm.name, policy=Policy.ES if vm.spec.kind is Kind.SEV_ES else 0)
        case "launch_update_data":
            return m.LaunchUpdateData(vm=vm.name, lanes=stage.lanes[vm.spec.memory])
        case "launch_update_vmsa":
            return m.LaunchUpdateVmsa(vm=vm.name)
        case "launch_measure":
            return m.LaunchMeasure(vm=vm.name)
        case "launch_finish":
            return m.LaunchFinish(vm=vm.name)
    return m.Status(vm=vm.name)
