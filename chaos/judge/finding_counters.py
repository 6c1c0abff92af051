# SPDX-License-Identifier: Apache-2.0
"""What two written findings make of the counters, to the unit: a finding excuses just that, and nothing beside it.

Finding 0004 charges a mirror wherever it was moved to last. Finding 0002 charges a SEV-ES context that is moved into
another cgroup there under `sev` for `sev_es`, and takes it off the old one likewise. Both stay for good. A counter that
is wrong by just so much is of a kind of its own; one that is wrong by anything else is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from chaos.history.reading import argument, levels, read
from chaos.history.records import Invoke
from chaos.judge.evidence import RunEvidence, TriedMove
from chaos.judge.ledger.replay import Mismatch

Off = Counter[tuple[str, str]]
"""By how much (cgroup, key) is above what is due."""

ES = "sev_es"


def by_mirrors(evidence: RunEvidence, seq: int) -> Off:
    """At that record, if a mirror was charged wherever it was moved to last."""
    made = [i for i, done in evidence.operations if i.f == "mirror" and done is not None and done.outcome == "ok"]
    firsts = {argument(invoke, "vm"): invoke for invoke in made}
    homes: dict[int, tuple[str, str]] = {}
    for move in _happened(evidence, seq):
        first = firsts.get(move.source)
        if first is not None:
            firsts[move.destination] = first
            # Also of SEV-ES: the destination does not know yet what it will be.
            homes[first.op] = evidence.home(move.invoke), "sev"
    return Counter((level, key) for cgroup, key in homes.values() for level in levels(cgroup))


def by_es_moves(evidence: RunEvidence, seq: int) -> Off:
    """At that record, if each SEV-ES context that was moved until then went by the wrong key."""
    off: Off = Counter()
    for move in _happened(evidence, seq):
        payers = _payers(evidence, move)
        if payers is not None:
            source, destination = payers
            for cgroup, sign in ((source, -1), (destination, 1)):
                for level in levels(cgroup):
                    off[level, "sev"] += sign
                    off[level, ES] -= sign
    return off


def _happened(evidence: RunEvidence, seq: int) -> list[TriedMove]:
    return [move for move in evidence.moves if move.happened and move.over is not None and move.over < seq]


def _payers(evidence: RunEvidence, move: TriedMove) -> tuple[str, str] | None:
    """Who paid for the SEV-ES context before the move and who after it. None if the move changed nothing about that, or
    nobody can say."""
    ways: set[tuple[str, str] | None] = set()
    for world in evidence.ledger.during.get(move.invoke.op, ()):
        context, payer = world.context(move.source), world.home(move.invoke.agent)
        known = context is not None and context.key == ES and payer is not None and payer != context.payer
        ways.add((context.payer, payer) if known and context is not None and payer is not None else None)
    return ways.pop() if len(ways) == 1 else None


def below_zero(evidence: RunEvidence, invoke: Invoke) -> bool:
    """Whether the operation is a move of a SEV-ES context into another cgroup, which takes off the old one what was
    never charged to it."""
    mine = (move for move in evidence.moves if move.happened and move.invoke.op == invoke.op)
    return any(_payers(evidence, move) is not None for move in mine)


def explained(evidence: RunEvidence, mismatch: Mismatch) -> str:
    """Which finding's doing the wrong counter is: "mirror-move" or "es-move", "" if it is neither's. All counters that
    were read with it must be as the findings have them, those that look right as well."""
    entry = next(entry for entry in evidence.ledger.entries if entry.record.seq == mismatch.record)
    mirrors, moves = by_mirrors(evidence, mismatch.record), by_es_moves(evidence, mismatch.record)
    charges = [world.charges for world in entry.worlds]
    for place, seen in read(entry.record).items():
        if not any(charge[place] + mirrors[place] + moves[place] == seen for charge in charges):
            return ""
    by = [name for name, off in (("mirror-move", mirrors), ("es-move", moves)) if off[mismatch.where, mismatch.key]]
    return by[0] if len(by) == 1 else ""


def peak_explained(evidence: RunEvidence, mismatch: Mismatch) -> str:
    """The same of a misc.peak, which is no more too high than there were moves to make it so. One that failed has been
    charged as well, until it did."""
    mirrors = moves = 0
    for move in (move for move in evidence.moves if move.invoke.seq < mismatch.record):
        home = evidence.home(move.invoke)
        if mismatch.key == "sev" and mismatch.where in levels(home):
            worlds = evidence.ledger.during.get(move.invoke.op, frozenset())
            of_mirror = any(world.mirror(move.source) for world in worlds)
            mirrors += of_mirror
            moves += not of_mirror and evidence.key(move.source) == ES
        payers = _payers(evidence, move) if move.happened else None
        moves += mismatch.key == ES and payers is not None and mismatch.where in levels(payers[0])
    if mismatch.seen - max(mismatch.expected) > mirrors + moves:
        return ""
    return "mirror-move" if mirrors else "es-move"


def all_explained(evidence: RunEvidence, seq: int, left: Mapping[tuple[str, str], int]) -> str:
    """The same of all that is charged where nothing is due."""
    for name, by in (("mirror-move", by_mirrors), ("es-move", by_es_moves)):
        off = by(evidence, seq)
        if left and dict(left) == {place: value for place, value in off.items() if value}:
            return name
    return ""
