# SPDX-License-Identifier: Apache-2.0
"""What each cgroup must be charged at any point of a history, and where it was charged something else.

The ledger replays a history as a set of possible worlds (`chaos.judge.ledger.world`). An operation that answered ok
makes one world of each, one that failed makes none. While an operation is under way, or after its process was killed
under it, both what was and what would be are possible; so is, from the first sign that a process may be dying until it
is reaped, that it has died already. What is then observed leaves only the worlds that fit. When none does, the history
has deviated: a `Mismatch` names where, which values were possible, and what was seen.

Events are put in the order of the system calls (`Done.ended`, taken by the agent), not of the records: an answer is
written down later than it was given. An observation takes time, and reads its counters one by one. If anything could
change meanwhile, each counter is compared by itself with every value that was possible, and nothing is concluded from
it. An answer of one system call is of one moment, so it always tells something.

A hold that was reached stops its operation, and how far it has come, `chaos.judge.ledger.reach` tells by the place:
until something lets it go, it comes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from chaos.history.reading import Witness, argument, read, said_dead
from chaos.history.records import (
    Asked,
    Counted,
    Done,
    Exited,
    Fault,
    Held,
    History,
    Invoke,
    Observation,
    Released,
)
from chaos.judge.ledger import reach
from chaos.judge.ledger.effects import (
    EFFECTS,
    attempts,
    begin,
    effect,
    halfway,
    into_the_dead,
    left_behind,
    owing,
    told_too_late,
    took_effect,
)
from chaos.judge.ledger.firmware_contexts import Contexts
from chaos.judge.ledger.owners import Owners
from chaos.judge.ledger.peaks import Peaks, peaks_of
from chaos.judge.ledger.world import STILL, Reach, Reference, World, die, drop, forget, give_back

WitnessKind = Literal["charge", "peak", "guests", "owner", "answer"]
MANY = 1000
"""Worlds that are more than anybody can tell apart. Runs have less than a hundred; a history in which nothing was
answered has more than there is memory for."""
Rule = Callable[[World, Invoke], World | None]
# Operations whose answer is judged by what was possible while they were under way.
WATCHED = frozenset(
    {
        "init",
        "create_vcpu",
        "command",
        "register_region",
        "unregister_region",
        "set_memory",
        "irqfd",
        "ioeventfd",
        "mirror",
        "move",
        "moves",
        "launch_start",
        "launch_update_data",
        "launch_update_vmsa",
        "launch_measure",
        "launch_finish",
        "guest_status",
        "dbg_decrypt",
        "dbg_encrypt",
        "platform",
    }
)
# P11 asks what the process was charged for then, P5 which VM had the guest, and what was bound to it.
ALSO_WATCHED = frozenset({"enter", "signal"})


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that fits no possible world.

    charge: the counter `key` of cgroup `where`. peak: the highest that it ever was. guests: the firmware's guest count.
    owner: whether VM `where` owns a context, 0 or 1. answer: the operation `key` on VM `where` failed (0), and had been
    seen to take effect (1).
    """

    kind: WitnessKind
    record: int
    where: str
    key: str
    expected: frozenset[int]
    seen: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A record that was compared: the worlds that were possible before it, those of them that fit it (all, if none
    does or nothing can be concluded), and what fits none."""

    record: Witness
    worlds: frozenset[World]
    fits: frozenset[World]
    mismatches: tuple[Mismatch, ...] = ()


@dataclass(frozen=True, slots=True)
class Ledger:
    """A history, replayed. `worlds` are those possible at its end. `lost` says where and why the ledger could no
    longer tell what must be charged, "" if it could throughout; `lost_at` is that record. `during` are the worlds, by
    the number of an operation that has answered, in which it may have been carried out."""

    entries: tuple[Entry, ...]
    worlds: frozenset[World]
    lost: str = ""
    lost_at: int | None = None
    during: Mapping[int, frozenset[World]] = field(default_factory=dict)

    def mismatches(self, *kinds: WitnessKind) -> tuple[Mismatch, ...]:
        return tuple(m for entry in self.entries for m in entry.mismatches if m.kind in kinds)

    def happened(self, invoke: Invoke, done: Done | None) -> bool | None:
        """Whether the operation took effect, None if nobody can say."""
        if done is not None and done.outcome != "info" and not told_too_late(done):
            return took_effect(invoke, done)
        ways = {invoke.op in world.happened for world in self.worlds}
        return ways.pop() if len(ways) == 1 else None


def replay(history: History) -> Ledger:
    """Replay the history from its first record to its last."""
    replayed = _Replay(history, contexts=Contexts.of(history), answers=Owners.of(history))
    for _, (record, _), act in sorted(replayed.events(), key=lambda event: event[:2]):
        replayed.at = record
        act()
    return Ledger(tuple(replayed.entries), replayed.worlds, replayed.lost, replayed.lost_at, replayed.during)


@dataclass(slots=True)
class _Window:
    """A witness at work: every world that was possible since it began.

    `calm` if no event changed them meanwhile, `steady` if nothing could have changed at all: only then do several
    readings belong to one moment. `dying` if a process may have been, which gives up one VM after the other.
    """

    worlds: frozenset[World]
    steady: bool
    calm: bool = True
    dying: bool = False


@dataclass(slots=True)
class _Replay:
    """The state of a replay. Its events are closures over it, in the order of the system calls."""

    history: History
    worlds: frozenset[World] = frozenset({World()})
    lost: str = ""
    overgrown: bool = False
    entries: list[Entry] = field(default_factory=list)
    pending: dict[int, Invoke] = field(default_factory=dict)
    stopped: dict[int, Held] = field(default_factory=dict)
    doomed: set[str] = field(default_factory=set)
    windows: dict[int, _Window] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    guests_before: int | None = None
    lost_at: int | None = None
    at: int = 0
    during: dict[int, frozenset[World]] = field(default_factory=dict)
    contexts: Contexts = field(default_factory=Contexts)
    answers: Owners = field(default_factory=Owners)
    peaks: Peaks = field(default_factory=Peaks)

    def events(self) -> Iterator[tuple[int, tuple[int, int], Callable[[], None]]]:
        """(time, (record, half), what to do). A record with a beginning and an end is two events."""
        for invoke, done in self.history.operations():
            yield invoke.t, (invoke.seq, 0), partial(self._begin, invoke)
            if done is not None:
                ended = max(invoke.t, done.ended or done.t)
                yield ended, (done.seq, 0), partial(self._finish, invoke, done)
        for record in self.history.records:
            if isinstance(record, Observation):
                yield record.t, (record.seq, 0), partial(self._open, record.seq)
                yield max(record.t, record.until), (record.seq, 1), partial(self._observe, record)
            elif isinstance(record, Asked):
                yield record.t, (record.seq, 0), partial(self._ask, record)
            elif isinstance(record, Counted) or (isinstance(record, Fault) and record.lets_go):
                yield record.t, (record.seq, 0), self._release
            elif isinstance(record, Held) and record.reached:
                yield record.t, (record.seq, 0), partial(self._hold, record)
            elif isinstance(record, Released):
                yield record.t, (record.seq, 0), partial(self._release, record.hold)
            elif isinstance(record, Exited):
                yield record.t, (record.seq, 0), partial(self._exited, record.agent)
        for time, seq, agent in deaths_begin(self.history):
            yield time, (seq, 1), partial(self._doom, agent)

    def _become(self, worlds: Iterable[World]) -> None:
        """The worlds are these, and all that they can turn into by themselves."""
        acting = [i for op, i in self.pending.items() if op not in self.stopped and i.f != "moves"]
        before, self.worlds = self.worlds, frozenset(worlds)
        if not self.overgrown:
            self._grow(acting)
        if before != self.worlds:
            self.peaks.rise(self.worlds, [i for i in self.pending.values() if i.f == "moves"])
        for window in self.windows.values():
            window.calm &= before == self.worlds
            window.steady &= window.calm
            window.dying |= bool(self.doomed)
            window.worlds |= self.worlds

    def _grow(self, acting: Sequence[Invoke]) -> None:
        grown = _reachable(self.worlds, acting, self.doomed)
        self.overgrown = grown is None
        if grown is not None:
            self.worlds = grown
        elif not self.lost:
            self.lost = f"at record {self.at} more than {MANY} courses of events are possible"
            self.lost_at = self.at

    def _release(self, hold: str = "", agent: str = "") -> None:
        """Something was done, and it may have let go what was held."""
        self._let_go(hold, agent)
        self._become(self.worlds)

    def _let_go(self, hold: str = "", agent: str = "") -> None:
        """Those are not stopped any more that wait at `hold` or are operations of `agent`, and those that anything may
        let go: reading a counter takes a vCPU out of the guest, and so does stopping or killing its process."""
        for op, held in list(self.stopped.items()):
            invoke = self.pending.get(op)
            if held.place not in reach.FIRM or held.hold == hold or invoke is None or invoke.agent == agent:
                del self.stopped[op]

    @property
    def _steady(self) -> bool:
        return not self.doomed and all(op in self.stopped for op in self.pending)

    def _open(self, seq: int) -> None:
        self.windows[seq] = _Window(self.worlds, self._steady, dying=bool(self.doomed))

    def _begin(self, invoke: Invoke) -> None:
        if invoke.f == "create":
            self.owners[argument(invoke, "vm")] = invoke.agent
        if invoke.f not in STILL:
            self._let_go()
        if invoke.f in EFFECTS:
            self.pending |= {each.op: each for each in (invoke, *attempts(invoke))}
        self._become(begin(world, invoke) for world in self.worlds)
        if invoke.f in WATCHED | ALSO_WATCHED:
            self._open(invoke.seq)

    def _finish(self, invoke: Invoke, done: Done) -> None:
        window = self.windows.pop(invoke.seq, None)
        if window is not None and done.outcome != "info":
            self.during[invoke.op] = frozenset(w for w in window.worlds if w.reach(invoke.op) is Reach.BEFORE)
            if invoke.f == "guest_status":
                self._status(invoke, done, window)
        self.peaks.renew(invoke)
        if invoke.op not in self.pending:
            return
        if invoke.f not in STILL:
            self._let_go()
        self.stopped.pop(invoke.op, None)
        if done.outcome == "info":
            self._become(self.worlds)  # settled when its process is reaped: only then can it not happen any more
            return
        tried = {each.op for each in attempts(invoke)}
        for op in (invoke.op, *tried):
            del self.pending[op]
        possible = [world for world in self.worlds if not tried & world.happened]
        worlds = set(_answered(possible, invoke, done)) or set(_answered(possible, invoke, done, into_the_dead))
        if not worlds:
            self._contradicted(invoke, done)
            worlds = {forget(world, invoke.op) for world in self.worlds}
        self._become(worlds)

    def _contradicted(self, invoke: Invoke, done: Done) -> None:
        """No world allows the answer. A success that cannot be leaves the ledger without a state to go on from."""
        vm = argument(invoke, "vm")
        if not took_effect(invoke, done):
            mismatch = Mismatch("answer", done.seq, vm, invoke.f, frozenset({1}), 0)
            self.entries.append(Entry(done, self.worlds, self.worlds, (mismatch,)))
        elif not self.lost:
            self.lost = f"{invoke.f} of {vm or invoke.agent} succeeded at record {done.seq}, where it could not"
            self.lost_at = done.seq

    def _hold(self, held: Held) -> None:
        """Stopped at the place that was waited for, the operation has come so far and no further."""
        invoke = self.pending.get(held.op)
        if invoke is not None:
            self.stopped.pop(held.op, None)  # if it was stopped somewhere before, it has gone on
            self._become(self.worlds)
            self.stopped[held.op] = held
            waiting = reach.at(self.worlds, held.op, reach.reaches(invoke.f, held))
            self._become(waiting or self.worlds)

    def _doom(self, agent: str) -> None:
        self.doomed.add(agent)
        self._release(agent=agent)

    def _exited(self, agent: str) -> None:
        self.doomed.discard(agent)
        self._let_go()
        worlds = set(self.worlds)
        for op in [op for op, invoke in self.pending.items() if invoke.agent == agent]:
            del self.pending[op]
            worlds = {give_back(world, op) for world in worlds}
        self._become({die(world, agent) for world in worlds})

    def _observe(self, record: Observation) -> None:
        window = self.windows.pop(record.seq)
        fits, mismatches = _charges(record, window.worlds, joint=window.steady, dying=window.dying)
        mismatches = (*mismatches, *self._peaks(record))
        count = self._guests(record, fits)
        if count is not None:
            counted = frozenset(world for world in fits if world.guests == count)
            expected = frozenset(world.guests for world in fits)
            if not _possible(count, expected, dying=window.dying):
                mismatches = (*mismatches, Mismatch("guests", record.seq, ".", "", expected, count))
            fits = counted or fits
        if not window.steady:
            fits = window.worlds
        self.entries.append(Entry(record, window.worlds, fits, mismatches))
        if window.steady:
            self._become(fits)

    def _peaks(self, record: Observation) -> Iterator[Mismatch]:
        """Every misc.peak that is higher than the counter can have been."""
        for (cgroup, key), seen in peaks_of(record).items():
            highest = self.peaks.of(record, cgroup, key)
            if seen > highest:
                yield Mismatch("peak", record.seq, cgroup, key, frozenset({highest}), seen)

    def _guests(self, record: Observation, worlds: Iterable[World]) -> int | None:
        """The firmware's guest count, less what was there before the run's first observation and what is owed to
        faults. None if it says nothing."""
        seen = self.contexts.guests(record)
        if seen is None:
            return None
        if self.guests_before is None:
            counts = {world.guests for world in worlds}
            if len(counts) != 1:
                return None
            self.guests_before = seen - counts.pop()
        return seen - self.guests_before

    def _status(self, invoke: Invoke, done: Done, window: _Window) -> None:
        said, vm = self.answers.says(invoke, done), argument(invoke, "vm")
        lost = Reference(vm, invoke.agent, lost=True)
        if said is None or any(lost in world.references for world in window.worlds):
            return
        fits = frozenset(world for world in window.worlds if (vm in world.holders) == said)
        mismatch = Mismatch("owner", done.seq, vm, "", frozenset({int(not said)}), int(said))
        self.entries.append(Entry(done, window.worlds, fits or window.worlds, () if fits else (mismatch,)))
        if fits and window.calm:
            self._become(fits)

    def _ask(self, record: Asked) -> None:
        self._release()
        dead = said_dead(record)
        if dead is None or self.owners.get(record.vm) != record.agent:
            self.entries.append(Entry(record, self.worlds, self.worlds))
            return
        fits = frozenset(world for world in self.worlds if (record.vm in world.dead) == dead)
        self.entries.append(Entry(record, self.worlds, fits or self.worlds))
        if fits:
            self._become(fits)


def _answered(worlds: Iterable[World], invoke: Invoke, done: Done, rule: Rule = effect) -> Iterator[World]:
    if told_too_late(done):
        yield from (forget(world, invoke.op) for world in worlds)  # those in which it has happened are among them
        return
    happened, call = took_effect(invoke, done), str(done.value.get("call", ""))
    for world in worlds:
        if not happened:
            after = None if invoke.op in world.happened else world
        else:
            after = world if invoke.op in world.happened else rule(world, invoke)
        if after is not None:
            yield forget(after if happened else left_behind(after, invoke, call=call), invoke.op)


def _reachable(worlds: Iterable[World], acting: Iterable[Invoke], doomed: Iterable[str]) -> frozenset[World] | None:
    """The worlds, and every one that they can turn into without anything more being asked of anybody; None if there are
    more than `MANY`."""
    seen = set(worlds)
    todo = list(seen)
    while todo:
        if len(seen) > MANY:
            return None
        for world in _successors(todo.pop(), acting, doomed):
            if world not in seen:
                seen.add(world)
                todo.append(world)
    return frozenset(seen)


def _successors(world: World, acting: Iterable[Invoke], doomed: Iterable[str]) -> Iterator[World]:
    for invoke in acting:
        yield give_back(world, invoke.op)  # and it is about to fail, or to be over
        if invoke.op in world.happened:
            continue
        ahead = halfway(world, invoke)
        if ahead is not None:
            yield ahead
        for after in (owing(world, invoke), effect(world, invoke)):
            if after is not None:
                yield replace(after, happened=after.happened | {invoke.op})
    for agent in doomed:
        yield die(world, agent)
    # When just what is going goes makes no difference before it is all that keeps the context.
    kept = {reference.vm for reference in world.references if not reference.going}
    for reference in world.references:
        if reference.vm not in kept and world.context(reference.vm):
            yield drop(world, reference)


def _possible(seen: int, expected: frozenset[int], *, dying: bool) -> bool:
    """A process that dies takes what it has one by one, and the worlds know only before and after."""
    return min(expected) <= seen <= max(expected) if dying else seen in expected


def _charges(
    record: Observation, worlds: frozenset[World], *, joint: bool, dying: bool
) -> tuple[frozenset[World], tuple[Mismatch, ...]]:
    """The worlds that fit the counters (all of them together if `joint`), and the counters that fit none."""
    seen = read(record)
    charges = {world: world.charges for world in worlds}
    expected = {place: frozenset(charge[place] for charge in charges.values()) for place in seen}
    wrong = [place for place in seen if not _possible(seen[place], expected[place], dying=dying)]
    if joint and not wrong:
        fits = frozenset(world for world in worlds if all(charges[world][place] == seen[place] for place in seen))
        if fits:
            return fits, ()
        # Each counter is possible by itself: those are wrong that the nearest world would have otherwise.
        differing = ([place for place in seen if charge[place] != seen[place]] for charge in charges.values())
        wrong = min(differing, key=lambda places: (len(places), places))
        expected = {place: expected[place] - {seen[place]} for place in wrong}
    return worlds, tuple(Mismatch("charge", record.seq, *place, expected[place], seen[place]) for place in wrong)


def deaths_begin(history: History) -> Iterator[tuple[int, int, str]]:
    """(time, record, agent): from when each process that ended, or may have, must be taken to be dying.

    That is when it was told to exit, when a fault was applied that may be its end, or when the operation was begun that
    it never answered; a later sign of life takes the last two back. A process that went without any of these may have
    gone right after its last sign of life.
    """
    told: set[str] = set()
    suspected: dict[str, tuple[int, int]] = {}
    lived: dict[str, tuple[int, int]] = {}
    invokes = {invoke.op: invoke for invoke, _ in history.operations()}
    for record in history.records:
        if isinstance(record, Invoke) and record.f == "spawn":
            lived[record.agent] = (record.t, record.seq)
        elif isinstance(record, Invoke) and record.f == "exit" and record.agent not in suspected:
            told.add(record.agent)
            suspected[record.agent] = (record.t, record.seq)
        elif isinstance(record, Fault):
            for agent in lived.keys() & set(record.ends):
                suspected.setdefault(agent, (record.t, record.seq))
        elif isinstance(record, Done) and record.op in invokes:
            invoke = invokes[record.op]
            if record.outcome == "info":
                suspected.setdefault(invoke.agent, (invoke.t, invoke.seq))
            else:
                _lives(invoke.agent, (record.ended or record.t, record.seq), told, suspected, lived)
        elif isinstance(record, Counted | Asked):
            _lives(record.agent, (record.t, record.seq), told, suspected, lived)
        elif isinstance(record, Exited):
            told.discard(record.agent)
            begun = suspected.pop(record.agent, None) or lived.pop(record.agent, None)
            if begun is not None:
                yield (*begun, record.agent)
    for agent, begun in suspected.items():
        yield (*begun, agent)


def _lives(
    agent: str,
    when: tuple[int, int],
    told: set[str],
    suspected: dict[str, tuple[int, int]],
    lived: dict[str, tuple[int, int]],
) -> None:
    """The process was alive at that time."""
    lived[agent] = when
    if agent not in told and when > suspected.get(agent, when):
        del suspected[agent]
