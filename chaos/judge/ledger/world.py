# SPDX-License-Identifier: Apache-2.0
"""One possible world of a run.

A world says who owns each encryption context, under which key it is charged and which cgroup pays, which processes
live and which VMs they hold open. It is a value: an operation makes a new one (`chaos.judge.ledger.effects`).

The life of a context hangs on references. A VM lives as long as a process has it open (the process that created it, or
one that its descriptor was sent to), or a move of its context is under way: the system call holds both files, whoever
closes what meanwhile. A mirror shares the context of its owner: it has no ASID and pays nothing, and it keeps its owner
alive, and with it the context and its charge, until it goes itself. The context goes with the last VM that owns it, and
its charge goes with the context.

A descriptor that was sent lies in the socket of the VM that it was sent to, or has been taken out of there, until the
move or mirror that it is for is over. It goes earlier if its receiver lets go of the other end, or is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from chaos.history.reading import levels


class Reach(Enum):
    """How far an operation has come in a world. AHEAD: it has not happened, and may still fail, but something of it can
    be seen, such as the charge that it takes first. OWING: it has happened, and a charge is still to be given back."""

    BEFORE = "before"
    AHEAD = "ahead"
    OWING = "owing"
    AFTER = "after"


class Stage(Enum):
    """A guest's states in the firmware, as far as a launch takes it (part 3.3 of the contract)."""

    UPDATE = "launch-update"
    SECRET = "launch-secret"
    RUNNING = "running"


ON_ITS_WAY = ""
"""Holder of a descriptor that has left its process and has not been used yet by whoever received it."""

GONE = " (removed)"
"""In the name of a cgroup that was removed, or whose misc controller was; no living one has it."""

ON_CGROUPS = frozenset({"add_cgroup", "remove_cgroup", "limit", "disable_misc", "enable_misc"})
"""Operations on cgroups, which nobody living has to make."""

STILL = ON_CGROUPS | {"enter", "memlock", "storage", "signal", "reload"}
"""Operations that let nothing go that is stopped in the kernel."""


@dataclass(frozen=True, slots=True)
class Context:
    """An encryption context: an ASID, the VM that owns it, and the cgroup that pays for it under `key`.

    `launched` once the firmware knows it (LAUNCH_START), which is later than its charge (INIT); `launching` is the
    operation that has made it known and may yet have to take that back. `stage` is how far the firmware has taken the
    launch since. `sealed` once the registers of its owner's vCPUs are encrypted (LAUNCH_UPDATE_VMSA, SEV-ES only).
    `regions` are those that are registered, each as often as it is: its address, or where nobody recorded that, the VM
    whose memory it is.
    """

    owner: str
    key: str
    payer: str
    launched: bool = False
    sealed: bool = False
    launching: int | None = None
    stage: Stage = Stage.UPDATE
    regions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerMirror:
    """`vm` runs in the context of the VM `owner`. `sealed` says of its own vCPUs what it says of a context's owner."""

    vm: str
    owner: str
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class LedgerVm:
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
    that number that holds the file. If its own is `lost`, those of the vCPUs keep the VM.

    One that was sent was sent to the VM `into`, "" if nobody recorded to which of its process; it lies in that VM's
    socket until it is `taken` out, and may be closed at any time if it is `going`."""

    vm: str
    agent: str
    sent: bool = False
    op: int | None = None
    lost: bool = False
    into: str = ""
    taken: bool = False
    going: bool = False


@dataclass(frozen=True, slots=True)
class Extra:
    """A charge beside those of the contexts while operation `op` of `agent` is under way: it has taken it ahead, or not
    given it back yet. Not `charged` where the context is charged to that cgroup already: then the operation has chosen
    the cgroup, and wherever its process goes meanwhile, that one will pay."""

    op: int
    agent: str
    key: str
    cgroup: str
    charged: bool = True


@dataclass(frozen=True, slots=True)
class World:
    """`homes` are the live processes, each with its cgroup. `dead` are the VMs a context was moved away from.
    `happened` are those operations that have taken effect without having answered. `undivided` are the cgroups whose
    children have no misc controller: to it, whoever lives below one is in it. `cut_off` are the processes that have
    lost their descriptor of /dev/sev. `peers` are the VMs that have a socket to another, each with that one. `irqfds`
    are VMs with the GSIs that an eventfd raises in them, `ioeventfds` VMs with the ports that signal one."""

    homes: frozenset[tuple[str, str]] = frozenset()
    references: frozenset[Reference] = frozenset()
    contexts: frozenset[Context] = frozenset()
    mirrors: frozenset[LedgerMirror] = frozenset()
    vms: frozenset[LedgerVm] = frozenset()
    dead: frozenset[str] = frozenset()
    extras: frozenset[Extra] = frozenset()
    happened: frozenset[int] = frozenset()
    undivided: frozenset[str] = frozenset()
    cut_off: frozenset[str] = frozenset()
    peers: frozenset[tuple[str, str]] = frozenset()
    irqfds: frozenset[tuple[str, int]] = frozenset()
    ioeventfds: frozenset[tuple[str, int]] = frozenset()

    def home(self, agent: str) -> str | None:
        """The cgroup that pays for what the process takes, None if it does not live."""
        return next((self.payer(cgroup) for name, cgroup in self.homes if name == agent), None)

    def payer(self, cgroup: str) -> str:
        """The cgroup that is charged for those who live in this one."""
        return next((level for level in levels(cgroup) if level in self.undivided), cgroup)

    def context(self, vm: str) -> Context | None:
        return next((context for context in self.contexts if context.owner == vm), None)

    def mirror(self, vm: str) -> LedgerMirror | None:
        return next((mirror for mirror in self.mirrors if mirror.vm == vm), None)

    def shared(self, vm: str) -> Context | None:
        """The context that the VM owns, or that it is a mirror of."""
        mirror = self.mirror(vm)
        return self.context(vm if mirror is None else mirror.owner)

    def vm(self, name: str) -> LedgerVm | None:
        return next((vm for vm in self.vms if vm.name == name), None)

    @property
    def holders(self) -> frozenset[str]:
        """The VMs that are encrypted: owners of contexts and their mirrors."""
        return frozenset({context.owner for context in self.contexts} | {mirror.vm for mirror in self.mirrors})

    def open(self, vm: str) -> bool:
        """Whether any process has the VM open."""
        return any(reference.vm == vm for reference in self.references)

    def peer(self, vm: str) -> str:
        """The VM that this one has a socket to, "" if there is none, or nobody recorded it."""
        return next((peer for name, peer in self.peers if name == vm), "")

    def given(self, source: str, agent: str, vm: str) -> bool:
        """Whether the process surely has a descriptor of `source` for an operation on its VM `vm`: its own, or one that
        arrived, which the operation may be using already."""
        mine = (r for r in self.references if (r.vm, r.agent) == (source, agent) and not (r.lost or r.going))
        return any(_for(reference, vm) and (reference.sent or reference.op is None) for reference in mine)

    def reach(self, op: int) -> Reach:
        """How far the operation has come here."""
        extra = any(extra.op == op for extra in self.extras)
        if op in self.happened:
            return Reach.OWING if extra else Reach.AFTER
        begun = extra or any(vm.creating == op for vm in self.vms) or any(c.launching == op for c in self.contexts)
        return Reach.AHEAD if begun else Reach.BEFORE

    @property
    def guests(self) -> int:
        """How many guests the firmware must count."""
        return sum(context.launched or context.launching is not None for context in self.contexts)

    @property
    def charges(self) -> Mapping[tuple[str, str], int]:
        """What (cgroup, key) must read, ancestors included; 0 where nothing is named."""
        total: Counter[tuple[str, str]] = Counter()
        paid = [(context.payer, context.key) for context in self.contexts]
        paid += [(extra.cgroup, extra.key) for extra in self.extras if extra.charged]
        for cgroup, key in paid:
            total.update((level, key) for level in levels(cgroup))
        return total


def give_back(world: World, op: int) -> World:
    """The operation has given back what it had taken ahead, or what it owed."""
    if world.reach(op) in (Reach.BEFORE, Reach.AFTER):
        return world
    return replace(
        world,
        extras=frozenset(extra for extra in world.extras if extra.op != op),
        vms=frozenset(replace(vm, creating=None) if vm.creating == op else vm for vm in world.vms),
        contexts=frozenset(replace(c, launching=None) if c.launching == op else c for c in world.contexts),
    )


def forget(world: World, op: int) -> World:
    """The world once the operation is over: nothing is taken ahead any more, and no file is held."""
    references = frozenset(reference for reference in world.references if reference.op != op)
    return settled(replace(give_back(world, op), references=references, happened=world.happened - {op}))


def die(world: World, agent: str) -> World:
    """The process is gone, with its descriptors and what its operations had taken ahead."""
    homes = frozenset((name, cgroup) for name, cgroup in world.homes if name != agent)
    gone = {agent} if homes else {agent, ON_ITS_WAY}  # nobody is left to receive what is on its way
    return settled(
        replace(
            world,
            homes=homes,
            references=frozenset(reference for reference in world.references if reference.agent not in gone),
            extras=frozenset(extra for extra in world.extras if extra.agent != agent),
        )
    )


def _for(reference: Reference, vm: str) -> bool:
    return not reference.sent or reference.into in ("", vm)


def arrived(world: World, agent: str, vm: str) -> frozenset[Reference]:
    """The descriptors that others have sent to the process for its VM `vm`, or for whichever."""
    sent = (reference for reference in world.references if reference.sent and reference.op is None)
    return frozenset(reference for reference in sent if reference.agent == agent and _for(reference, vm))


def drop(world: World, reference: Reference) -> World:
    """The reference has been closed."""
    return settled(replace(world, references=world.references - {reference}))


def settled(world: World) -> World:
    """Contexts whose VM nobody has open are gone, unless a mirror that somebody has open keeps it. What was bound to a
    VM is so until then, dead or not."""
    opened = {reference.vm for reference in world.references}
    mirrors = frozenset(mirror for mirror in world.mirrors if mirror.vm in opened)
    alive = opened | {mirror.owner for mirror in mirrors}
    return replace(
        world,
        mirrors=mirrors,
        contexts=frozenset(context for context in world.contexts if context.owner in alive),
        vms=frozenset(vm for vm in world.vms if vm.name in alive or vm.name in world.dead),
        irqfds=frozenset(bound for bound in world.irqfds if bound[0] in alive),
        ioeventfds=frozenset(bound for bound in world.ioeventfds if bound[0] in alive),
    )


def gone(cgroup: str, name: str, op: int) -> str:
    """What `cgroup` is called after operation `op` has removed `name`: the same, unless it is that or below it."""
    at = levels(name)
    return f"{name}{GONE}{op}{cgroup[len(name) :]}" if levels(cgroup)[: len(at)] == at else cgroup
