# SPDX-License-Identifier: Apache-2.0
"""Histories of moves that were under way together: right ones are held, doctored ones are not."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO, ENOTTY

import msgspec
import pytest

from chaos.experiment import load, model
from chaos.history.records import Done, History, Value
from chaos.judge.checkers import CHECKERS
from chaos.judge.judge import shortcomings
from chaos.judge.ledger.replay import replay
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE, see

HELD, DEVIATED, UNKNOWN = Outcome.KEPT, Outcome.BROKEN, Outcome.UNKNOWN


def judged(promise: str, history: History) -> Verdict:
    return CHECKERS[promise](shipped(MOVE), history)


def begun() -> Builder:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("one", "destination")
    b.launch("two", "destination")
    b.status("old", "source")
    see(b, "before", {"source": 1})
    for _ in range(2):
        b.do("send_fd", "source", vm="old", to="destination")
    return b


def ended(b: Builder, owner: str, *, other: str) -> History:
    b.observe("after", {"destination": 1})
    b.status(owner, "destination")
    b.status(other, "destination", error=25)
    for vm in ("one", "two"):
        b.ask(vm, "destination", dead=False)
    b.ask("old", "source", dead=True)
    return b.finish()


def two_at_once(*, winners: int, error: int = EINVAL, charged: int = 1) -> History:
    """Two destinations for one source, both under way before either is answered."""
    b = begun()
    one = b.invoke("move", "destination", vm="one", source="old")
    two = b.invoke("move", "destination", vm="two", source="old")
    began = b.tick()
    b.done(two)
    if winners == 2:
        b.done(one)
    else:
        b.done(one, "fail", error=error)
    b.records[-2:] = [msgspec.structs.replace(done, began=began) for done in b.records[-2:] if isinstance(done, Done)]
    b.observe("after", {"destination": charged}, guests=1)
    b.status("two", "destination")
    b.status("one", "destination", error=25)
    b.ask("old", "source", dead=True)
    return b.finish()


@pytest.mark.parametrize("error", [EINVAL, EBUSY])
def test_one_of_two_gets_the_guest(error: int) -> None:
    history = two_at_once(winners=1, error=error)
    for promise in ("P1", "P3", "P4", "P7", "P8"):
        verdict = judged(promise, history)
        assert verdict.outcome is HELD, (promise, verdict.reason)


def test_not_both_of_two() -> None:
    assert replay(two_at_once(winners=2)).lost
    assert judged("P4", two_at_once(winners=2)).outcome is not HELD
    assert judged("P7", two_at_once(winners=2)).outcome is not HELD


def test_charged_once_whoever_got_it() -> None:
    assert judged("P1", two_at_once(winners=1, charged=2)).outcome is DEVIATED


def test_an_errno_that_no_order_explains() -> None:
    verdict = judged("P7", two_at_once(winners=1, error=12))
    assert verdict.outcome is DEVIATED and "ENOMEM" in verdict.seen


def moved_into_the_dead(*, charged: str = "source", error: int = EIO) -> History:
    """The source moves from the destination meanwhile, and its call is over later: both succeed (finding 0007)."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    see(b, "before", {"source": 1})
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("send_fd", "destination", vm="new", to="source")
    slow = b.invoke("move", "source", vm="old", source="new")
    b.move("old", "new", "destination")
    b.records[-1] = msgspec.structs.replace(b.done(slow), began=slow.t)
    see(b, "after", {charged: 1})
    b.status("old", "source", error=error)
    b.status("new", "destination", error=EIO)
    b.ask("old", "source", dead=True)
    b.ask("new", "destination", dead=True)
    return b.finish()


def test_a_dead_vm_with_the_guest_is_no_owner() -> None:
    history = moved_into_the_dead()
    assert not replay(history).lost
    assert (judged("P4", history).outcome, judged("P4", history).signature) == (DEVIATED, "owner-died-in-move")
    assert judged("P7", history).outcome is DEVIATED and judged("P7", history).seen == "ok"
    assert [judged(promise, history).outcome for promise in ("P1", "P3")] == [HELD, HELD]


def test_a_dead_vm_with_the_guest_is_charged_for_it() -> None:
    assert judged("P1", moved_into_the_dead(charged="destination")).outcome is DEVIATED


def test_a_dead_vm_that_answers_is_not_dead() -> None:
    assert judged("P3", moved_into_the_dead(error=ENOTTY)).outcome is DEVIATED


def loops(*, moved: tuple[tuple[str, str, str], ...], told: dict[str, Value] | None = None) -> Builder:
    """A loop of moves into `one`, another into `two`; `moved` are (destination, source, loop) of those that succeeded,
    as they are put into the history behind the loops."""
    b = begun()
    answers: dict[str, dict[str, Value]] = {"one": {"old EBUSY": 7}, "two": {"one EINVAL": 5}}
    begin = {vm: b.invoke("moves", "destination", vm=vm, sources=["old", "one"], rounds=9) for vm in ("one", "two")}
    inside = b.tick()
    for vm, invoke in begin.items():
        done = b.done(invoke, value=answers[vm] if told is None else told)
        b.records[-1] = msgspec.structs.replace(done, began=inside, ended=b.tick() + 50_000_000)
    for number, (destination, source, of) in enumerate(moved):
        at = inside + number * 1000
        move = b.invoke("move", "destination", vm=destination, source=source, of=begin[of].op)
        b.records[-1] = msgspec.structs.replace(move, t=at)
        done = b.done(move)
        b.records[-1] = msgspec.structs.replace(done, began=at, ended=at + 500)
    return b


def later(b: Builder) -> Builder:
    """The clock goes on behind the loops."""
    for _ in range(80):
        b.tick()
    return b


def test_the_moves_of_loops_are_moves() -> None:
    history = ended(later(loops(moved=(("one", "old", "one"),))), "one", other="two")
    for promise in ("P1", "P3", "P4", "P7", "P8"):
        verdict = judged(promise, history)
        assert verdict.outcome is HELD, (promise, verdict.reason)


def test_a_chain_through_two_loops() -> None:
    b = later(loops(moved=(("one", "old", "one"), ("two", "one", "two"))))
    b.observe("after", {"destination": 1})
    b.status("two", "destination")
    b.ask("one", "destination", dead=True)
    b.ask("old", "source", dead=True)
    history = b.finish()
    assert not replay(history).lost
    for promise in ("P1", "P3", "P4"):
        verdict = judged(promise, history)
        assert verdict.outcome is HELD, (promise, verdict.reason)


def test_a_success_that_was_not_recorded_is_not_assumed() -> None:
    """The loops are over, and no move of theirs took the guest away: then the charge must be where it was."""
    b = later(loops(moved=()))
    b.observe("after", {"destination": 1})
    assert judged("P1", b.finish()).outcome is DEVIATED
    b = later(loops(moved=()))
    b.observe("after", {"source": 1})
    assert judged("P1", b.finish()).outcome is HELD


def test_the_same_guest_cannot_be_taken_twice() -> None:
    assert replay(later(loops(moved=(("one", "old", "one"), ("two", "old", "two")))).finish()).lost


def test_answers_of_a_loop_are_held_against_the_contract() -> None:
    told: dict[str, Value] = {"old EBUSY": 7, "old ENOMEM": 1}
    verdict = judged("P7", ended(later(loops(moved=(("one", "old", "one"),), told=told)), "one", other="two"))
    assert verdict.outcome is DEVIATED and verdict.seen == "ENOMEM"


def experiment_with_together() -> model.Experiment:
    together = b"""{"name": "by-hand", "why": "w", "promises": ["P8"], "vmms": {"m": {"cgroup": "c"}},
     "vms": {"a": {"vmm": "m", "kind": "plain"}, "b": {"vmm": "m", "kind": "plain"}}, "script": [
     {"do": "together", "steps": [{"do": "move", "source": "a", "destination": "b"},
                                  {"do": "move", "source": "b", "destination": "a"}]}]}"""
    return load.decode(together)


@pytest.mark.parametrize(("first", "second", "void"), [((10, 20), (15, 30), False), ((10, 20), (21, 30), True)])
def test_what_did_not_overlap_shows_nothing(first: tuple[int, int], second: tuple[int, int], void: bool) -> None:
    b = Builder()
    b.begin()
    for vm, (began, over) in (("a", first), ("b", second)):
        done = b.done(b.invoke("move", "source", step=0, vm=vm, source="x"), "fail", error=EINVAL)
        b.records[-1] = msgspec.structs.replace(done, began=began, ended=over)
    said = [text for text in shortcomings(experiment_with_together(), b.finish()) if "overlapped" in text]
    assert bool(said) == void


def test_a_loop_and_the_moves_that_it_is_made_of_do_not_overlap() -> None:
    b = Builder()
    b.begin()
    loop = b.invoke("moves", "source", step=0, vm="a", sources=["b"])
    part = b.invoke("move", "source", step=0, vm="a", source="b", of=loop.op)
    for invoke in (part, loop):
        b.records[-1] = msgspec.structs.replace(b.done(invoke, "fail", error=EINVAL), began=10, ended=20)
    assert any("overlapped" in text for text in shortcomings(experiment_with_together(), b.finish()))


def test_what_was_never_answered_is_not_known_to_have_overlapped() -> None:
    b = Builder()
    b.begin()
    b.done(b.invoke("move", "source", step=0, vm="a", source="b"), "fail", error=EINVAL)
    b.invoke("move", "source", step=0, vm="b", source="a")
    assert any("overlapped" in text for text in shortcomings(experiment_with_together(), b.history()))
