# SPDX-License-Identifier: Apache-2.0
"""P10, limits: `misc.max` at any level stops a charge with EBUSY and counts an event at that level.

An INIT or a move whose charge the oracle says was over a limit must have failed with EBUSY, and between the observation
before it and the one after it misc.events must have grown by one at the level of the limit and above it, and nowhere
else; misc.events.local, where there is one (6.12), at the level of the limit only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import EBUSY
from itertools import pairwise

from chaos.experiment.model import Experiment
from chaos.history.reading import KEYS, argument, errname, levels
from chaos.history.records import History, Invoke, Observation
from chaos.judge.against_oracle import Contract, Judged, events_of
from chaos.judge.evidence import RunEvidence
from chaos.judge.ledger.peaks import renews
from chaos.judge.oracle import OK
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P10"
CHARGING = ("init", "move")
_COUNTERS = ("events", "events.local")


@dataclass(frozen=True, slots=True)
class EventCounter:
    """A counter of events: of a cgroup, under a key, in a file of the misc controller's."""

    cgroup: str
    key: str
    file: str


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    contract = Contract(evidence)
    if contract.gap:
        return unknown(PROMISE, contract.gap)
    judged = [each for each in contract.judged() if each.invoke.f in CHARGING]
    parts = [part for each in judged for part in _stopped(evidence, each)]
    for before, after in pairwise(contract.observations):
        parts += _events(contract, judged, before, after)
    met = [each for each in judged if each.limits and not each.gap]
    if not met:
        parts.append(unknown(PROMISE, "no limit was in the way of a charge"))
    for each in met:
        counted = any(o.seq < each.invoke.seq for o in contract.observations)
        counted &= any(o.seq > each.done.seq for o in contract.observations)
        if not counted:
            parts.append(unknown(PROMISE, f"the events around {each.invoke.f} were not read", (each.invoke, each.done)))
    return combine(PROMISE, parts)


def _stopped(evidence: RunEvidence, each: Judged) -> Iterator[Verdict]:
    """A charge over a limit was refused."""
    records = (each.invoke, each.done)
    vm = argument(each.invoke, "vm")
    if each.gap and each.answer.errno:
        yield unknown(PROMISE, f"{each.invoke.f} of {vm}: {each.gap}", records)
    if each.gap or not each.limits:
        return
    if each.answer.errno == EBUSY:
        yield kept(PROMISE, f"{each.in_the_way} stopped {each.invoke.f} of {vm}", records)
    elif OK not in each.allowed and each.answer == OK:
        yield broken(
            PROMISE,
            f"{each.invoke.f} of {vm} succeeded over {each.in_the_way}",
            records,
            signature=f"over-limit:{each.invoke.f}:{_key(evidence, each.invoke)}{'-as-sev' * (each.as_sev == OK)}",
            expected="EBUSY",
            seen=errname(each.answer.errno),
        )


def _events(contract: Contract, judged: Sequence[Judged], before: Observation, after: Observation) -> Iterator[Verdict]:
    """Between two observations every counter of events has grown by what was refused there. An operation of which
    nobody can say what came of it may have been refused as well, so there may be more events, but not fewer."""
    evidence = contract.evidence
    unclear = any(each.gap for each in judged if _between(each.invoke.seq, each.done.seq, before, after))
    unclear |= any(
        done is None or done.outcome == "info"
        for invoke, done in evidence.operations
        if invoke.f in CHARGING and invoke.seq < after.seq and (done is None or done.seq > before.seq)
    )
    changes = [invoke for invoke, done in contract.changes if _between(invoke.seq, done.seq, before, after)]
    limits = {limit for each in judged for limit in each.limits}
    due_in = {level for limit in limits for level in levels(limit)}  # also where nobody read them
    for cgroup in sorted({*before.misc, *after.misc, *due_in}):
        if any(renews(change, cgroup) for change in changes):
            continue
        for key in KEYS:
            for counter in _COUNTERS:
                yield from _counted(
                    evidence, judged, before, after, EventCounter(cgroup, key, counter), unclear=unclear
                )


def _counted(
    evidence: RunEvidence,
    judged: Sequence[Judged],
    before: Observation,
    after: Observation,
    at: EventCounter,
    *,
    unclear: bool,
) -> Iterator[Verdict]:
    """One counter. misc.events.local is only there since 6.12."""
    first, last = (events_of(record, at.cgroup, at.key, at.file) for record in (before, after))
    low, high = due(evidence, judged, before, after, at)
    if first is None or last is None:
        if high and at.file == "events":
            yield unknown(PROMISE, f"the events of {at.cgroup} were not read", (before, after))
        return
    grown, local = last - first, " of its own" * (at.file != "events")
    told = f"{at.cgroup} counted {grown} events of {at.key}{local}"
    if grown > high and unclear:
        yield unknown(PROMISE, f"{told}, and nobody can say what was refused meanwhile", (before, after))
    elif not low <= grown <= high:
        way = "missing" if grown < low else "unexplained"
        fewest, most = due(evidence, judged, before, after, at, as_sev=True)
        if fewest <= grown <= most:
            way = "under-wrong-key"
        elif at.file != "events":
            way = f"{way}-local"
        yield broken(
            PROMISE,
            f"{told} from {before.label!r} to {after.label!r}",
            (before, after),
            signature=f"event-{way}:{at.key}",
            expected=str(low) if low == high else f"{low} to {high}",
            seen=str(grown),
        )
    elif low:
        yield kept(PROMISE, told, (before, after))


def _between(begun: int, over: int, before: Observation, after: Observation) -> bool:
    return begun < after.seq and over > before.seq


def due(
    evidence: RunEvidence,
    judged: Sequence[Judged],
    before: Observation,
    after: Observation,
    at: EventCounter,
    *,
    as_sev: bool = False,
) -> tuple[int, int]:
    """The fewest and the most events that must have been counted there; `as_sev` if moves of SEV-ES contexts went by
    the wrong key, which is what a finding is about."""
    low = high = 0
    for each in judged:
        if each.answer.errno != EBUSY or not _between(each.invoke.seq, each.done.seq, before, after):
            continue
        astray = as_sev and each.as_sev is not None
        if ("sev" if astray else _key(evidence, each.invoke)) != at.key:
            continue
        answers = {each.as_sev} if astray and each.as_sev is not None else each.allowed
        limits = [answer.at for answer in answers if answer.errno == EBUSY]
        hits = [bool(limit) and at.cgroup in (levels(limit) if at.file == "events" else (limit,)) for limit in limits]
        whole = before.seq < each.invoke.seq and each.done.seq < after.seq and not each.gap
        low += bool(hits) and all(hits) and whole
        high += any(hits)
    return low, high


def _key(evidence: RunEvidence, invoke: Invoke) -> str:
    return argument(invoke, "key") or evidence.key(argument(invoke, "source"))
