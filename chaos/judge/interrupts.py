# SPDX-License-Identifier: Apache-2.0
"""P5 for interrupts: a signal that is written to an eventfd which the guest's VM is bound to arrives there.

The guest takes no interrupt, so the vector of one that has arrived stays in the local APIC of its first vCPU, and goes
with the vCPU's state wherever that is carried. So each signal of a run has a course: it is due at the VM that owns the
guest's context and was bound when it was written, or while nobody was bound lies in the eventfd until somebody is; from
there it goes on with the state that was read after it. Somewhere on the way somebody looks.

A vector that is there has arrived. One that is not may still be on its way, unless its eventfd was taken away before
somebody looked: KVM_IRQFD answers to that when nothing of it is under way any more. What is not due at any VM that owns
the guest says nothing: KVM was not asked for it, or has refused openly (P7). Nor does a second signal of the same GSI.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from chaos.history.reading import argument, number
from chaos.history.records import Done, Invoke, Record
from chaos.judge.evidence import RunEvidence, TriedMove
from chaos.judge.ledger.world import World
from chaos.judge.parts import broken, kept, unknown
from chaos.judge.verdict import Verdict

LOST, LOST_BESIDE_THE_DEAD, LOST_IN_MOVE = "interrupt-lost", "interrupt-lost-beside-the-dead", "interrupt-lost-in-move"


@dataclass(frozen=True, slots=True)
class _Said:
    """What is known of a signal: `how` is "" if it has arrived, a signature if it is lost, "?" if nobody can say."""

    gsi: int
    how: str
    text: str
    records: tuple[Record, ...]


def interrupts(promise: str, evidence: RunEvidence) -> Iterator[Verdict]:
    """One part for all signals of which the same is to be said."""
    told = sorted(_all(evidence), key=lambda said: (said.how, said.text, said.gsi))
    for (how, text), group in groupby(told, key=lambda said: (said.how, said.text)):
        alike = list(group)
        records = [record for said in alike for record in said.records]
        reason = f"{_named(said.gsi for said in alike)}: {text}"
        if not how:
            yield kept(promise, reason, records)
        elif how == "?":
            yield unknown(promise, reason, records)
        else:
            yield broken(promise, reason, records, signature=how, expected="it arrives", seen="it does not")


def _all(evidence: RunEvidence) -> Iterator[_Said]:
    seen: set[int] = set()
    for invoke, done in evidence.operations:
        if invoke.f != "signal" or done is None or done.outcome != "ok":
            continue
        gsi = number(invoke, "gsi")
        if gsi in seen:
            yield _Said(gsi, "?", "it was written before, so its vector says nothing of this signal", (invoke,))
        else:
            yield from _course(evidence, gsi, invoke, done)
        seen.add(gsi)


def _course(evidence: RunEvidence, gsi: int, signal: Invoke, done: Done) -> Iterator[_Said]:
    """Where it was due, and what became of it; nothing if it was due nowhere."""
    worlds = evidence.ledger.during.get(signal.op, frozenset())
    places = {(_owner(world, gsi), frozenset(_bound(world, gsi))) for world in worlds}
    if len(places) != 1:
        yield _Said(gsi, "?", "nobody can say whom its eventfd was bound to when it was written", (signal,))
        return
    due, bound = places.pop()
    if due:
        beside = {vm for vm in bound - {due} if any(vm in world.dead for world in worlds)}
        told = f"written while its eventfd was bound to {due}" + (f", and still to {_list(beside)}" if beside else "")
        yield _followed(evidence, gsi, due, told, done, LOST_BESIDE_THE_DEAD if beside else LOST)
    elif not bound:
        yield from _kept_in_eventfd(evidence, gsi, signal)


def _kept_in_eventfd(evidence: RunEvidence, gsi: int, signal: Invoke) -> Iterator[_Said]:
    """It lay in the eventfd until a VM was bound."""
    for invoke, done in evidence.operations:
        mine = invoke.f == "irqfd" and number(invoke, "gsi") == gsi and number(invoke, "assign")
        if not mine or invoke.seq < signal.seq or done is None or done.outcome != "ok":
            continue
        vm, worlds = argument(invoke, "vm"), evidence.ledger.during.get(invoke.op, frozenset())
        if not worlds or not all(world.context(vm) for world in worlds):
            yield _Said(gsi, "?", f"its eventfd was bound to {vm} before that had the guest", (signal, invoke))
            return
        told = f"written while its eventfd was bound to nobody, which {vm} was afterwards"
        yield _followed(evidence, gsi, vm, told, done, LOST)
        return


def _followed(evidence: RunEvidence, gsi: int, vm: str, told: str, since: Done, lost: str) -> _Said:
    """From the VM where it was due, with the state that is carried, to whoever looked; to the end, for what has arrived
    has to stay."""
    arrived: _Said | None = None
    move, end = _next_move(evidence, vm, since)
    settled = _freed(evidence, gsi, vm, since, end)
    while True:
        for look, seen in _looks(evidence, vm, since, end):
            if gsi in seen:
                arrived = arrived or _Said(gsi, "", f"{told}, and pending at {vm}", (since, look))
                settled = settled or look
            elif settled is not None and settled.seq < look.seq:
                text = f"{told}, and not pending at {vm}, nor on its way any more"
                return _Said(gsi, lost, text, (since, settled, look))
        if move is None or move.happened is None:
            unseen = f"nobody saw it at {vm}, where it may be on its way"
            why = unseen if move is None else f"{move}, and nobody can say whether it took effect"
            return arrived or _Said(gsi, "?", f"{told}, and {why}", (since,))
        read, given = _carried(evidence, move, since)
        if read is None or given is None:
            text = f"{told}, and the state of {vm} was not carried to {move.destination} after it had arrived"
            return arrived or _Said(gsi, "?", text, (since, *move.records))
        sure = settled is not None and settled.seq < read.seq
        vm, since, settled, lost = move.destination, given, given if sure else None, LOST_IN_MOVE
        move, end = _next_move(evidence, vm, since)


def _next_move(evidence: RunEvidence, vm: str, since: Done) -> tuple[TriedMove | None, int]:
    """The one that takes the guest away from the VM, or may, and up to which record the VM surely has it."""
    moves = (m for m in evidence.moves if m.source == vm and m.happened is not False)
    move = next((move for move in moves if move.over is None or move.over > since.seq), None)
    return move, evidence.remade(vm, since.seq) if move is None else move.invoke.seq


def _freed(evidence: RunEvidence, gsi: int, vm: str, since: Done, end: int) -> Done | None:
    """When the eventfd was taken from the VM again: nothing is on its way then."""
    taken = ((i, d) for i, d in evidence.done(vm, "irqfd") if number(i, "gsi") == gsi and not number(i, "assign"))
    return next((d for i, d in taken if since.seq < i.seq < end and d.outcome == "ok"), None)


def _looks(evidence: RunEvidence, vm: str, since: Done, end: int) -> Iterator[tuple[Done, frozenset[int]]]:
    for invoke, done in evidence.done(vm, "interrupts"):
        vectors = done.value.get("vectors")
        if since.seq < invoke.seq < end and done.outcome == "ok" and isinstance(vectors, list):
            yield done, frozenset(vector for vector in vectors if isinstance(vector, int))


def _carried(evidence: RunEvidence, move: TriedMove, since: Done) -> tuple[Invoke | None, Done | None]:
    """When the state was read that the move's destination was given, if that was after `since`, and its answer then."""
    over = move.over if move.over is not None else move.invoke.seq
    read = [i for i, d in evidence.done(move.source, "get_state") if since.seq < i.seq < over and d.outcome == "ok"]
    given = (d for i, d in evidence.done(move.destination, "set_state") if i.seq > over and d.outcome == "ok")
    return (read[-1] if read else None), next(given, None)


def _bound(world: World, gsi: int) -> Iterator[str]:
    return (vm for vm, of in world.irqfds if of == gsi)


def _owner(world: World, gsi: int) -> str:
    """The VM that owns a context and is bound, "" if none is."""
    return next((vm for vm in sorted(_bound(world, gsi)) if world.context(vm) is not None), "")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _named(gsis: Iterable[int]) -> str:
    """ "signals of GSI 32-40, 44"."""
    runs: list[list[int]] = []
    for gsi in sorted({*gsis}):
        if runs and runs[-1][-1] == gsi - 1:
            runs[-1].append(gsi)
        else:
            runs.append([gsi])
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"signals of GSI {told}"
