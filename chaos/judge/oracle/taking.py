# SPDX-License-Identifier: Apache-2.0
"""The same of the operations that take another VM's context, a move and a mirror. See `chaos.judge.oracle.rules`."""

from __future__ import annotations

from errno import EBADF, EBUSY, EINVAL

from chaos.history.reading import argument, number
from chaos.history.records import Invoke
from chaos.judge.oracle.state import ES, Refusal, State, charge, maybe, sure


def flagged(state: State, op: Invoke) -> Refusal | None:
    """[0b] KVM_ENABLE_CAP has no flags."""
    return sure(EINVAL, when=number(op, "flags") != 0)


def source_descriptor(state: State, op: Invoke) -> Refusal | None:
    """[1] The source's descriptor is there, and a VM's. One that arrived is there until it was used or its receiver let
    go of it; of one that is going, or that nobody recorded, nobody can say."""
    source, world = argument(op, "source"), state.world
    if world.given(source, op.agent, argument(op, "vm")):
        return None
    return maybe(EBADF, when=True) if world.open(source) else sure(EBADF, when=True)


def itself(state: State, op: Invoke) -> Refusal | None:
    """[2] Before anything is asked about encryption (sev_lock_two_vms)."""
    return sure(EINVAL, when=argument(op, "vm") == argument(op, "source"))


def busy(state: State, op: Invoke) -> Refusal | None:
    """[3, 4] Another move or mirror of either VM is under way. Whether it has its flags just now, nobody can say,
    unless it was seen to be stopped with them."""
    if state.flags_free:
        return None
    vms = {argument(op, "vm"), argument(op, "source")}
    others = {r.op for r in state.world.references if r.vm in vms and r.op is not None and r.op != op.op}
    return sure(EBUSY, when=True) if others & state.marked else maybe(EBUSY, when=bool(others))


def types_differ(state: State, op: Invoke) -> Refusal | None:
    """[6] Only where there are types to differ."""
    ends = [state.world.vm(argument(op, end)) for end in ("vm", "source")]
    types = {vm.type for vm in ends if vm is not None}
    return sure(EINVAL, when=state.rules.vm_types and len(types) > 1)


def not_movable(state: State, op: Invoke) -> Refusal | None:
    """[6] The destination is encrypted already, or the source is not: it never was, or a move took it away."""
    holders = state.world.holders
    return sure(EINVAL, when=argument(op, "vm") in holders or argument(op, "source") not in holders)


def has_mirrors(state: State, op: Invoke) -> Refusal | None:
    """Before 5.18 a source with mirrors stayed where it was (17d44a96f000)."""
    mirrored = any(mirror.owner == argument(op, "source") for mirror in state.world.mirrors)
    return sure(EBUSY, when=mirrored and not state.rules.mirrored_source_moves)


def charge_of_move(state: State, op: Invoke) -> Refusal | None:
    """[7, 8] The caller's cgroup pays from now on, under the key of the context. A mirror has no charge (P2)."""
    context, payer = state.world.context(argument(op, "source")), state.world.home(op.agent)
    if context is None or payer is None or payer == context.payer or charged_ahead(state, op):
        return None
    answer = charge(state, payer, context.key)
    return Refusal(answer) if answer.errno else None


def charged_ahead(state: State, op: Invoke) -> bool:
    return any(extra.op == op.op for extra in state.world.extras)


def vcpu_creation(state: State, op: Invoke) -> Refusal | None:
    """[10] A vCPU of either VM is half made (sev_check_source_vcpus). Whether it still is, nobody can say, unless it
    was seen to be stopped so."""
    if state.rules.vcpu_creation_locked or not state.rules.vcpu_creation_busy:
        return None
    ends = [state.world.vm(argument(op, end)) for end in ("vm", "source")]
    creating = {vm.creating for vm in ends if vm is not None and vm.creating is not None}
    return sure(EBUSY, when=True) if creating & state.half else maybe(EBUSY, when=bool(creating))


def vcpus_differ(state: State, op: Invoke) -> Refusal | None:
    """[11] Only SEV-ES: registers are handed over vCPU by vCPU."""
    source, destination = state.world.vm(argument(op, "source")), state.world.vm(argument(op, "vm"))
    if not is_es(state, argument(op, "source")) or source is None or destination is None:
        return None
    differ = source.created != destination.created
    half = source.creating is not None or destination.creating is not None
    return maybe(EINVAL, when=True) if half else sure(EINVAL, when=differ)


def unsealed(state: State, op: Invoke) -> Refusal | None:
    """[12] Only SEV-ES: some vCPU of the source has had no LAUNCH_UPDATE_VMSA."""
    source = argument(op, "source")
    context, mirror, vm = state.world.context(source), state.world.mirror(source), state.world.vm(source)
    if not is_es(state, source) or vm is None or vm.created == 0:
        return None
    sealed = mirror.sealed if mirror is not None else context is not None and context.sealed
    return sure(EINVAL, when=not sealed)


def is_es(state: State, vm: str) -> bool:
    context = state.world.shared(vm)
    return context is not None and context.key == ES


def not_mirrorable(state: State, op: Invoke) -> Refusal | None:
    """The target is encrypted or has vCPUs, the source is not encrypted or a mirror itself (part 1.8)."""
    world, target, source = state.world, argument(op, "vm"), argument(op, "source")
    vm = world.vm(target)
    no_source = world.context(source) is None
    return sure(EINVAL, when=target in world.holders or no_source or (vm is not None and vm.created > 0))
