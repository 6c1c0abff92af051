# SPDX-License-Identifier: Apache-2.0
"""Steps that make VMs and end them."""

from __future__ import annotations

import msgspec

from chaos.experiment import steps as s
from chaos.experiment.model import default_command, key_of_init
from chaos.kinds import Kind
from chaos.kvm.numbers import Policy
from chaos.runner.guests import Guest, Stage
from chaos.runner.script.executor import Actor
from chaos.vmm import messages as m

_LAUNCH = ("launch_start", "launch_update_data")


def launch(actor: Actor, step: s.Launch) -> None:
    stage, vm = actor.stage, actor.stage.guests[step.vm]
    stage.create(vm)
    if vm.spec.kind is Kind.PLAIN:
        return
    stage.must(vm, _init(vm, s.Init(vm=step.vm)))
    for name in (*_LAUNCH, "launch_update_vmsa") if vm.spec.kind is Kind.SEV_ES else _LAUNCH:
        stage.must(vm, _operation(stage, vm, name))
    if step.finish:
        _finish(stage, vm)


def create(actor: Actor, step: s.Create) -> None:
    actor.stage.create(actor.stage.guests[step.vm])


def call(actor: Actor, step: s.Call) -> None:
    vm = actor.stage.guest(step.vm)
    actor.begin(vm, _operation(actor.stage, vm, step.operation), wait=step.wait)


def init(actor: Actor, step: s.Init) -> None:
    vm = actor.stage.guest(step.vm)
    if step.each is None:
        actor.begin(vm, _init(vm, step), wait=step.wait)
        return
    for bit in range(32 if step.each == "flags" else 64):
        actor.begin(vm, msgspec.structs.replace(_init(vm, step), **{step.each: 1 << bit}), wait=True)


def vcpu(actor: Actor, step: s.Vcpu) -> None:
    vm = actor.stage.guest(step.vm)
    actor.begin(vm, m.CreateVcpu(vm=vm.name, id=step.id), wait=step.wait)


def command(actor: Actor, step: s.Command) -> None:
    vm = actor.stage.guest(step.vm)
    for number in step.numbers:
        actor.begin(vm, m.Command(vm=vm.name, id=number), wait=True)


def finish(actor: Actor, step: s.Finish) -> None:
    _finish(actor.stage, actor.stage.guest(step.vm))


def mirror(actor: Actor, step: s.Mirror) -> None:
    """What the kernel refuses is an answer, also where the mirror's registers cannot be encrypted any more."""
    stage, vm = actor.stage, actor.stage.guests[step.vm]
    if not vm.created:
        stage.create(vm)
    actor.provide(vm, step.source)
    done = stage.do(vm, m.Mirror(vm=vm.name, source=step.source or "", fd=step.fd or "", flags=step.flags))
    if done.outcome == "ok" and vm.spec.vcpus and stage.is_es(vm):
        stage.do(vm, m.LaunchUpdateVmsa(vm=vm.name))


def close(actor: Actor, step: s.Close) -> None:
    vm = actor.stage.guest(step.vm)
    actor.free(vm)
    if step.wait:
        actor.stage.close(vm)
    else:
        actor.stage.close_aside(vm)


def _finish(stage: Stage, vm: Guest) -> None:
    stage.must(vm, m.LaunchMeasure(vm=vm.name))
    stage.must(vm, m.LaunchFinish(vm=vm.name))


def _init(vm: Guest, step: s.Init) -> m.Init:
    command = step.command or default_command(vm.spec)
    return m.Init(
        vm=vm.name, key=key_of_init(vm.spec, command), command=command, flags=step.flags, features=step.features,
        ghcb=step.ghcb,
    )  # fmt: skip


def _operation(stage: Stage, vm: Guest, name: str) -> m.Operation:  # noqa: PLR0911 - a table
    match name:
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
        case "register_region":
            return m.RegisterRegion(vm=vm.name)
        case "unregister_region":
            return m.UnregisterRegion(vm=vm.name)
    return m.Status(vm=vm.name)
