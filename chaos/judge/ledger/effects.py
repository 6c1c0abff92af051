# SPDX-License-Identifier: Apache-2.0
"""What each operation makes of a world. What is written here is the promise (part 0 of the kernel contract,
docs/contract.md), not what a kernel does: whoever disagrees with every world has deviated.

Four tables hold the rules, by operation. `EFFECTS` says what becomes of the world once the operation has happened,
None if it cannot happen there; `HALFWAY` what may be seen while it is under way and has not happened yet; `OWED` which
charge it gives back only after it has happened; `ON_BEGIN` what is true from the moment it has begun. A rule for a new
operation is an entry in a table; the ledger (`chaos.judge.ledger.replay`) needs no change for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from errno import EFAULT

import msgspec

from chaos.history.reading import argument, levels, names, number
from chaos.history.records import Done, Invoke
from chaos.judge.ledger.world import (
    ON_CGROUPS,
    ON_ITS_WAY,
    Context,
    Extra,
    LedgerMirror,
    LedgerVm,
    Reference,
    Stage,
    World,
    arrived,
    give_back,
    gone,
    settled,
)

FIRST_CALL = {"init": "KVM_MEMORY_ENCRYPT_OP", "mirror": "KVM_ENABLE_CAP", "create_vcpu": "KVM_CREATE_VCPU"}
"""Of the operations that are several system calls, the one after which they have happened."""

MOST_SOURCES = 16  # of one loop of moves


def effect(world: World, invoke: Invoke) -> World | None:
    """The world after the operation, None if it cannot happen in this one."""
    if invoke.f not in ON_CGROUPS and invoke.f != "spawn" and world.home(invoke.agent) is None:
        return None
    rule = EFFECTS.get(invoke.f)
    return world if rule is None else rule(world, invoke)


def into_the_dead(world: World, invoke: Invoke) -> World | None:
    """The world after a move that succeeded though its destination is dead, None if it cannot have done that either.

    No promise allows it. But a kernel that asks whether a VM is dead before it takes its lock may let it happen
    (finding 0007), and then the context is there, and so is its charge.
    """
    vm = argument(invoke, "vm")
    if invoke.f != "move" or vm not in world.dead:
        return None
    before = replace(world, dead=world.dead - {vm}, references=world.references | {Reference(vm, invoke.agent)})
    after = effect(before, invoke)
    return None if after is None else replace(after, dead=after.dead | {vm})


def took_effect(invoke: Invoke, done: Done) -> bool:
    """Whether an operation that answered ok or fail has happened.

    `init` and `mirror` make the vCPUs as well. If it was one of those that was refused, the context is there, and
    charged.
    """
    call = done.value.get("call", "")
    first = FIRST_CALL.get(invoke.f)
    later = first is not None and isinstance(call, str) and call != "" and not call.startswith(first)
    return done.outcome == "ok" or (done.outcome == "fail" and later)


def told_too_late(done: Done) -> bool:
    """Whether it may have happened though it answered EFAULT. A SEV command copies its answer out last of all
    (sev_mem_enc_ioctl), and where a copy was made to fail nobody can say whether it was that one or one before."""
    command = str(done.value.get("call", "")).startswith("KVM_MEMORY_ENCRYPT_OP ")  # regions copy nothing out
    return command and done.errno == EFAULT and bool(done.value.get("struck"))


def halfway(world: World, invoke: Invoke) -> World | None:
    """The world while the operation is in its middle, None if it has none here."""
    rule = HALFWAY.get(invoke.f)
    return None if rule is None or world.home(invoke.agent) is None else rule(world, invoke)


def owing(world: World, invoke: Invoke) -> World | None:
    """The world once the operation has happened, with the charge that it has yet to give back; None if there is none
    to give back, or it cannot happen here."""
    owed = OWED.get(invoke.f)
    after = effect(world, invoke)
    left = None if owed is None or after is None else owed(world, after, invoke)
    if after is None or left is None:
        return None
    extra = Extra(invoke.op, invoke.agent, left.key, left.payer)
    return replace(after, extras=after.extras | {extra})


def begin(world: World, invoke: Invoke) -> World:
    """The world once the operation has begun."""
    rule = ON_BEGIN.get(invoke.f)
    return world if rule is None or world.home(invoke.agent) is None else rule(world, invoke)


def _spawn(world: World, invoke: Invoke) -> World | None:
    if world.home(invoke.agent) is not None:
        return None
    return replace(world, homes=world.homes | {(invoke.agent, argument(invoke, "cgroup"))})


def _enter(world: World, invoke: Invoke) -> World | None:
    """The process goes; what it is charged for stays where it is charged (P11)."""
    homes = frozenset((name, cgroup) for name, cgroup in world.homes if name != invoke.agent)
    return replace(world, homes=homes | {(invoke.agent, argument(invoke, "cgroup"))})


def _remove_cgroup(world: World, invoke: Invoke) -> World | None:
    """Charges stay with the removed cgroup, and its ancestors go on counting them."""
    name = argument(invoke, "cgroup")
    return _charged_to(world, lambda cgroup: gone(cgroup, name, invoke.op))


def _disable_misc(world: World, invoke: Invoke) -> World | None:
    """The children's charges stay where they are, as if they had been removed; what comes now is charged here."""
    above = argument(invoke, "cgroup")

    def now(cgroup: str) -> str:
        path, depth = levels(cgroup), len(levels(above))
        return gone(cgroup, path[depth], invoke.op) if path[:depth] == levels(above) != path else cgroup

    return replace(_charged_to(world, now), undivided=world.undivided | {above})


def _enable_misc(world: World, invoke: Invoke) -> World | None:
    return replace(world, undivided=world.undivided - {argument(invoke, "cgroup")})


def _charged_to(world: World, now: Callable[[str], str]) -> World:
    """The world with every charge under another name of its cgroup."""
    return replace(
        world,
        contexts=frozenset(replace(context, payer=now(context.payer)) for context in world.contexts),
        extras=frozenset(replace(extra, cgroup=now(extra.cgroup)) for extra in world.extras),
    )


def _create(world: World, invoke: Invoke) -> World | None:
    """An encrypted VM gets its vCPUs later: INIT and the mirror want none."""
    name, planned = argument(invoke, "vm"), number(invoke, "vcpus")
    created = planned if argument(invoke, "kind") == "plain" else 0
    vm = LedgerVm(name, invoke.agent, planned, created, number(invoke, "type"))
    return replace(
        world,
        references=world.references | {Reference(name, invoke.agent)},
        vms=frozenset(other for other in world.vms if other.name != name) | {vm},
        dead=world.dead - {name},
    )


def _with_vcpus(world: World, name: str) -> frozenset[LedgerVm]:
    """The VMs, once this one has got its vCPUs."""
    vm = world.vm(name)
    return world.vms if vm is None else world.vms - {vm} | {replace(vm, created=vm.planned)}


def _init(world: World, invoke: Invoke) -> World | None:
    vm, key, payer = argument(invoke, "vm"), argument(invoke, "key"), _payer(world, invoke)
    if payer is None or world.shared(vm) is not None or vm in world.dead or not world.open(vm):
        return None
    before = give_back(world, invoke.op)
    return replace(before, contexts=world.contexts | {Context(vm, key, payer)}, vms=_with_vcpus(world, vm))


def _halfway_init(world: World, invoke: Invoke) -> World | None:
    """Charged; whether there is an ASID, and a firmware, shows later."""
    payer = world.home(invoke.agent)
    if payer is None or _init(world, invoke) is None:
        return None
    return replace(world, extras=world.extras | {Extra(invoke.op, invoke.agent, argument(invoke, "key"), payer)})


def _payer(world: World, invoke: Invoke) -> str | None:
    """Who pays for what the operation makes: whoever was charged ahead, or else the cgroup it is made from."""
    ahead = (extra.cgroup for extra in world.extras if extra.op == invoke.op)
    return next(ahead, world.home(invoke.agent))


def _halfway_vcpu(world: World, invoke: Invoke) -> World | None:
    """Between created_vcpus and online_vcpus."""
    vm = world.vm(argument(invoke, "vm"))
    if vm is None or vm.name in world.dead or vm.creating is not None:
        return None
    return replace(world, vms=world.vms - {vm} | {replace(vm, creating=invoke.op)})


def _create_vcpu(world: World, invoke: Invoke) -> World | None:
    """A new vCPU of an encrypted VM has registers that are not encrypted yet."""
    vm = world.vm(argument(invoke, "vm"))
    if vm is None or vm.name in world.dead:
        return None
    creating = None if vm.creating == invoke.op else vm.creating
    return replace(
        world,
        vms=world.vms - {vm} | {replace(vm, created=vm.created + 1, creating=creating)},
        contexts=frozenset(replace(c, sealed=False) if c.owner == vm.name else c for c in world.contexts),
        mirrors=frozenset(replace(m, sealed=False) if m.vm == vm.name else m for m in world.mirrors),
    )


def _mirror(world: World, invoke: Invoke) -> World | None:
    """No ASID, no charge: the owner's context, which lives on as long as the mirror does."""
    vm, source = argument(invoke, "vm"), argument(invoke, "source")
    if world.shared(vm) is not None or vm in world.dead or not world.open(vm) or world.context(source) is None:
        return None
    if number(invoke, "flags"):
        return None
    return replace(world, mirrors=world.mirrors | {LedgerMirror(vm, source)}, vms=_with_vcpus(world, vm))


def _launch_start(world: World, invoke: Invoke) -> World | None:
    context = world.context(argument(invoke, "vm"))
    if context is None:
        return None
    started = replace(context, launched=True, launching=None, stage=Stage.UPDATE)
    return replace(world, contexts=world.contexts - {context} | {started})


def _staged(stage: Stage) -> Callable[[World, Invoke], World | None]:
    def rule(world: World, invoke: Invoke) -> World | None:
        context = world.context(argument(invoke, "vm"))
        if context is None:
            return None
        return replace(world, contexts=world.contexts - {context} | {replace(context, stage=stage)})

    return rule


def region(invoke: Invoke) -> str:
    """What the region of the operation goes by: its address, or the VM whose memory it is."""
    address = number(invoke, "address")
    return f"{address:#x}" if address else argument(invoke, "vm")


def _register_region(world: World, invoke: Invoke) -> World | None:
    context = world.context(argument(invoke, "vm"))
    if context is None:
        return None
    registered = replace(context, regions=tuple(sorted((*context.regions, region(invoke)))))
    return replace(world, contexts=world.contexts - {context} | {registered})


def _unregister_region(world: World, invoke: Invoke) -> World | None:
    """Whichever it was, where nobody recorded the address."""
    context, which = world.context(argument(invoke, "vm")), region(invoke)
    if context is None or not context.regions:
        return None
    regions = list(context.regions)
    regions.remove(which if which in regions else regions[0])
    return replace(world, contexts=world.contexts - {context} | {replace(context, regions=tuple(regions))})


def left_behind(world: World, invoke: Invoke, *, call: str = "") -> World:
    """The world after an operation that failed, by this of its system calls: what those before it have done stays."""
    if invoke.f != "launch_update_data" or call == "KVM_MEMORY_ENCRYPT_REG_REGION":
        return world
    return _register_region(world, invoke) or world


def _halfway_launch(world: World, invoke: Invoke) -> World | None:
    """The firmware knows the guest and has not bound it to its ASID."""
    context = world.context(argument(invoke, "vm"))
    if context is None or context.launched:
        return None
    return replace(world, contexts=world.contexts - {context} | {replace(context, launching=invoke.op)})


def _launch_update_vmsa(world: World, invoke: Invoke) -> World | None:
    vm = argument(invoke, "vm")
    context, mirror = world.context(vm), world.mirror(vm)
    if mirror is not None:
        return replace(world, mirrors=world.mirrors - {mirror} | {replace(mirror, sealed=True)})
    if context is None:
        return None
    return replace(world, contexts=world.contexts - {context} | {replace(context, sealed=True)})


def _command(world: World, invoke: Invoke) -> World | None:
    """Without data only these can do anything: the two INITs, and LAUNCH_UPDATE_VMSA."""
    match number(invoke, "id"):
        case 0:
            return _init(world, msgspec.structs.replace(invoke, args={**invoke.args, "key": "sev"}))
        case 1:
            return _init(world, msgspec.structs.replace(invoke, args={**invoke.args, "key": "sev_es"}))
        case 4:
            return _launch_update_vmsa(world, invoke)
    return world


def _send_fd(world: World, invoke: Invoke) -> World | None:
    vm, to = argument(invoke, "vm"), argument(invoke, "to") or ON_ITS_WAY
    if not world.open(vm) or Reference(vm, invoke.agent, lost=True) in world.references:
        return world  # what is no descriptor of a VM keeps nothing alive
    sent = Reference(vm, to, sent=True, into=world.peer(vm), going=to == ON_ITS_WAY)
    return replace(world, references=world.references | {sent})


def _begin_letting_go(world: World, invoke: Invoke) -> World:
    """What lies in the VM's socket goes with it, sometime before the operation is over."""
    lying = {reference for reference in arrived(world, invoke.agent, argument(invoke, "vm")) if not reference.taken}
    return _going(world, lying)


def _begin_close(world: World, invoke: Invoke) -> World:
    """So does what was taken out of it, if the VM is closed."""
    return _going(world, arrived(world, invoke.agent, argument(invoke, "vm")))


def _going(world: World, those: Iterable[Reference]) -> World:
    going = frozenset(replace(reference, going=True) for reference in those)
    return replace(world, references=world.references - frozenset(those) | going) if going else world


def _let_go(world: World, invoke: Invoke) -> World:
    """The VM has no socket any more, and whatever is known to have lain in it is closed."""
    vm = argument(invoke, "vm")
    closed = {reference for reference in arrived(world, invoke.agent, vm) if reference.going and reference.into == vm}
    peers = frozenset(pair for pair in world.peers if pair[0] != vm)
    return settled(replace(world, references=world.references - closed, peers=peers))


def _connect(world: World, invoke: Invoke) -> World:
    """Another socket in the place of the one before."""
    after = _let_go(world, invoke)
    return replace(after, peers=after.peers | {(argument(invoke, "vm"), argument(invoke, "peer"))})


def _receive_fd(world: World, invoke: Invoke) -> World:
    """Out of the socket, where it stays whatever becomes of that."""
    source = argument(invoke, "source")
    lying = frozenset(r for r in arrived(world, invoke.agent, argument(invoke, "vm")) if r.vm == source)
    return replace(world, references=world.references - lying | {replace(r, taken=True, going=False) for r in lying})


def _movable(world: World, invoke: Invoke) -> bool:
    """Whether the move's destination can take a context, and its source has one or is a mirror of one. A move that is
    given no VM has no source."""
    destination = argument(invoke, "vm")
    takes = destination not in world.dead and world.shared(destination) is None and world.open(destination)
    return takes and not number(invoke, "flags") and world.shared(argument(invoke, "source")) is not None


def _begin_move(world: World, invoke: Invoke) -> World:
    """The call holds both files, however it came by the source's descriptor. One that arrived is closed after it, and
    if that was on its way, it has arrived."""
    source, vm = argument(invoke, "source"), argument(invoke, "vm")
    return _held_by(world, invoke, {source, vm}, [source] if source != vm else [])


def _begin_moves(world: World, invoke: Invoke) -> World:
    """The descriptors are there for as long as the loop lasts."""
    vm, sources = argument(invoke, "vm"), names(invoke, "sources")
    return _held_by(world, invoke, {vm, *sources}, [source for source in sources if source != vm])


def _held_by(world: World, invoke: Invoke, vms: Iterable[str], taken: Iterable[str]) -> World:
    """The operation holds the files of the VMs, of `taken` by descriptors that were sent for it, where any were."""
    references, agent = world.references, invoke.agent
    lying = {*arrived(world, agent, argument(invoke, "vm")), *arrived(world, ON_ITS_WAY, "")}
    used = frozenset(r for r in lying if r.vm in set(taken))
    held = {Reference(vm, agent, op=invoke.op) for vm in vms if world.open(vm)}
    held |= {Reference(r.vm, agent, sent=True, op=invoke.op, into=argument(invoke, "vm"), going=r.going) for r in used}
    return replace(world, references=references - used | held)


def attempts(invoke: Invoke) -> tuple[Invoke, ...]:
    """The moves that a loop may make, none of any other operation. Each can succeed once: then its source is dead.

    Those that did are recorded by themselves. So this is what may have happened while nobody knows yet, or for good if
    the loop was killed. That one which fails may have been charged ahead is left out: nothing reads the counters then.
    """
    if invoke.f != "moves":
        return ()
    vm, sources = argument(invoke, "vm"), sorted({*names(invoke, "sources")} - {argument(invoke, "vm")})
    first = -(invoke.op * MOST_SOURCES + 1)
    return tuple(
        msgspec.structs.replace(invoke, f="attempt", op=first - number, args={"vm": vm, "source": source})
        for number, source in enumerate(sources)
    )


def _halfway_move(world: World, invoke: Invoke) -> World | None:
    """The destination's cgroup is charged before the source's is not ("known limits" of the contract). A mirror has
    no charge to take along."""
    context, payer = world.context(argument(invoke, "source")), world.home(invoke.agent)
    if context is None or payer is None or not _movable(world, invoke):
        return None
    ahead = Extra(invoke.op, invoke.agent, context.key, payer, charged=payer != context.payer)
    return replace(world, extras=world.extras | {ahead})


def _move(world: World, invoke: Invoke) -> World | None:
    source, destination, payer = argument(invoke, "source"), argument(invoke, "vm"), _payer(world, invoke)
    if payer is None or not _movable(world, invoke):
        return None
    context, mirror = world.context(source), world.mirror(source)
    contexts, mirrors = world.contexts, world.mirrors
    if context is not None:
        contexts = contexts - {context} | {replace(context, owner=destination, payer=payer)}
        mirrors = frozenset(replace(m, owner=destination) if m.owner == source else m for m in mirrors)
    if mirror is not None:
        mirrors = mirrors - {mirror} | {replace(mirror, vm=destination)}
    return settled(
        replace(
            world,
            contexts=contexts,
            mirrors=mirrors,
            dead=world.dead | {source},
            extras=frozenset(extra for extra in world.extras if extra.op != invoke.op),
        )
    )


def _close(world: World, invoke: Invoke) -> World | None:
    vm = argument(invoke, "vm")
    own = {Reference(vm, invoke.agent, lost=lost) for lost in (False, True)}
    return _let_go(replace(world, references=world.references - own), invoke)


def _lose_fd(world: World, invoke: Invoke) -> World | None:
    """Without its own descriptor the VM lives as long as one of a vCPU is open."""
    name, which = argument(invoke, "vm"), argument(invoke, "fd")
    if which == "sev":
        return replace(world, cut_off=world.cut_off | {invoke.agent})
    vm, mine = world.vm(name), Reference(name, invoke.agent)
    if which != "vm" or mine not in world.references:
        return world
    kept = {Reference(name, invoke.agent, lost=True)} if vm is not None and vm.created else set()
    return settled(replace(world, references=world.references - {mine} | kept))


def _irqfd(world: World, invoke: Invoke) -> World | None:
    bound = {(argument(invoke, "vm"), number(invoke, "gsi"))}
    return replace(world, irqfds=world.irqfds | bound if number(invoke, "assign") else world.irqfds - bound)


def _ioeventfd(world: World, invoke: Invoke) -> World | None:
    bound = {(argument(invoke, "vm"), number(invoke, "port"))}
    return replace(world, ioeventfds=world.ioeventfds | bound if number(invoke, "assign") else world.ioeventfds - bound)


def _owed_by_move(world: World, after: World, invoke: Invoke) -> Context | None:
    """The context as it was charged to the source's cgroup; within one cgroup nothing changes hands."""
    was, now = world.context(argument(invoke, "source")), after.context(argument(invoke, "vm"))
    return was if was is not None and now is not None and was.payer != now.payer else None


def _owed_by_close(world: World, after: World, invoke: Invoke) -> Context | None:
    """The context that went with its last reference: decommissioned first, uncharged then."""
    return next(iter(world.contexts - after.contexts), None)


EFFECTS: dict[str, Callable[[World, Invoke], World | None]] = {
    "spawn": _spawn,
    "enter": _enter,
    "remove_cgroup": _remove_cgroup,
    "disable_misc": _disable_misc,
    "enable_misc": _enable_misc,
    "create": _create,
    "create_vcpu": _create_vcpu,
    "init": _init,
    "command": _command,
    "mirror": _mirror,
    "launch_start": _launch_start,
    "launch_update_data": _register_region,
    "launch_update_vmsa": _launch_update_vmsa,
    "launch_measure": _staged(Stage.SECRET),
    "launch_finish": _staged(Stage.RUNNING),
    "register_region": _register_region,
    "unregister_region": _unregister_region,
    "send_fd": _send_fd,
    "receive_fd": _receive_fd,
    "listen": _connect,
    "connect": _connect,
    "commit": _let_go,  # which disconnected in older runs; nothing lies in the socket any more
    "confirm": _let_go,
    "disconnect": _let_go,
    "move": _move,
    "moves": lambda world, invoke: world,
    "attempt": _move,
    "close": _close,
    "lose_fd": _lose_fd,
    "irqfd": _irqfd,
    "ioeventfd": _ioeventfd,
}

HALFWAY: dict[str, Callable[[World, Invoke], World | None]] = {
    "init": _halfway_init,
    "launch_start": _halfway_launch,
    "move": _halfway_move,
    "create_vcpu": _halfway_vcpu,
}

OWED: dict[str, Callable[[World, World, Invoke], Context | None]] = {"move": _owed_by_move, "close": _owed_by_close}

ON_BEGIN: dict[str, Callable[[World, Invoke], World]] = {
    "move": _begin_move,
    "moves": _begin_moves,
    "mirror": _begin_move,
    "listen": _begin_letting_go,
    "connect": _begin_letting_go,
    "commit": _begin_letting_go,
    "confirm": _begin_letting_go,
    "disconnect": _begin_letting_go,
    "close": _begin_close,
}
