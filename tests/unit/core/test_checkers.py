# SPDX-License-Identifier: Apache-2.0
"""All checkers: they hold on the shipped experiments, and nothing is shown by what did not happen."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

import experiments
from chaos.history.reading import errname
from chaos.history.records import History, Note
from chaos.judge.checkers import CHECKERS
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Outcome
from chaos.promises import PROMISES
from tests.unit.core.build import ALL, Builder, destination_killed, moved, moved_es, shipped, source_killed
from tests.unit.core.doctored import ES, MOVE, RESTS_ON, again, chain, check


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_that_keeps_its_promises(name: str) -> None:
    experiment = shipped(name)
    for promise in experiment.promises:
        expected = Outcome.KEPT
        if promise in experiment.unaskable:
            expected = Outcome.UNKNOWN
        if (promise, name) == ("P5", ES):
            expected = Outcome.SKIPPED
        verdict = check(promise, name)
        assert (promise, verdict.outcome) == (promise, expected), verdict.reason
        assert verdict.promise == promise
        stated = experiment.unaskable.get(promise)
        assert verdict.signature == (stated.signature if stated is not None else "+".join(verdict.skips))


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P6"])
def test_without_a_move_nothing_is_shown(promise: str) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.observe("before", {"source": 1})
    b.observe("after", {"source": 1})
    verdict = CHECKERS[promise](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "move" in verdict.reason


@pytest.mark.parametrize("promise", sorted(CHECKERS))
def test_an_empty_history_shows_nothing(promise: str) -> None:
    outcome = CHECKERS[promise](shipped(MOVE), History((), "it is empty")).outcome
    assert outcome is Outcome.UNKNOWN


def test_a_vm_that_is_told_to_move_into_itself() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "old", "source", error=errno.EINVAL)
    b.observe("after", {"source": 1})
    b.count("old", "source", 20)
    b.status("old", "source")
    b.ask("old", "source", dead=False)
    b.launch("other", "source")
    b.do("mirror", "source", error=errno.EINVAL, vm="other", source="old")
    for promise in ("P1", "P3", "P4", "P5", "P6"):
        verdict = CHECKERS[promise](shipped(MOVE), b.history())
        assert (promise, verdict.outcome) == (promise, Outcome.KEPT), verdict.reason


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P6"])
def test_a_move_that_is_tried_again(promise: str) -> None:
    verdict = CHECKERS[promise](shipped(MOVE), again().finish())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_a_move_that_is_taken_says_nothing_of_what_its_destination_owned() -> None:
    verdict = CHECKERS["P4"](shipped(MOVE), again(ask=False).finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "before the move from old to new succeeded, new was not asked whether it owns" in verdict.reason


@pytest.mark.parametrize("promise", ["P1", "P5"])
def test_a_chain_of_moves(promise: str) -> None:
    verdict = CHECKERS[promise](shipped(MOVE), chain().finish())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_combine_is_as_bad_as_the_worst_part() -> None:
    saw = (Note(seq=3, t=0, topic="left", text=""),)
    good, none, skip = kept("P1", "good", saw), unknown("P1", "none"), skipped("P1", "skip", what="x")
    assert combine("P1", []).outcome is Outcome.UNKNOWN
    assert combine("P1", [good, skip]).outcome is Outcome.SKIPPED
    assert combine("P1", [good, none, skip]).reason == "none; skip; good"
    assert (combine("P1", [good, skip]).signature, combine("P1", [skip, none]).signature) == ("skipped:x", "")
    deviation = broken("P1", "bad", saw, signature="b", expected="one", seen="two")
    both = combine("P1", [deviation, skip, none, good])
    assert (both.signature, both.deviations, both.skips) == ("b+part-unknown+skipped:x", ("b",), ("skipped:x",))
    assert combine("P1", [good, good]).reason == "good"
    twice = [kept("P1", "one; two", saw), kept("P1", "two; three", saw)]
    assert combine("P1", twice).reason == "one; two; three"


def test_errname() -> None:
    assert [errname(0), errname(5), errname(4000)] == ["ok", "EIO", "errno 4000"]


def test_a_checker_judges_every_promise_and_every_promise_is_listed_by_some_experiment() -> None:
    catalogue = {name: experiments.find(name) for name in experiments.catalogue()}
    assert len(catalogue) > 100
    for name, experiment in catalogue.items():
        assert set(experiment.promises) <= CHECKERS.keys(), name
    assert {promise for one in catalogue.values() for promise in one.promises} == CHECKERS.keys() == PROMISES.keys()


def test_notes_of_other_topics_are_no_witnesses() -> None:
    b = Builder()
    b.add(Note(t=b.tick(), topic="progress", text="the kernel log is long"))
    assert CHECKERS["P12"](shipped(MOVE), b.end()).outcome is Outcome.KEPT


@pytest.mark.parametrize("run", [moved, moved_es, destination_killed, source_killed])
def test_verdicts_point_at_the_records_behind_them(run: Callable[[], History]) -> None:
    history = run()
    name = next(n for n, f in ALL.items() if f is run)
    for promise, kinds in RESTS_ON.items():
        verdict = CHECKERS[promise](shipped(name), history)
        if verdict.outcome in (Outcome.KEPT, Outcome.BROKEN):
            pointed = [history.records[number] for number in verdict.records]
            assert any(isinstance(record, kinds) for record in pointed), (promise, verdict)
