# SPDX-License-Identifier: Apache-2.0
"""One possible world of a run, and what each operation makes of it.

A world says who owns each encryption context, under which key it is charged and which cgroup pays, which processes
live and which VMs they hold open. It is a value: an operation makes a new one. What is written here is the promise
(part 0 of the kernel contract), not what a kernel does: whoever disagrees with every world has deviated.

Three tables hold the rules, by operation. `EFFECTS` says what becomes of the world once the operation has happened,
None if it cannot happen there; `HALFWAY` what may be seen while it is under way and has not happened yet; `ON_BEGIN`
what is true from the moment it has begun. A rule for a new operation is an entry in a table; the ledger
(`chaos.ledger`) needs no change for it.

The life of a context hangs on references. A VM lives as long as a process has it open (the process that created it, or
one that its descriptor was sent to), or a move of its context is under way: the system call holds both files, whoever
closes what meanwhile. A mirror shares the context of its owner: it has no ASID and pays nothing, and it keeps its owner
alive, and with it the context and its charge, until it goes itself. The context goes with the last VM that owns it, and
its charge goes with the context. A descriptor that was sent may be closed by its receiver at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from chaos.history import Done, Invoke

ON_ITS_WAY = ""
"""Holder of a descriptor that has left its process and has not been used yet by whoever received it."""

GONE = " (removed)"
"""In the name of a cgroup that was removed, or whose misc controller was; no living one has it."""

ON_CGROUPS = frozenset({"add_cgroup", "remove_cgroup", "limit", "disable_misc", "enable_misc"})
"""Operations on cgroups. Nobody living has to make them, and they let nothing go that is stopped in the kernel."""

FIRST_CALL = {"init": "KVM_MEMORY_ENCRYPT_OP", "mirror": "KVM_ENABLE_CAP"}
"""Of the operations that are several system calls, the one after which they have happened."""


@dataclass(frozen=True, slots=True)
class Context:
    """An encryption context: an ASID, the VM that owns it, and the cgroup that pays for it under `key`.

    `launched` once the firmware knows it (LAUNCH_START), which is later than its charge (INIT). `sealed` once the
    registers of its owner's vCPUs are encrypted (LAUNCH_UPDATE_VMSA, SEV-ES only).
    """

    owner: str
    key: str
    payer: str
    launched: bool = False
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Mirror:
    """`vm` runs in the context of the VM `owner`. `sealed` says of its own vCPUs what it says of a context's owner."""

    vm: str
    owner: str
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM that somebody has open, or that is dead. `agent` created it and is the only one that may ask it anything.
    It is to have `planned` vCPUs and has `created`; operation `creating` is making one more. KVM_CREATE_VM was given
    `type`."""

    name: str
    agent: str
    planned: int = 0
    created: int = 0
    type: int = 0
    creating: int | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """`agent` has descriptors of `vm` open; `sent` if they came from another process. With `op` it is the operation of
    that number that holds the file."""

    vm: str
    agent: str
    sent: bool = False
    op: int | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """A charge that the move `op` of `agent` has taken ahead for its destination."""

    op: int
    agent: str
    key: str
    cgroup: str


@dataclass(frozen=True, slots=True)
class World:
    """`homes` are the live processes, each with its cgroup. `dead` are the VMs a context was moved away from.
    `happened` are those operations that have taken effect without having answered. `undivided` are the cgroups whose
    children have no misc controller: to it, whoever lives below one is in it."""

    homes: frozenset[tuple[str, str]] = frozenset()
    references: frozenset[Reference] = frozenset()
    contexts: frozenset[Context] = frozenset()
    mirrors: frozenset[Mirror] = frozenset()
    vms: frozenset[Vm] = frozenset()
    dead: frozenset[str] = frozenset()
    advances: frozenset[Advance] = frozenset()
    happened: frozenset[int] = frozenset()
    undivided: frozenset[str] = frozenset()

    def home(self, agent: str) -> str | None:
        """The cgroup that pays for what the process takes, None if it does not live."""
        return next((self.payer(cgroup) for name, cgroup in self.homes if name == agent), None)

    def payer(self, cgroup: str) -> str:
        """The cgroup that is charged for those who live in this one."""
        return next((level for level in levels(cgroup) if level in self.undivided), cgroup)

    def context(self, vm: str) -> Context | None:
        return next((context for context in self.contexts if context.owner == vm), None)

    def mirror(self, vm: str) -> Mirror | None:
        return next((mirror for mirror in self.mirrors if mirror.vm == vm), None)

    def shared(self, vm: str) -> Context | None:
        """The context that the VM owns, or that it is a mirror of."""
        mirror = self.mirror(vm)
        return self.context(vm if mirror is None else mirror.owner)

    def vm(self, name: str) -> Vm | None:
        return next((vm for vm in self.vms if vm.name == name), None)

    @property
    def holders(self) -> frozenset[str]:
        """The VMs that are encrypted: owners of contexts and their mirrors."""
        return frozenset({context.owner for context in self.contexts} | {mirror.vm for mirror in self.mirrors})

    def open(self, vm: str) -> bool:
        """Whether any process has the VM open."""
        return any(reference.vm == vm for reference in self.references)

    def touched_by(self, op: int) -> bool:
        """Whether the operation has begun to have effects here, or has had all of them."""
        return op in self.happened or any(advance.op == op for advance in self.advances)

    @property
    def guests(self) -> int:
        """How many guests the firmware must count."""
        return sum(context.launched for context in self.contexts)

    @property
    def charges(self) -> Mapping[tuple[str, str], int]:
        """What (cgroup, key) must read, ancestors included; 0 where nothing is named."""
        total: Counter[tuple[str, str]] = Counter()
        paid = [(context.payer, context.key) for context in self.contexts]
        paid += [(advance.cgroup, advance.key) for advance in self.advances]
        for cgroup, key in paid:
            total.update((level, key) for level in levels(cgroup))
        return total


def levels(cgroup: str) -> tuple[str, ...]:
    """The cgroup and its ancestors, the run's own (".") first: a/b gives ".", "a", "a/b"."""
    if cgroup == ".":
        return (".",)
    parts = cgroup.split("/")
    return (".", *("/".join(parts[: depth + 1]) for depth in range(len(parts))))


def effect(world: World, invoke: Invoke) -> World | None:
    """The world after the operation, None if it cannot happen in this one."""
    if invoke.f not in ON_CGROUPS and invoke.f != "spawn" and world.home(invoke.agent) is None:
        return None
    rule = EFFECTS.get(invoke.f)
    return world if rule is None else rule(world, invoke)


def took_effect(invoke: Invoke, done: Done) -> bool:
    """Whether an operation that answered ok or fail has happened.

    `init` and `mirror` make the vCPUs as well. If it was one of those that was refused, the context is there, and
    charged.
    """
    call = done.value.get("call", "")
    first = FIRST_CALL.get(invoke.f)
    later = first is not None and isinstance(call, str) and call != "" and not call.startswith(first)
    return done.outcome == "ok" or (done.outcome == "fail" and later)


def halfway(world: World, invoke: Invoke) -> World | None:
    """The world while the operation is in its middle, None if it has none here."""
    rule = HALFWAY.get(invoke.f)
    return None if rule is None or world.home(invoke.agent) is None else rule(world, invoke)


def begin(world: World, invoke: Invoke) -> World:
    """The world once the operation has begun."""
    rule = ON_BEGIN.get(invoke.f)
    return world if rule is None or world.home(invoke.agent) is None else rule(world, invoke)


def give_back(world: World, op: int) -> World:
    """The operation has given back what it had taken ahead."""
    return replace(
        world,
        advances=frozenset(advance for advance in world.advances if advance.op != op),
        vms=frozenset(replace(vm, creating=None) if vm.creating == op else vm for vm in world.vms),
    )


def forget(world: World, op: int) -> World:
    """The world once the operation is over: nothing is taken ahead any more, and no file is held."""
    references = frozenset(reference for reference in world.references if reference.op != op)
    return _settled(replace(give_back(world, op), references=references, happened=world.happened - {op}))


def die(world: World, agent: str) -> World:
    """The process is gone, with its descriptors and what its operations had taken ahead."""
    homes = frozenset((name, cgroup) for name, cgroup in world.homes if name != agent)
    gone = {agent} if homes else {agent, ON_ITS_WAY}  # nobody is left to receive what is on its way
    return _settled(
        replace(
            world,
            homes=homes,
            references=frozenset(reference for reference in world.references if reference.agent not in gone),
            advances=frozenset(advance for advance in world.advances if advance.agent != agent),
        )
    )


def drop(world: World, reference: Reference) -> World:
    """The reference has been closed."""
    return _settled(replace(world, references=world.references - {reference}))


def argument(invoke: Invoke, key: str) -> str:
    """An argument of the operation that names something, "" if it is not there."""
    value = invoke.args.get(key)
    return value if isinstance(value, str) else ""


def number(invoke: Invoke, key: str) -> int:
    """An argument of the operation that counts something, 0 if it is not there."""
    value = invoke.args.get(key)
    return value if isinstance(value, int) else 0


def _settled(world: World) -> World:
    """Contexts whose VM nobody has open are gone, unless a mirror that somebody has open keeps it. References to dead
    VMs are dropped: they keep nothing alive."""
    references = frozenset(reference for reference in world.references if reference.vm not in world.dead)
    opened = {reference.vm for reference in references}
    mirrors = frozenset(mirror for mirror in world.mirrors if mirror.vm in opened)
    alive = opened | {mirror.owner for mirror in mirrors}
    return replace(
        world,
        references=references,
        mirrors=mirrors,
        contexts=frozenset(context for context in world.contexts if context.owner in alive),
        vms=frozenset(vm for vm in world.vms if vm.name in alive or vm.name in world.dead),
    )


def _spawn(world: World, invoke: Invoke) -> World | None:
    if world.home(invoke.agent) is not None:
        return None
    return replace(world, homes=world.homes | {(invoke.agent, argument(invoke, "cgroup"))})


def _enter(world: World, invoke: Invoke) -> World | None:
    """The process goes; what it is charged for stays where it is charged (P11)."""
    homes = frozenset((name, cgroup) for name, cgroup in world.homes if name != invoke.agent)
    return replace(world, homes=homes | {(invoke.agent, argument(invoke, "cgroup"))})


def gone(cgroup: str, name: str, op: int) -> str:
    """What `cgroup` is called after operation `op` has removed `name`: the same, unless it is that or below it."""
    at = levels(name)
    return f"{name}{GONE}{op}{cgroup[len(name) :]}" if levels(cgroup)[: len(at)] == at else cgroup


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
        advances=frozenset(replace(advance, cgroup=now(advance.cgroup)) for advance in world.advances),
    )


def _create(world: World, invoke: Invoke) -> World | None:
    """An encrypted VM gets its vCPUs later: INIT and the mirror want none."""
    name, planned = argument(invoke, "vm"), number(invoke, "vcpus")
    created = planned if argument(invoke, "kind") == "plain" else 0
    vm = Vm(name, invoke.agent, planned, created, number(invoke, "type"))
    return replace(
        world,
        references=world.references | {Reference(name, invoke.agent)},
        vms=frozenset(other for other in world.vms if other.name != name) | {vm},
        dead=world.dead - {name},
    )


def _with_vcpus(world: World, name: str) -> frozenset[Vm]:
    """The VMs, once this one has got its vCPUs."""
    vm = world.vm(name)
    return world.vms if vm is None else world.vms - {vm} | {replace(vm, created=vm.planned)}


def _init(world: World, invoke: Invoke) -> World | None:
    vm, payer = argument(invoke, "vm"), world.home(invoke.agent)
    if payer is None or world.shared(vm) is not None or vm in world.dead or not world.open(vm):
        return None
    context = Context(vm, argument(invoke, "key"), payer)
    return replace(world, contexts=world.contexts | {context}, vms=_with_vcpus(world, vm))


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
    return replace(world, mirrors=world.mirrors | {Mirror(vm, source)}, vms=_with_vcpus(world, vm))


def _launch_start(world: World, invoke: Invoke) -> World | None:
    context = world.context(argument(invoke, "vm"))
    if context is None:
        return None
    return replace(world, contexts=world.contexts - {context} | {replace(context, launched=True)})


def _launch_update_vmsa(world: World, invoke: Invoke) -> World | None:
    vm = argument(invoke, "vm")
    context, mirror = world.context(vm), world.mirror(vm)
    if mirror is not None:
        return replace(world, mirrors=world.mirrors - {mirror} | {replace(mirror, sealed=True)})
    if context is None:
        return None
    return replace(world, contexts=world.contexts - {context} | {replace(context, sealed=True)})


def _send_fd(world: World, invoke: Invoke) -> World | None:
    vm = argument(invoke, "vm")
    if vm in world.dead or not world.open(vm):
        return world  # a descriptor of a VM that owns nothing keeps nothing alive
    return replace(
        world, references=world.references | {Reference(vm, argument(invoke, "to") or ON_ITS_WAY, sent=True)}
    )


def _movable(world: World, invoke: Invoke) -> bool:
    """Whether the move's destination can take a context, and its source has one or is a mirror of one."""
    destination = argument(invoke, "vm")
    if destination in world.dead or world.shared(destination) is not None or not world.open(destination):
        return False
    return world.shared(argument(invoke, "source")) is not None


def _begin_move(world: World, invoke: Invoke) -> World:
    """The call holds both files, however it came by the source's descriptor. If that was on its way, it has arrived."""
    source = argument(invoke, "source")
    on_its_way = Reference(source, ON_ITS_WAY, sent=True)
    references = world.references
    if on_its_way in references:
        references = references - {on_its_way} | {Reference(source, invoke.agent, sent=True)}
    vms = [vm for vm in (source, argument(invoke, "vm")) if world.open(vm)]
    return replace(world, references=references | {Reference(vm, invoke.agent, op=invoke.op) for vm in vms})


def _halfway_move(world: World, invoke: Invoke) -> World | None:
    """The destination's cgroup is charged before the source's is not ("known limits" of the contract). A mirror has
    no charge to take along."""
    context, payer = world.context(argument(invoke, "source")), world.home(invoke.agent)
    if context is None or payer is None or payer == context.payer or not _movable(world, invoke):
        return None
    return replace(world, advances=world.advances | {Advance(invoke.op, invoke.agent, context.key, payer)})


def _move(world: World, invoke: Invoke) -> World | None:
    source, destination, payer = argument(invoke, "source"), argument(invoke, "vm"), world.home(invoke.agent)
    if payer is None or not _movable(world, invoke):
        return None
    payer = next((advance.cgroup for advance in world.advances if advance.op == invoke.op), payer)
    context, mirror = world.context(source), world.mirror(source)
    contexts, mirrors = world.contexts, world.mirrors
    if context is not None:
        contexts = contexts - {context} | {replace(context, owner=destination, payer=payer)}
        mirrors = frozenset(replace(m, owner=destination) if m.owner == source else m for m in mirrors)
    if mirror is not None:
        mirrors = mirrors - {mirror} | {replace(mirror, vm=destination)}
    return _settled(
        replace(
            world,
            contexts=contexts,
            mirrors=mirrors,
            dead=world.dead | {source},
            advances=frozenset(advance for advance in world.advances if advance.op != invoke.op),
        )
    )


def _close(world: World, invoke: Invoke) -> World | None:
    vm = argument(invoke, "vm")
    mine = {Reference(vm, invoke.agent, sent) for sent in (False, True)}
    return _settled(replace(world, references=world.references - mine))


EFFECTS: dict[str, Callable[[World, Invoke], World | None]] = {
    "spawn": _spawn,
    "enter": _enter,
    "remove_cgroup": _remove_cgroup,
    "disable_misc": _disable_misc,
    "enable_misc": _enable_misc,
    "create": _create,
    "create_vcpu": _create_vcpu,
    "init": _init,
    "mirror": _mirror,
    "launch_start": _launch_start,
    "launch_update_vmsa": _launch_update_vmsa,
    "send_fd": _send_fd,
    "move": _move,
    "close": _close,
}

HALFWAY: dict[str, Callable[[World, Invoke], World | None]] = {"move": _halfway_move, "create_vcpu": _halfway_vcpu}

ON_BEGIN: dict[str, Callable[[World, Invoke], World]] = {"move": _begin_move, "mirror": _begin_move}
