# SPDX-License-Identifier: Apache-2.0
"""Migrations that came to nothing, or not to what was wanted: which promise each of them bears on."""

from __future__ import annotations

import errno
from typing import Literal

import msgspec
import pytest

from chaos.history.records import Handover, History
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, moved
from tests.unit.core.doctored import MOVE, answered, check, tried_again, verdict_of


def before_the_move() -> Builder:
    """A guest at the source that was asked everything, and a destination."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("run", "source", vm="old", every=1)
    b.count("old", "source", 100)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    return b


def ended(
    b: Builder, outcome: Literal["committed", "aborted", "refused", "lost"], phase: str, *, attempt: int = 1
) -> None:
    guest = {"committed": "new", "lost": ""}.get(outcome, "old")
    b.add(
        Handover(
            t=b.tick(), step=0, source="old", destination="new", attempt=attempt, outcome=outcome, phase=phase,
            guest=guest, why="something failed",
        )
    )  # fmt: skip


def after_the_abort(b: Builder) -> None:
    """The guest goes on at the source, which is asked everything once more."""
    b.do("disconnect", "source", vm="old")
    b.do("run", "source", vm="old", every=1)


def asked_at_the_source(b: Builder) -> None:
    b.observe("after", {"source": 1})
    b.count("old", "source", 300)
    b.status("old", "source")
    b.ask("old", "source", dead=False)


def arrived(b: Builder) -> None:
    """The guest moves, and everybody is asked."""
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.give_state("new", "destination")
    b.do("run", "destination", vm="new", every=1)
    b.observe("after", {"destination": 1})
    b.count("new", "destination", 300)
    b.status("new", "destination")


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P13"])
def test_without_a_move_nothing_is_held_however_well_the_guest_goes_on(promise: str) -> None:
    b = before_the_move()
    ended(b, "aborted", "send-state")
    after_the_abort(b)
    asked_at_the_source(b)
    verdict = verdict_of(promise, b.finish(watched=True))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "no move was tried; the migration from old to new was aborted in send-state" in verdict.reason


def test_p6_an_abort_before_the_move_is_no_move_that_failed() -> None:
    b = before_the_move()
    ended(b, "aborted", "connect")
    asked_at_the_source(b)
    verdict = verdict_of("P6", b.finish())
    assert (verdict.outcome, verdict.reason) == (Outcome.UNKNOWN, "no move failed, so the question was not asked")


@pytest.mark.parametrize("promise", ["P5", "P6"])
def test_a_move_that_the_kernel_was_not_asked_for_is_none(promise: str) -> None:
    """The descriptor did not arrive, so the ioctl was never made."""
    b = before_the_move()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.done(invoke, "fail", error=errno.EPIPE, value={"call": "could not receive the VM's descriptor"})
    ended(b, "aborted", "move")
    after_the_abort(b)
    asked_at_the_source(b)
    assert verdict_of(promise, b.finish()).outcome is Outcome.UNKNOWN


def test_p6_a_move_that_was_refused_is_judged() -> None:
    b = before_the_move()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.done(invoke, "fail", error=errno.EBUSY, value={"call": "KVM_ENABLE_CAP"})
    ended(b, "refused", "move")
    after_the_abort(b)
    asked_at_the_source(b)
    b.ask("new", "destination", dead=False)
    tried_again(b)
    assert verdict_of("P6", b.finish()).outcome is Outcome.KEPT


@pytest.mark.parametrize("promise", ["P5", "P6"])
def test_a_source_that_cannot_be_entered_after_a_failed_move(promise: str) -> None:
    b = before_the_move()
    b.move("old", "new", "destination", error=errno.EBUSY)
    invoke = b.invoke("run", "source", vm="old", every=1)
    b.done(invoke, "fail", error=errno.EIO, value={"call": "KVM_GET_REGS"})
    ended(b, "lost", "move")
    verdict = verdict_of(promise, b.finish())
    assert verdict.outcome is Outcome.BROKEN
    assert "not-entered-after-failed-move:KVM_GET_REGS:EIO" in verdict.signature


def test_p5_a_destination_that_cannot_be_entered() -> None:
    refused = answered("run", "new", outcome="fail", errno=errno.EINVAL, value={"call": "KVM_SET_REGS"})
    verdict = check("P5", MOVE, refused)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "not-entered-after-move:KVM_SET_REGS:EINVAL")


def test_p5_what_is_no_answer_of_the_kernel_is_not_held_against_it() -> None:
    late = answered("run", "new", outcome="fail", errno=errno.ETIMEDOUT, value={"call": "waited 5 s"})
    assert check("P5", MOVE, late).outcome is Outcome.KEPT  # it was seen to count all the same


def test_p5_a_guest_that_was_lost_with_its_destination() -> None:
    b = before_the_move()
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.kill("destination")
    ended(b, "lost", "load-state")
    b.observe("after", {})
    verdict = verdict_of("P5", b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "the process of new is dead" in verdict.reason


def test_p4_a_source_that_was_dead_before_the_move_owns_nothing() -> None:
    b = before_the_move()
    b.do("send_fd", "source", vm="old", to="destination")
    b.kill("source")
    b.move("old", "new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    assert verdict_of("P4", b.finish()).outcome is Outcome.KEPT


def started_again() -> Builder:
    """The destination died before the move and was started again, under the same name."""
    b = before_the_move()
    b.kill("destination")
    ended(b, "aborted", "send-fd")
    after_the_abort(b)
    b.spawn("destination")
    b.launch("new", "destination")
    return b


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P9", "P13"])
def test_a_destination_that_was_started_again_is_judged_like_any_other(promise: str) -> None:
    b = started_again()
    arrived(b)
    ended(b, "committed", "commit", attempt=2)
    b.ask("old", "source", dead=True)
    b.exit("destination")
    verdict = verdict_of(promise, b.finish(watched=True))
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_p4_a_death_before_an_attempt_says_nothing_about_the_process_that_made_it() -> None:
    """The second attempt failed, and nobody asked the new destination whether it owns a context as well."""
    b = started_again()
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination", error=errno.EBUSY)
    b.observe("after", {"source": 1})
    b.status("old", "source")
    b.exit("destination")
    verdict = verdict_of("P4", b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "new was not asked" in verdict.reason


def test_p9_a_destination_that_was_started_again_and_never_ended() -> None:
    b = started_again()
    arrived(b)
    verdict = verdict_of("P9", b.finish())
    assert (verdict.outcome, verdict.reason) == (
        Outcome.UNKNOWN,
        "destination still lived when the end was observed",
    )


def test_a_handover_beside_a_good_move_changes_no_verdict() -> None:
    b = Builder()
    history = moved()
    b.records = list(history.records[:-1])
    b.t = history.records[-1].t
    ended(b, "committed", "commit")
    told = b.end()
    assert isinstance(told, History) and not told.damage
    for promise in ("P1", "P3", "P4", "P5", "P9"):
        assert verdict_of(promise, told).outcome is Outcome.KEPT


Word = Literal["", "mine", "theirs"]


@pytest.mark.parametrize(
    ("source", "destination", "guest", "how"),
    [
        ("theirs", "mine", "new", ""),
        ("mine", "theirs", "old", ""),
        ("theirs", "mine", "", ""),  # it cannot run there, and is there
        ("mine", "mine", "new", "both-say-mine"),
        ("theirs", "theirs", "new", "neither-says-mine"),
        ("mine", "theirs", "new", "said-otherwise"),
        ("theirs", "", "", ""),  # one of the two is dead: nothing can be compared
        ("", "mine", "new", ""),
    ],
)
def test_p4_both_vmms_are_left_with_one_idea_of_who_has_the_guest(
    source: Word, destination: Word, guest: str, how: str
) -> None:
    b = Builder()
    history = moved()
    b.records = list(history.records[:-1])
    b.t = history.records[-1].t
    b.add(
        Handover(
            t=b.tick(), step=0, source="old", destination="new", attempt=1, outcome="committed", phase="confirm",
            guest=guest, source_says=source, destination_says=destination,
        )
    )  # fmt: skip
    verdict = verdict_of("P4", b.end())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN if how else Outcome.KEPT, how)
    assert ("after attempt 1 old says" in verdict.reason) is ("" not in (source, destination))


def paused(b: Builder, vm: str, agent: str, ticks: int) -> None:
    b.records[-1] = msgspec.structs.replace(b.count(vm, agent, ticks), paused=True)


def paused_and_moved(at_source: int, at_destination: int | None, *, phase: str | None = None) -> Builder:
    """A guest that stands at 100 ticks is looked at again after an attempt that failed, and at the destination. A `run`
    in between is the script's, or of a phase."""
    b = before_the_move()
    b.do("pause", "source", vm="old")
    paused(b, "old", "source", 100)
    ended(b, "aborted", "send-fd")
    if phase is not None:
        invoke = b.invoke("run", "source", vm="old", every=1)
        b.records[-1] = msgspec.structs.replace(invoke, phase=phase)
        b.done(invoke)
        b.do("pause", "source", vm="old")
    paused(b, "old", "source", at_source)
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.give_state("new", "destination")
    if at_destination is not None:
        paused(b, "new", "destination", at_destination)
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    return b


@pytest.mark.parametrize(
    ("at_source", "at_destination", "phase", "stood"),
    [
        (100, 100, None, True),
        (100, 101, None, False),
        (130, 130, None, False),
        (130, 130, "abort", False),  # a failed hand-over is not to wake it
        (130, 130, "", True),  # whoever paused it may
        (130, 130, "question", True),  # and the runner, when nobody needs it to stand any more
    ],
)
def test_p5_a_paused_guest_stands_where_it_stood_until_it_is_let_run(
    at_source: int, at_destination: int, phase: str | None, stood: bool
) -> None:
    b = paused_and_moved(at_source, at_destination, phase=phase)
    b.do("run", "destination", vm="new", every=1)
    b.count("new", "destination", 300)
    verdict = verdict_of("P5", b.finish())
    assert (verdict.outcome, verdict.signature) == (
        (Outcome.KEPT, "") if stood else (Outcome.BROKEN, "moved-while-paused")
    )


def test_p5_a_guest_that_nobody_let_run_is_not_seen_to_go_on() -> None:
    verdict = verdict_of("P5", paused_and_moved(100, 100).finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "it stands at new, and nobody let it run" in verdict.reason


def test_p5_a_paused_guest_that_was_resumed_is_told_of_without_any_move() -> None:
    b = before_the_move()
    b.do("pause", "source", vm="old")
    for ticks in (100, 130):
        paused(b, "old", "source", ticks)
    verdict = verdict_of("P5", b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "moved-while-paused+part-unknown")
