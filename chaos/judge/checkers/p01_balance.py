# SPDX-License-Identifier: Apache-2.0
"""P1, balance: an ASID in use is charged exactly once, under its own key, to exactly one cgroup and its ancestors.

Every observation is compared with the ledger; misc.peak, where there is one, with the most that the ledger had at any
moment. The promise is shown only if a charge was seen before the move and
another after it, unless both sides of the move were killed: counters that read zero throughout fit a ledger that nobody
put to the test.
"""

from __future__ import annotations

from collections.abc import Iterator

from chaos.experiment.model import Experiment
from chaos.experiment.steps import MigrateStep, MovesStep, MoveStep, walk
from chaos.history.reading import charged
from chaos.history.records import History, Observation, Traced
from chaos.judge.evidence import RunEvidence
from chaos.judge.finding_counters import explained, peak_explained
from chaos.judge.ledger.peaks import peaks_of
from chaos.judge.ledger.replay import Entry, Mismatch
from chaos.judge.ledger.world import GONE
from chaos.judge.parts import broken, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P1"
_WHEN = ("before-move", "in-move", "after-move", "after-mirror-move", "after-close")
_BY_ES_MOVE = "under-wrong-key-after-es-move"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    wrong = evidence.ledger.mismatches("charge", "peak", "answer")
    if wrong:
        return _deviated(evidence, wrong)
    if evidence.ledger.lost:
        return unknown(PROMISE, f"what must be charged cannot be told: {evidence.ledger.lost}")
    charged = [entry for entry in evidence.observations if shows_charge(entry)]
    if any(isinstance(step, MoveStep | MovesStep | MigrateStep) for _, step in walk(experiment.script)):
        if not evidence.moves:
            return unknown(PROMISE, f"{evidence.untried}, so no charge had to follow one")
        if evidence.settled is None:
            last = evidence.moves[-1]
            return unknown(PROMISE, f"{last}: the charges after it cannot be asked for", last.records)
        begun, over = evidence.moves[0].invoke.seq, evidence.settled
        before = [entry for entry in charged if entry.record.seq < begun]
        after = [entry for entry in charged if entry.record.seq > over] or _nobody_left(evidence, over)
    else:
        before, after = charged[:1], charged[1:]
    for side, name in ((before, "before"), (after, "after")):
        if not side:
            few = f"{len(charged)} observations show a charge, and two are needed to compare"
            return unknown(PROMISE, f"no observation shows a charge {name} the move" if evidence.moves else few)
    seen = [entry.record for entry in evidence.observations]
    peaks = any(peaks_of(record) for record in seen if isinstance(record, Observation))
    higher = "no counter was ever higher (misc.peak)" if peaks else "this kernel has no misc.peak to ask about between"
    text = f"{len(seen)} observations fit the ledger: {paid(before[-1])} before, {paid(after[0])} after; {higher}"
    return kept(PROMISE, text, seen)


def shows_charge(entry: Entry) -> bool:
    """Whether the observation read every counter of every cgroup that had to be charged, and one had to be. One that
    was removed has no counters, but those above it count on."""
    record = entry.record
    if not isinstance(record, Observation):
        return False
    read = {cgroup for cgroup, files in record.misc.items() if "current" in files}
    return all(
        world.contexts and {cgroup for cgroup, _ in world.charges if GONE not in cgroup} <= read for world in entry.fits
    )


def _nobody_left(evidence: RunEvidence, over: int) -> list[Entry]:
    """The observations after record `over` by when every process that the moves were between had been killed."""
    agents = {evidence.agent(vm) for move in evidence.moves for vm in (move.source, move.destination)}
    ends = [evidence.exited(agent) for agent in agents]
    killed = [exited.seq for exited in ends if exited is not None and exited.status < 0]
    if len(killed) < len(agents):
        return []
    return [entry for entry in evidence.observations if entry.record.seq > max(over, *killed)]


def paid(entry: Entry) -> str:
    """What each cgroup but the run's own was charged in the observation: "source sev 1"."""
    record = entry.record
    assert isinstance(record, Observation)
    charges = [
        f"{cgroup} {key} {charged(value)}"
        for cgroup, files in sorted(record.misc.items())
        for key, value in sorted(files.get("current", {}).items())
        if value and cgroup != "."
    ]
    return ", ".join(charges) or "nothing"


def _deviated(evidence: RunEvidence, wrong: tuple[Mismatch, ...]) -> Verdict:
    by_seq = {entry.record.seq: entry.record for entry in evidence.ledger.entries}
    told = [_told(evidence, mismatch) for mismatch in wrong]
    more = f", and {len(told) - 3} more" if len(told) > 3 else ""
    return broken(
        PROMISE,
        "; ".join(text for text, _ in told[:3]) + more,
        (*(by_seq[mismatch.record] for mismatch in wrong), *_charges(evidence, wrong)),
        signature="+".join(sorted(_first({signature for _, signature in told}))),
        expected="; ".join(f"{m.where} {m.key} {_values(m)}" for m in wrong),
        seen="; ".join(f"{m.where} {m.key} {m.seen}" for m in wrong),
    )


def _charges(evidence: RunEvidence, wrong: tuple[Mismatch, ...]) -> Iterator[Traced]:
    """What the kernel was seen to charge to the cgroups that are wrong, and to give back, up to then. They show who did
    it; that it is wrong rests on the counters."""
    records = evidence.history.records
    cgroups = {mismatch.where for mismatch in wrong}
    last = max(records[mismatch.record].t for mismatch in wrong)
    for record in records:
        if isinstance(record, Traced) and record.t <= last and record.values.get("cgroup") in cgroups:
            yield record
            if (answer := evidence.during.left(record)) is not None:
                yield answer


def _told(evidence: RunEvidence, mismatch: Mismatch) -> tuple[str, str]:
    """What is wrong, in words and as a signature."""
    if mismatch.kind == "answer":
        text = f"{mismatch.key} of {mismatch.where} failed, but its charge had been taken over"
        return text, f"failed-but-charged:{mismatch.key}"
    label = _label(evidence, mismatch.record)
    if mismatch.kind == "peak":
        return _told_of_peak(evidence, mismatch, label)
    when = _when(evidence, mismatch)
    if when == _BY_ES_MOVE:
        text = f"{_counter(mismatch)}, expected {_values(mismatch)} (observation {label!r})"
        return f"{text}, as if a moved SEV-ES context went by the key sev", when
    way = "miscounted"
    if mismatch.seen < 0:
        way = "below-zero"
    elif mismatch.seen > max(mismatch.expected):
        way = "overcharged"
    elif mismatch.seen < min(mismatch.expected):
        way = "undercharged"
    moment = when.replace("-", " the ", 1).replace("-", " ")
    text = f"{_counter(mismatch)}, expected {_values(mismatch)} (observation {label!r}, {moment})"
    return text, f"{way}-{when}:{mismatch.key}"


def _told_of_peak(evidence: RunEvidence, mismatch: Mismatch, label: str) -> tuple[str, str]:
    """The same of a counter that was too high at some moment that nobody looked at."""
    text = f"{_counter(mismatch)}, expected at most {_values(mismatch)} (up to observation {label!r})"
    match peak_explained(evidence, mismatch):
        case "es-move":
            return f"{text}, as if a moved SEV-ES context went by the key sev", _BY_ES_MOVE
        case "mirror-move":
            return text, f"overcharged-after-mirror-move:{mismatch.key}"
    begun = any(move.invoke.seq < mismatch.record for move in evidence.moves)
    return text, f"peak-too-high-{'after-move' if begun else 'before-move'}:{mismatch.key}"


def _counter(mismatch: Mismatch) -> str:
    file = "misc.peak" if mismatch.kind == "peak" else "misc.current"
    return f"{mismatch.where}: {file} {mismatch.key} = {mismatch.seen}"


def _first(signatures: set[str]) -> set[str]:
    """Each kind of miscount under each key where it is first seen: what is wrong after the move stays wrong."""
    first: dict[tuple[str, str], str] = {}
    for when in _WHEN:
        for signature in sorted(signatures):
            way, found, key = signature.partition(f"-{when}:")
            if found:
                first.setdefault((way, key), signature)
    return {*first.values(), *(s for s in signatures if s == _BY_ES_MOVE or s.startswith("failed-"))}


def _values(mismatch: Mismatch) -> str:
    return " or ".join(str(value) for value in sorted(mismatch.expected))


def _when(evidence: RunEvidence, mismatch: Mismatch) -> str:
    record = mismatch.record
    if not evidence.moves or record < evidence.moves[0].invoke.seq:
        return "before-move"
    begun = [move for move in evidence.moves if move.invoke.seq < record]
    if any(move.over is None or record < move.over for move in begun):
        return "in-move"
    by = explained(evidence, mismatch)
    if by == "es-move":
        return _BY_ES_MOVE
    worlds = next(entry.worlds for entry in evidence.ledger.entries if entry.record.seq == record)
    if not any(world.contexts for world in worlds):
        return "after-close"
    return "after-mirror-move" if by == "mirror-move" else "after-move"


def _label(evidence: RunEvidence, record: int) -> str:
    records = (entry.record for entry in evidence.observations if entry.record.seq == record)
    return next((r.label for r in records if isinstance(r, Observation)), "")
