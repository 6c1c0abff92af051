# SPDX-License-Identifier: Apache-2.0
"""P2, one charge per ASID: what uses no ASID of its own pays nothing, so a mirror does not, wherever it goes.

Counters that fit the ledger while a mirror lives show it, if its owner's charge is among them. A charge too many is
named by what the mirror had done before it was first seen: become one, or been moved.
"""

from __future__ import annotations

from chaos.experiment.model import Experiment
from chaos.history.reading import argument, levels
from chaos.history.records import Done, History, Invoke
from chaos.judge.checkers.p01_balance import paid, shows_charge
from chaos.judge.evidence import RunEvidence
from chaos.judge.finding_counters import explained
from chaos.judge.ledger.replay import Entry
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P2"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    made = _made(evidence)
    if not made:
        return unknown(PROMISE, "no mirror was made, so none could be charged")
    parts = [part for entry in evidence.observations for part in _entry(evidence, made, entry)]
    lived = [entry for entry in evidence.observations if _with_mirror(entry)]
    good = [entry for entry in lived if not entry.mismatches]
    if evidence.ledger.lost:
        parts.append(unknown(PROMISE, f"what must be charged cannot be told: {evidence.ledger.lost}"))
    elif good:
        told = f"{len(good)} observations while a mirror lived: only its owner is charged ({paid(good[-1])})"
        parts.append(kept(PROMISE, told, [entry.record for entry in good]))
    if not lived:
        parts.append(unknown(PROMISE, "the counters were not read while a mirror lived"))
    moves = [
        move for move in evidence.moves if move.happened is not False and any(_is_mirror(evidence, made, move.source))
    ]
    for move in moves:
        if not any(entry.record.seq > (move.over or 0) for entry in lived):
            parts.append(unknown(PROMISE, f"{move}, and the counters were not read while it lived on", move.records))
    return combine(PROMISE, parts)


def _made(evidence: RunEvidence) -> dict[str, tuple[Invoke, Done]]:
    """The mirrors, by name."""
    return {
        argument(invoke, "vm"): (invoke, done)
        for invoke, done in evidence.operations
        if invoke.f == "mirror" and done is not None and evidence.ledger.happened(invoke, done)
    }


def _is_mirror(evidence: RunEvidence, made: dict[str, tuple[Invoke, Done]], vm: str) -> list[str]:
    """The mirrors that the VM is, or has become by moves."""
    return [name for name in made if vm in evidence.lineage(name)]


def _with_mirror(entry: Entry) -> bool:
    """A mirror lived, and every counter was read of whatever was charged."""
    return shows_charge(entry) and all(world.mirrors for world in entry.fits)


def _entry(evidence: RunEvidence, made: dict[str, tuple[Invoke, Done]], entry: Entry) -> list[Verdict]:
    """A charge too many, in a cgroup where a mirror was made or moved to before."""
    parts: list[Verdict] = []
    for mismatch in entry.mismatches:
        if mismatch.kind != "charge" or mismatch.seen <= max(mismatch.expected):
            continue
        how, records = _since(evidence, made, mismatch.where, entry.record.seq)
        if how == "moved-mirror" and not explained(evidence, mismatch):
            how = "moved-mirror-and-more"
        if how:
            due = " or ".join(str(value) for value in sorted(mismatch.expected))
            text = f"a {how.replace('-', ' ')} is charged: {mismatch.where} {mismatch.key} {mismatch.seen} for {due}"
            parts.append(
                broken(
                    PROMISE,
                    text,
                    (*records, entry.record),
                    signature=f"{how}-is-charged:{mismatch.key}",
                    expected=f"{mismatch.where} {mismatch.key} {due}",
                    seen=f"{mismatch.where} {mismatch.key} {mismatch.seen}",
                )
            )
    return parts


def _since(
    evidence: RunEvidence, made: dict[str, tuple[Invoke, Done]], cgroup: str, seq: int
) -> tuple[str, tuple[Invoke | Done, ...]]:
    """What a mirror last did in the cgroup, or one below it, before that record: "moved-mirror" or "mirror"."""
    found: list[tuple[str, tuple[Invoke | Done, ...]]] = []
    for invoke, done in evidence.operations:
        if done is None or done.seq > seq or not evidence.ledger.happened(invoke, done):
            continue
        if cgroup not in levels(evidence.home(invoke)):
            continue
        if invoke.f == "mirror" and not found:
            found.append(("mirror", (invoke, done)))
        elif invoke.f == "move" and _is_mirror(evidence, made, argument(invoke, "source")):
            found.append(("moved-mirror", (invoke, done)))
    return found[-1] if found else ("", ())
