# SPDX-License-Identifier: Apache-2.0
"""One record of a run that breaks a promise is taken away, repeated or altered: the run does not keep the promise then.

It may be unknown, or broken otherwise. Only who alters the very answer or counter that broke it can make it kept, and
each such way is listed (`EVIDENCE`). Whatever was done to a history, every promise is given a verdict.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from chaos.history.records import Done, History, Invoke, Record
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome, RunVerdict, Verdict
from chaos.promises import PROMISES
from tests.unit.core.doctoring import BROKEN, altered
from tests.unit.core.removal import KEPT, experiment_of, read_again

EVIDENCE: dict[tuple[str, str], str] = {
    ("p3-source-answers", "move of new"): "a source whose move has failed must answer",
    ("p4-none-owns", "guest_status of new"): "it is the answer that nobody owns the context",
    ("p4-firmware-counts", "Observation"): "it is the count that was wrong",
    ("p5-stopped", "Counted"): "it is the counter that stood still, or where it had been before",
    ("p5-stopped-after-failure", "Counted"): "it is the counter that stood still, or where it had been before",
    ("p6-refused-again", "move of new"): "a move that succeeds was not refused again",
    ("p6-guests", "Observation"): "it is the count that was wrong, or what it is measured against",
    ("p8-outlives-its-signal", "move of new"): "a move that has answered had ended before its process did",
    ("p9-guest-left", "Observation"): "it is the count that was wrong, or what it is measured against",
    ("p12-warning", "Kernel"): "a log without its warning is a quiet one; that a line was lost is noted (Note)",
}
"""Where a run may become one that keeps the promise: the history, what of it, and why."""


EXCUSES = {("p12-held", "Kernel"): "a task that is reported as hung is so until its stack says what it waits behind"}


@cache
def base(name: str) -> tuple[History, Verdict]:
    promise, _, make = BROKEN[name]
    history = make()
    return history, verdict_of(promise, judged(name, history))


def judged(name: str, history: History) -> RunVerdict:
    return judge(experiment_of(BROKEN[name][1]), history)


def verdict_of(promise: str, run: RunVerdict) -> Verdict:
    return next(verdict for verdict in run.verdicts if verdict.promise == promise)


def named(history: History, record: Record) -> str:
    """What the record is, as the exceptions name it."""
    if not isinstance(record, Done):
        return type(record).__name__
    invoke = next(r for r in history.records if isinstance(r, Invoke) and r.op == record.op)
    return f"{invoke.f} of {invoke.args.get('vm')}"


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_doctored_breaks_its_promise(name: str) -> None:
    _, verdict = base(name)
    assert verdict.outcome is Outcome.BROKEN, verdict.reason


def test_for_every_promise_there_is_a_run_that_breaks_it() -> None:
    assert {promise for promise, _, _ in BROKEN.values()} == PROMISES.keys()
    assert {name for name, _ in EVIDENCE} <= BROKEN.keys()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(BROKEN)),
    which=st.integers(min_value=0, max_value=10_000),
    way=st.sampled_from(["taken away", "repeated", "altered"]),
    by=st.sampled_from([-1, 1]) | st.integers(min_value=-1000, max_value=1000).filter(bool),
    how=st.integers(min_value=0, max_value=100),
)
def test_a_broken_promise_is_not_kept_when_one_record_is_doctored(
    name: str, which: int, way: str, by: int, how: int
) -> None:
    history, before = base(name)
    record = history.records[which % len(history.records)]
    others = altered(record, by) if way == "altered" else []
    ways: dict[str, list[Record]] = {"taken away": [], "repeated": [record, record]}
    instead = ways.get(way, [others[how % len(others)]] if others else [record])
    changed = [new for old in history.records for new in (instead if old is record else [old])]
    run = judged(name, read_again(changed))
    assert {verdict.promise for verdict in run.verdicts} == PROMISES.keys()
    after = verdict_of(before.promise, run)
    event(f"{way}: {after.outcome.value}")
    if after.outcome in (Outcome.KEPT, Outcome.SKIPPED):
        what = named(history, record)
        assert (name, what) in EVIDENCE and (way == "altered" or what == "Kernel"), f"{what} was {way}: {after.reason}"
        assert record.seq in before.records, f"record {record.seq} is no evidence: {before.reason}"


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(KEPT)), which=st.integers(min_value=0, max_value=10_000))
def test_a_kept_promise_is_not_broken_when_one_record_is_missing(name: str, which: int) -> None:
    kept = KEPT[name]
    records = kept.make().records
    gone = records[which % len(records)]
    verdict = kept.judged(read_again(record for record in records if record is not gone))
    event(verdict.outcome.value)
    if (name, named(History(records), gone)) not in EXCUSES:
        assert verdict.outcome in (Outcome.KEPT, Outcome.UNKNOWN), verdict.reason


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(BROKEN)),
    doctored=st.lists(st.tuples(st.integers(0, 10_000), st.integers(-9, 9), st.integers(0, 100)), max_size=6),
)
def test_every_promise_has_a_verdict_whatever_was_done_to_a_history(
    name: str, doctored: list[tuple[int, int, int]]
) -> None:
    records = list(base(name)[0].records)
    for which, by, how in doctored:
        at = which % len(records)
        others = [*altered(records[at], by), None]
        records[at : at + 1] = [other for other in [others[how % len(others)]] if other is not None]
    run = judged(name, read_again(records))
    assert {verdict.promise for verdict in run.verdicts} == PROMISES.keys()
    assert all(verdict.reason for verdict in run.verdicts)
