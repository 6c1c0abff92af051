# SPDX-License-Identifier: Apache-2.0
"""Steps that make VMs and end them."""

from __future__ import annotations

import msgspec

from chaos.experiment import steps as s
from chaos.experiment.model import default_command, key_of_init
from chaos.kinds import Kind
from chaos.kvm.numbers import Policy
from chaos.runner.guests import Guest, Guests
from chaos.runner.script.executor import Executor
from chaos.vmm import messages as m

_LAUNCH = ("launch_start", "launch_update_data")


def launch(executor: Executor, step: s.LaunchStep) -> None:
    guests, vm = executor.guests, executor.guests[step.vm]
    guests.create(vm)
    if vm.spec.kind is Kind.PLAIN:
        return
    guests.must(vm, _init(vm, s.InitStep(vm=step.vm)))
    for name in (*_LAUNCH, "launch_update_vmsa") if vm.spec.kind is Kind.SEV_ES else _LAUNCH:
        guests.must(vm, _operation(guests, vm, name, vm.address))
    if step.finish:
        _finish(guests, vm)


def create(executor: Executor, step: s.CreateStep) -> None:
    executor.guests.create(executor.guests[step.vm])


def call(executor: Executor, step: s.CallStep) -> None:
    vm = executor.guests.launched(step.vm)
    memory = executor.guests.launched(step.of) if step.of is not None else vm
    do = _operation(executor.guests, vm, step.operation, memory.address, read_only=step.read_only)
    executor.begin(vm, do, wait=step.wait)


def init(executor: Executor, step: s.InitStep) -> None:
    vm = executor.guests.launched(step.vm)
    if step.each is None:
        executor.begin(vm, _init(vm, step), wait=step.wait)
        return
    for bit in range(32 if step.each == "flags" else 64):
        executor.begin(vm, msgspec.structs.replace(_init(vm, step), **{step.each: 1 << bit}), wait=True)


def vcpu(executor: Executor, step: s.VcpuStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.begin(vm, m.AddVcpu(vm=vm.name, id=step.id), wait=step.wait)


def command(executor: Executor, step: s.CommandStep) -> None:
    vm = executor.guests.launched(step.vm)
    for number in step.numbers:
        executor.begin(vm, m.Command(vm=vm.name, id=number), wait=True)


def debug(executor: Executor, step: s.DebugStep) -> None:
    """What the kernel or the firmware refuses is an answer."""
    vm = executor.guests.launched(step.vm)
    make = m.Encrypt if step.operation == "dbg_encrypt" else m.Decrypt
    for read_at, write_at, length in step.each:
        do = make(vm=vm.name, read_at=read_at, write_at=write_at, length=length)
        executor.begin(vm, do, wait=True)


def platform(executor: Executor, step: s.PlatformStep) -> None:
    """The same."""
    do = m.AskPlatform(command=step.command, length=step.length, chain=step.chain)
    executor.vmms.do(executor.vmms[step.vmm], do)


def finish(executor: Executor, step: s.FinishStep) -> None:
    _finish(executor.guests, executor.guests.launched(step.vm))


def mirror(executor: Executor, step: s.MirrorStep) -> None:
    """What the kernel refuses is an answer, also where the mirror's registers cannot be encrypted any more."""
    guests, vm = executor.guests, executor.guests[step.vm]
    if not vm.created:
        guests.create(vm)
    executor.provide(vm, step.source)
    done = guests.do(vm, m.Mirror(vm=vm.name, source=step.source or "", fd=step.fd or "", flags=step.flags))
    if done.outcome == "ok" and vm.spec.vcpus and guests.is_es(vm):
        guests.do(vm, m.LaunchUpdateVmsa(vm=vm.name))


def close(executor: Executor, step: s.CloseStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.free(vm)
    if step.wait:
        executor.guests.close(vm)
    else:
        executor.guests.close_aside(vm)


def _finish(guests: Guests, vm: Guest) -> None:
    guests.must(vm, m.LaunchMeasure(vm=vm.name))
    guests.must(vm, m.LaunchFinish(vm=vm.name))


def _init(vm: Guest, step: s.InitStep) -> m.Init:
    command = step.command or default_command(vm.spec)
    return m.Init(
        vm=vm.name, key=key_of_init(vm.spec, command), command=command, flags=step.flags, features=step.features,
        ghcb=step.ghcb,
    )  # fmt: skip


def _operation(  # noqa: PLR0911 - a table
    guests: Guests, vm: Guest, name: str, address: int, *, read_only: bool = False
) -> m.Operation:
    """`address` is that of the memory which the operation is about. `read_only` is for LAUNCH_START alone."""
    match name:
        case "launch_start":
            policy = Policy.ES if vm.spec.kind is Kind.SEV_ES else 0
            return m.LaunchStart(vm=vm.name, policy=policy, read_only=read_only)
        case "launch_update_data":
            return m.LaunchUpdateData(vm=vm.name, lanes=guests.lanes[vm.spec.memory], address=address)
        case "launch_update_vmsa":
            return m.LaunchUpdateVmsa(vm=vm.name)
        case "launch_measure":
            return m.LaunchMeasure(vm=vm.name)
        case "launch_finish":
            return m.LaunchFinish(vm=vm.name)
        case "register_region":
            return m.RegisterRegion(vm=vm.name, address=address)
        case "unregister_region":
            return m.UnregisterRegion(vm=vm.name, address=address)
    return m.Status(vm=vm.name)
