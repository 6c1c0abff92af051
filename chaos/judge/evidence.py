# SPDX-License-Identifier: Apache-2.0
"""What the checkers ask of a history, and the verdicts they make of the answers.

Truth first: a question that was not asked, or whose witness died, is unknown and never kept. A checker that asks
several questions makes a verdict of each and hands them to `combine`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec

from chaos.history.reading import argument, errname, ioctl_answered, number
from chaos.history.records import (
    Asked,
    Counted,
    Done,
    Exited,
    Handover,
    History,
    Invoke,
    Note,
    Observation,
    Record,
    Stormed,
)
from chaos.judge.ledger.commands import DEBUGS
from chaos.judge.ledger.firmware_contexts import Contexts
from chaos.judge.ledger.owners import Owners
from chaos.judge.ledger.replay import WATCHED, Entry, Ledger, replay
from chaos.judge.timeline import During

# Operations that are ioctls on a file descriptor of their VM. `run` is none: it lets threads into KVM_RUN and
# answers before they come out. `close`, and being the source of a move, are no ioctl on the VM; `platform` is one on
# /dev/sev.
IOCTLS = (WATCHED - {"platform"}) | {"get_state", "set_state", "interrupts"}


GIVES = frozenset({"init", "mirror", "command"})  # a command by its number may be an INIT


@dataclass(frozen=True, slots=True)
class TriedMove:
    """A move that was tried. `happened` is None if nobody can say. It is over from record `over` on, None if it never
    was: one that was killed is over when its process is reaped."""

    invoke: Invoke
    done: Done | None
    happened: bool | None
    over: int | None

    @property
    def source(self) -> str:
        """The VM whose context was to be moved, "" if the move was given no VM's descriptor."""
        return argument(self.invoke, "source")

    @property
    def destination(self) -> str:
        return argument(self.invoke, "vm")

    @property
    def survivor(self) -> str:
        """The VM that owns the context afterwards."""
        return self.destination if self.happened else self.source

    @property
    def other(self) -> str:
        """The VM that does not, "" if there is none: a VM may be told to move into itself."""
        if self.source == self.destination:
            return ""
        return self.source if self.happened else self.destination

    @property
    def records(self) -> tuple[Record, ...]:
        return (self.invoke,) if self.done is None else (self.invoke, self.done)

    def __str__(self) -> str:
        ended = "is still under way" if self.done is None else f"failed with {errname(self.done.errno)}"
        if self.done is not None and self.done.outcome == "info":
            ended = "was killed"
        if self.happened:
            ended = "succeeded" if self.done is not None and self.done.outcome == "ok" else f"{ended} and took effect"
        source = self.source or f"a descriptor that is no VM's ({argument(self.invoke, 'fd')})"
        return f"the move from {source} to {self.destination} {ended}"


def _failed_in_loop(invoke: Invoke, done: Done) -> Iterator[TriedMove]:
    """For each source the answer that most of its moves were given, if any failed."""
    most: dict[str, tuple[int, int]] = {}
    for told, count in done.value.items():
        source, _, name = told.partition(" ")
        number = getattr(errno, name, 0)
        if number and isinstance(count, int):
            most[source] = max(most.get(source, (0, 0)), (count, number))
    for source, (_, number) in most.items():
        move = msgspec.structs.replace(invoke, f="move", args={"vm": argument(invoke, "vm"), "source": source})
        yield TriedMove(move, msgspec.structs.replace(done, outcome="fail", errno=number), False, done.seq)


class RunEvidence:
    """A history, with what is asked of it most often worked out once."""

    def __init__(self, history: History) -> None:
        self.history = history

    @cached_property
    def ledger(self) -> Ledger:
        return replay(self.history)

    @property
    def shared(self) -> bool:
        """Whether SEV guests of others could come and go on the host."""
        return self.history.header is not None and self.history.header.shared

    def lost_of(self, witness: str) -> list[Note]:
        """Where the history says that this witness was lost, or a part of it; a note that names none may mean it."""
        notes = (r for r in self.history.records if isinstance(r, Note) and r.topic == "witness")
        return [note for note in notes if note.witness in ("", witness)]

    @cached_property
    def during(self) -> During:
        return During(self.history)

    @cached_property
    def contexts(self) -> Contexts:
        return Contexts.of(self.history)

    @cached_property
    def owners(self) -> Owners:
        return Owners.of(self.history)

    @cached_property
    def operations(self) -> tuple[tuple[Invoke, Done | None], ...]:
        return tuple(self.history.operations())

    @cached_property
    def moves(self) -> tuple[TriedMove, ...]:
        """The moves of a VM's context in the order in which they were begun."""
        return tuple(move for move in self.tried if move.source)

    @cached_property
    def tried(self) -> tuple[TriedMove, ...]:
        """The same, and those that were given a descriptor which is no VM's. Of one whose source's descriptor did not
        arrive, the kernel was asked nothing. What failed in a loop of moves is one that failed, for each source."""
        found: list[TriedMove] = []
        for invoke, done in self.operations:
            if invoke.f == "move" and (done is None or done.outcome != "fail" or ioctl_answered(done)):
                found.append(TriedMove(invoke, done, self.ledger.happened(invoke, done), self._over(invoke, done)))
            elif invoke.f == "moves" and done is not None and done.outcome == "ok":
                found += _failed_in_loop(invoke, done)
        return tuple(found)

    @cached_property
    def untried(self) -> str:
        """That no move was tried, and what became of the migrations that were to make one."""
        ended = (r for r in self.history.records if isinstance(r, Handover))
        told = [f"the migration from {r.source} to {r.destination} was {r.outcome} in {r.phase}" for r in ended]
        return "; ".join(["no move was tried", *told])

    def _over(self, invoke: Invoke, done: Done | None) -> int | None:
        if done is not None and done.outcome != "info":
            return done.seq
        exited = self.exited(invoke.agent, after=invoke.seq)
        return None if exited is None else exited.seq

    def had_context(self, vm: str, invoke: Invoke) -> bool | None:
        """Whether the VM had a context, its own or as a mirror, when the operation came; None if nobody can say."""
        had = {vm in world.holders for world in self.ledger.during.get(invoke.op, ())}
        return had.pop() if len(had) == 1 else None

    def had_guest(self, move: TriedMove) -> bool:
        """Whether the source of a move that failed had a guest to interrupt. If nobody can say it did, unless another
        move was just giving or taking it: then it is that one's."""
        had = self.had_context(move.source, move.invoke)
        other, _ = self.changed(move.source, move)
        return had or (had is None and (other is None or not other.happened))

    def given(self, vms: frozenset[str]) -> bool:
        """Whether one of the VMs may ever have been given a context, by INIT or as a mirror."""
        tried = ((i, done) for i, done in self.operations if i.f in GIVES and argument(i, "vm") in vms)
        return any(self.ledger.happened(invoke, done) is not False for invoke, done in tried)

    def home(self, invoke: Invoke) -> str:
        """The cgroup of whoever made the call, then; "" if nobody knows."""
        homes = [
            argument(other, "cgroup")
            for other, done in self.operations
            if other.agent == invoke.agent and other.f in ("spawn", "enter") and done is not None
            if done.outcome == "ok" and done.seq < invoke.seq
        ]
        return homes[-1] if homes else ""

    @cached_property
    def settled(self) -> int | None:
        """The record from which every move is over, None if one never is or there was none."""
        ends = [move.over for move in self.moves]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None

    @property
    def observations(self) -> Iterator[Entry]:
        return (entry for entry in self.ledger.entries if isinstance(entry.record, Observation))

    @property
    def asked(self) -> Iterator[Asked]:
        return (record for record in self.history.records if isinstance(record, Asked))

    @property
    def counted(self) -> Iterator[Counted]:
        return (record for record in self.history.records if isinstance(record, Counted))

    @property
    def stormed(self) -> Iterator[Stormed]:
        return (record for record in self.history.records if isinstance(record, Stormed))

    def done(self, vm: str, f: str = "") -> Iterator[tuple[Invoke, Done]]:
        """Operations on the VM that have answered ok or fail; all, or those called `f`."""
        for invoke, done in self.operations:
            if argument(invoke, "vm") == vm and done is not None and done.outcome != "info" and f in ("", invoke.f):
                yield invoke, done

    def statuses(self, vm: str) -> Iterator[tuple[Invoke, Done]]:
        """Every GUEST_STATUS of the VM that has answered, unless the firmware was made to answer otherwise, or its
        process could not reach it any more."""
        asked = ((i, done) for i, done in self.done(vm, "guest_status") if self.contexts.honest(i, done))
        return ((i, done) for i, done in asked if done.errno != errno.EBADF or not self._cut_off(i))

    def _cut_off(self, operation: Invoke) -> bool:
        """Whether its process had lost its descriptor of /dev/sev by then."""
        lost = (i for i, _ in self.operations if i.f == "lose_fd" and argument(i, "fd") == "sev")
        return any(i.agent == operation.agent and i.seq < operation.seq for i in lost)

    def lost(self, operation: Invoke) -> bool:
        """Whether the VM that it is on had lost its descriptor by then: EBADF says nothing of the VM."""
        return "vm" in self.lost_fds(argument(operation, "vm"), operation.seq)

    def lost_fds(self, vm: str, before: int) -> frozenset[str]:
        """The descriptors of the VM that were closed behind its VMM's back before that record: "vm", "vcpu 0"."""
        lost = (i for i, _ in self.operations if i.f == "lose_fd" and i.seq < before)
        return frozenset(argument(invoke, "fd") for invoke in lost if argument(invoke, "vm") == vm)

    def agent(self, vm: str) -> str:
        """The process that created the VM, "" if none did."""
        creators = [invoke.agent for invoke, _ in self.operations if invoke.f == "create"]
        names = [argument(invoke, "vm") for invoke, _ in self.operations if invoke.f == "create"]
        return dict(zip(names, creators, strict=True)).get(vm, "")

    def exited(self, agent: str, *, after: int = -1) -> Exited | None:
        """The end of the process after that record."""
        return next(
            (r for r in self.history.records if isinstance(r, Exited) and r.agent == agent and r.seq > after), None
        )

    def died(self, vm: str, *, at: int) -> Exited | None:
        """The end of the process that had the VM at that record, unless it was told to end."""
        creators = [i for i, _ in self.operations if i.f == "create" and argument(i, "vm") == vm and i.seq < at]
        told = {invoke.pid for invoke, _ in self.operations if invoke.f == "exit"}
        if not creators or creators[-1].pid in told:
            return None
        exited = self.exited(creators[-1].agent, after=creators[-1].seq)
        return exited if exited is not None and exited.pid == creators[-1].pid else None

    def changed(self, vm: str, after: TriedMove) -> tuple[TriedMove | None, int]:
        """The move that next gives or takes the VM's context once `after` is over, or may, and the record from which on
        what is seen of the VM may be its doing. It may have been under way before. One that fails changes nothing, and
        what comes after another VM of that name was created is that one's."""
        over = after.over or 0
        remade = self.remade(vm, over)
        for move in self.moves:
            later = (move.over is None or move.over > over) and move.invoke.seq < remade
            if later and move.happened is not False and vm in (move.source, move.destination):
                return move, max(move.invoke.seq, over)
        return None, remade

    def span(self, move: TriedMove) -> tuple[int, int]:
        """From the creation of the VM that first had the guest of this move, up to when another VM got the name of the
        one that has it last. Outside of that, what is told of VMs of these names is told of other guests."""
        return self._first_owner_made(move), self._last_owner_remade(move)

    def _first_owner_made(self, move: TriedMove) -> int:
        vm, before = move.source, move.invoke.seq
        while True:
            made = self._made(vm, before)
            into = [m for m in self.moves if m.happened and m.destination == vm and made < m.invoke.seq < before]
            if not into:
                return made
            vm, before = into[-1].source, into[-1].invoke.seq

    def _last_owner_remade(self, move: TriedMove) -> int:
        vm = move.survivor
        while True:
            later, remade = self.changed(vm, move)
            if later is None:
                return remade
            if later.over is None or later.happened is None:  # then nobody can say who has it last
                return len(self.history.records)
            vm, move = later.survivor, later

    def _made(self, vm: str, before: int) -> int:
        """The record at which the VM of that name that there was before a record was created, 0 if nobody did."""
        return max((seq for seq in self._creations.get(vm, ()) if seq < before), default=0)

    @cached_property
    def _creations(self) -> dict[str, list[int]]:
        """By VM the records at which one of that name was created."""
        found: dict[str, list[int]] = {}
        for invoke, _ in self.operations:
            if invoke.f == "create":
                found.setdefault(argument(invoke, "vm"), []).append(invoke.seq)
        return found

    def taken(self, move: TriedMove) -> TriedMove | None:
        """The move that took the source's context elsewhere before this one, which failed, was over."""
        return None if move.happened or move.over is None else self.death(move.source, move.over)

    def died_meanwhile(self, move: TriedMove) -> bool:
        """Whether another move took the context of this one's destination away, and left it dead, while this one was
        under way and went on to succeed."""
        began, ended = (move.done.began, move.done.ended) if move.done is not None else (0, 0)
        others = (m.done for m in self.moves if m.happened and m.source == move.destination and m.done is not None)
        return bool(move.happened and began) and any(began < done.ended <= ended for done in others)

    def remade(self, vm: str, after: int) -> int:
        """The record at which another VM of that name was created, or the end of the history."""
        return next((seq for seq in self._creations.get(vm, ()) if seq > after), len(self.history.records))

    def death(self, vm: str, before: int) -> TriedMove | None:
        """The move that took the VM's context away before that record, and left it dead."""
        earlier = (m for m in self.moves if m.happened and m.source == vm and m.invoke.seq < before)
        return next((move for move in earlier if self.remade(vm, move.invoke.seq) >= before), None)

    def lineage(self, vm: str) -> frozenset[str]:
        """The VMs that have owned the VM's context, or could have: those its moves have gone through."""
        vms = {vm}
        for _ in self.moves:  # as often as the longest chain needs
            for move in self.moves:
                if move.happened is not False and vms & {move.source, move.destination}:
                    vms |= {move.source, move.destination}
        return frozenset(vms)

    def key(self, vm: str) -> str:
        """Under which key the VM's context is charged, "" if it never had one."""
        inits = ((invoke, done) for owner in self.lineage(vm) for invoke, done in self.done(owner, "init"))
        return next((argument(invoke, "key") for invoke, done in inits if done.outcome == "ok"), "")

    def typed(self, vm: str) -> bool:
        """Whether the VM was created with a type, which says what it is to be before any INIT."""
        creations = (invoke for invoke, _ in self.operations if invoke.f == "create" and argument(invoke, "vm") == vm)
        return any(number(invoke, "type") for invoke in creations)

    def kind(self, invoke: Invoke) -> str:
        """The operation, for a signature; of /dev/sev the command. What happens to mirrors, in moves of SEV-ES guests,
        to guests that were moved and are debugged, after a launch that could not be told, and after a bus may have been
        lost, is of its own kind, and no finding about it may excuse the same of other VMs."""
        worlds = self.ledger.during.get(invoke.op, frozenset())
        if worlds and all(world.mirror(argument(invoke, "vm")) for world in worlds):
            return f"{invoke.f}-of-mirror{self._which_mirror(invoke)}"
        if invoke.f == "platform":
            return argument(invoke, "command")
        if invoke.f in DEBUGS and self._was_moved_into(invoke):
            return f"{invoke.f}-of-moved"
        if invoke.f == "launch_start" and any(done.errno == errno.EFAULT for _, done in self._earlier(invoke)):
            return f"{invoke.f}-after-untold"
        if invoke.f == "ioeventfd" and any(_lost_its_bus(*each) for each in self._earlier(invoke)):
            return f"{invoke.f}-after-bus-lost"
        es = invoke.f == "move" and self.key(argument(invoke, "source")) == "sev_es"
        return "move-of-sev_es" if es else invoke.f

    def _earlier(self, invoke: Invoke) -> Iterator[tuple[Invoke, Done]]:
        """The same operation on the VM since it was created, with how each was answered."""
        vm = argument(invoke, "vm")
        own = [(i, d) for i, d in self.operations if argument(i, "vm") == vm and i.seq < invoke.seq and d is not None]
        created = max((i.seq for i, _ in own if i.f == "create"), default=-1)
        return ((i, d) for i, d in own if i.f == invoke.f and i.seq > created and d.seq < invoke.seq)

    def _was_moved_into(self, invoke: Invoke) -> bool:
        """Whether the VM of the operation had got its context by a move."""
        vm = argument(invoke, "vm")
        return any(
            m.happened and m.destination == vm and m.over is not None and m.over < invoke.seq for m in self.moves
        )

    def _which_mirror(self, invoke: Invoke) -> str:
        """ "-of-moved" if it was made when its owner's context had been moved, "-elsewhere" if it is in another process
        than the context was launched in."""
        vms = self.lineage(argument(invoke, "vm"))
        mirrors = ((i, done) for i, done in self.operations if i.f == "mirror" and argument(i, "vm") in vms)
        made = next((mirror for mirror, done in mirrors if self.ledger.happened(mirror, done)), invoke)
        owner = argument(made, "source")
        if any(m.happened and m.destination == owner and m.over is not None and m.over < made.seq for m in self.moves):
            return "-of-moved"
        owners = self.lineage(owner)
        launched = {i.agent for i, _ in self.operations if i.f == "launch_start" and argument(i, "vm") in owners}
        return "" if invoke.agent in launched else "-elsewhere"


def _lost_its_bus(invoke: Invoke, done: Done) -> bool:
    """Whether an ioeventfd was taken away, well as it is told, while a fault point failed."""
    return invoke.args.get("assign") is False and done.outcome == "ok" and bool(done.value.get("struck"))
