# SPDX-License-Identifier: Apache-2.0
"""P6: what a failed move may not leave behind."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Asked, Counted, Done, Observation, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, changed, shipped
from tests.unit.core.doctored import (
    KILL_DESTINATION,
    MOVE,
    Change,
    again,
    answered,
    charge,
    check,
    failed,
    ready,
    replaced,
    see,
    tried_again,
)


def p6(b: Builder) -> Verdict:
    return CHECKERS["P6"](shipped(KILL_DESTINATION), b.history())


def test_p6_both_are_usable() -> None:
    b = tried_again(failed())
    assert "whether new is still usable was not asked" in p6(b).reason
    b.status("new", "destination", error=errno.ENOTTY)
    assert p6(b).outcome is Outcome.KEPT
    b = tried_again(failed())
    b.ask("new", "destination", dead=False)
    assert p6(b).outcome is Outcome.KEPT
    b = tried_again(failed())
    b.do("set_state", "destination", vm="new")
    assert p6(b).outcome is Outcome.KEPT


@pytest.mark.parametrize("f", ["disconnect", "listen", "accept", "receive_state", "pause", "run", "receive_fd"])
def test_p6_what_is_no_ioctl_of_the_destination_does_not_show_that_it_is_usable(f: str) -> None:
    """A failed migration always ends with `disconnect`, and `run` answers before a vCPU comes out."""
    b = tried_again(failed())
    b.do(f, "destination", vm="new")
    verdict = p6(b)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "whether new is still usable was not asked" in verdict.reason


def test_p6_a_loop_of_moves_into_the_destination_does_not_show_that_it_is_usable() -> None:
    b = tried_again(failed())
    loop = b.invoke("moves", "destination", vm="new", sources=["old"], rounds=2, threads=1)
    b.done(loop, value={"old EIO": 2})
    assert "whether new is still usable was not asked" in p6(b).reason


def usable() -> Builder:
    """A move that failed, after which everything was asked but whether it can be tried again."""
    b = failed()
    b.status("new", "destination", error=errno.ENOTTY)
    return b


def test_p6_means_that_it_can_be_tried_again() -> None:
    verdict = p6(usable())
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, "not-tried-again")
    assert "no move or mirror of old was tried again" in verdict.reason
    assert p6(tried_again(usable())).outcome is Outcome.KEPT
    b = usable()
    b.launch("other", "destination")
    b.do("mirror", "destination", error=errno.EINVAL, vm="other", source="old")
    assert "no move or mirror of new was tried again" in p6(b).reason  # it has a flag as well


@pytest.mark.parametrize("f", ["move", "mirror"])
def test_p6_a_move_that_is_refused_again_with_nobody_in_its_way(f: str) -> None:
    """The flag of one of them was never cleared."""
    b = usable()
    see(b, "limits", {"source": 1})
    b.do(f, "destination", error=errno.EBUSY, vm="new", source="old")
    verdict = p6(b)
    assert verdict.outcome is Outcome.BROKEN
    assert "refused-again-after-failed-move:EBUSY" in verdict.signature.split("+")


@pytest.mark.parametrize("error", [errno.EBADF, errno.EFAULT])
def test_p6_what_was_refused_before_the_flags_shows_nothing(error: int) -> None:
    b = usable()
    b.do("mirror", "destination", error=error, vm="new", source="old")
    assert p6(b).signature == "not-tried-again"


def test_p6_a_retry_that_meets_a_limit_shows_nothing() -> None:
    """EBUSY is its answer, whatever the flags are."""
    b = ready()
    see(b, "limits", {"source": 1}, limits={"destination": 0})
    b.move("old", "new", "destination", error=errno.EBUSY)
    see(b, "between", {"source": 1}, limits={"destination": 0})
    b.move("old", "new", "destination", error=errno.EBUSY)
    see(b, "after", {"source": 1}, limits={"destination": 0})
    b.count("old", "source", 20)
    b.status("old", "source")
    b.status("new", "destination", error=errno.ENOTTY)
    b.ask("old", "source", dead=False)
    verdict = p6(b)
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, "not-tried-again")
    assert "refused with EBUSY for another reason" in verdict.reason
    assert p6(tried_again(b)).outcome is Outcome.KEPT


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"ask": False}, "was not asked whether it lives"),
        ({"count": False}, "not seen to count after"),
        ({"observe": False}, "no observation shows a charge after"),
        ({"status_error": -1}, "was not asked for its status afterwards"),
    ],
)
def test_p6_needs_its_witnesses(missing: dict[str, bool], reason: str) -> None:
    b = tried_again(failed(**missing))
    b.status("new", "destination", error=errno.ENOTTY)
    verdict = p6(b)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p6_needs_a_failure() -> None:
    verdict = check("P6", MOVE)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "no move failed" in verdict.reason


def test_p6_a_status_that_fails_as_before_is_as_before() -> None:
    change = answered("guest_status", "old", 0, outcome="fail", errno=errno.EBADF)
    b = tried_again(failed(status_error=errno.EBADF))
    b.status("new", "destination", error=errno.ENOTTY)
    assert CHECKERS["P6"](shipped(KILL_DESTINATION), changed(b.history(), change)).outcome is Outcome.KEPT


@pytest.mark.parametrize(
    ("name", "change", "signature", "expected", "seen"),
    [
        (
            KILL_DESTINATION,
            answered("guest_status", "old", 1, outcome="fail", errno=errno.EBADF),
            "guest_status-after-failed-move:EBADF",
            "GUEST_STATUS: ok",
            "GUEST_STATUS: EBADF",
        ),
        (
            KILL_DESTINATION,
            replaced(Counted, {"ticks": 900}, ticks=1),
            "counter-stopped-after-failed-move",
            "more than 100 ticks",
            "1 ticks",
        ),
        (
            KILL_DESTINATION,
            replaced(Observation, {"label": "after"}, guests=2),
            "guests-after-failed-move",
            "1",
            "2",
        ),
        (KILL_DESTINATION, charge("after", "destination", 3), "charge-after-failed-move", "0", "3"),
    ],
)
def test_p6_deviations(name: str, change: Change, signature: str, expected: str, seen: str) -> None:
    verdict = check("P6", name, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)
    assert (verdict.expected, verdict.seen) == (expected, seen)
    named = {"guests-after-failed-move": "the firmware's guest count", "charge-after-failed-move": "destination sev"}
    assert named.get(signature, "") in verdict.reason


def test_p6_a_source_that_died_though_the_move_failed() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(msgspec.structs.replace(answer, errno=errno.EIO) for answer in record.answers)
            return msgspec.structs.replace(record, answers=answers)
        return record

    assert check("P6", KILL_DESTINATION, change).signature == "source-after-failed-move:dead"


def test_p6_a_destination_that_died_though_the_move_failed() -> None:
    b = tried_again(failed())
    b.status("new", "destination", error=errno.EIO)
    assert p6(b).signature == "destination-after-failed-move:EIO"


def test_p6_a_ledger_that_is_lost() -> None:
    b = failed()
    b.do("init", "source", vm="old", key="sev")
    assert "what must be charged cannot be told" in p6(b).reason


def test_p6_of_several_moves_that_failed_each_is_answered_for_by_what_was_asked_after_all_of_them() -> None:
    b = ready()
    for _ in range(2):
        b.move("old", "new", "destination", error=errno.EINVAL)
    b.observe("after", {"source": 1})
    b.count("old", "source", 20)
    b.status("old", "source")
    b.ask("old", "source", dead=False)
    b.ask("new", "destination", dead=False)
    assert p6(b).outcome is Outcome.KEPT


def crossing(*, asked: bool = True) -> Builder:
    """While a move is under way, its destination is refused as the source of another, which it has no context for."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.launch("third", "source")
    b.observe("before", {"source": 1})
    first = b.invoke("move", "destination", vm="new", source="old")
    b.move("new", "third", "source", error=errno.EBUSY)
    if asked:
        b.status("third", "source", error=errno.ENOTTY)
    b.done(first)
    b.do("mirror", "source", error=errno.EINVAL, vm="third", source="new")
    b.status("new", "destination", error=errno.EBADF)
    b.observe("after", {"destination": 1})
    return b


def test_p6_what_another_move_did_is_not_laid_on_the_one_that_failed() -> None:
    verdict = p6(crossing())
    assert verdict.outcome is Outcome.KEPT
    assert "then the move from old to new succeeded" in verdict.reason
    assert "whether third is still usable was not asked" in p6(crossing(asked=False)).reason
    assert "interrupted" not in CHECKERS["P5"](shipped(KILL_DESTINATION), crossing().history()).reason


@pytest.mark.parametrize("f", ["move", "mirror"])
def test_p6_of_a_refusal_by_a_flag_that_was_left_both_moves_are_shown(f: str) -> None:
    b = usable()
    see(b, "limits", {"source": 1})
    first = next(r for r in b.records if isinstance(r, Done) and r.errno == errno.EBUSY)
    again = b.do(f, "destination", error=errno.EBUSY, vm="new", source="old")
    verdict = p6(b)
    assert (verdict.expected, verdict.seen) == ("anything but EBUSY", "EBUSY")
    assert f"; then {f} of new from old answered EBUSY" in verdict.reason
    assert {first.seq - 1, first.seq, again.seq - 1, again.seq} <= set(verdict.records)


def test_p6_a_destination_that_died_is_shown_by_the_operation_that_says_so() -> None:
    b = tried_again(failed())
    dead = b.status("new", "destination", error=errno.EIO)
    verdict = p6(b)
    assert (verdict.expected, verdict.seen) == ("no EIO", "EIO")
    assert dead.seq in verdict.records


def test_p6_a_charge_that_was_wrong_before_and_is_another_afterwards_is_laid_on_the_move() -> None:
    def change(record: Record) -> Record:
        record = charge("before", "destination", 3)(record) or record
        return charge("after", "destination", 2)(record) or record

    verdict = check("P6", KILL_DESTINATION, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "charge-after-failed-move")
    assert verdict.expected == "destination sev 3, source sev 1"
    assert verdict.seen == "destination sev 2, source sev 1"


def test_p6_a_charge_that_was_wrong_before_and_stayed_so_is_not_laid_on_the_move() -> None:
    def change(record: Record) -> Record:
        for label in ("before", "held", "after"):
            record = charge(label, "destination", 3)(record) or record
        return record

    assert "charge" not in check("P6", KILL_DESTINATION, change).signature


def test_p6_a_destination_that_nobody_can_reach_any_more_need_not_be_tried_again() -> None:
    def told(fd: str) -> str:
        b = ready()
        move = b.invoke("move", "destination", vm="new", source="old")
        b.do("lose_fd", "destination", vm="new", fd=fd)
        b.done(move, "fail", error=errno.EBUSY)
        b.do("lose_fd", "destination", vm="new", fd="vm")  # later, when it could still have been tried
        return p6(b).reason

    assert "no move or mirror of old was tried again" in told("vm")
    assert "no move or mirror of new was tried again" not in told("vm")
    assert "no move or mirror of new was tried again" in told("vcpu 0")


@pytest.mark.parametrize(("second", "outcome"), [(errno.EINVAL, Outcome.KEPT), (errno.ENOMEM, Outcome.UNKNOWN)])
def test_p6_of_moves_that_fail_alike_the_first_alone_must_have_been_tried_again(second: int, outcome: Outcome) -> None:
    b = ready()
    b.move("old", "new", "destination", error=errno.EINVAL)
    b.move("old", "new", "destination", error=second)
    b.observe("after", {"source": 1})
    b.count("old", "source", 20)
    b.status("old", "source")
    b.ask("old", "source", dead=False)
    b.ask("new", "destination", dead=False)
    verdict = p6(b)
    assert (verdict.outcome, verdict.signature) == (outcome, "" if outcome is Outcome.KEPT else "not-tried-again")


def test_p6_a_process_of_the_same_name_that_ended_before_did_not_die_with_the_move() -> None:
    b = Builder()
    b.begin()
    b.exit("destination")
    b.spawn("destination")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination", error=errno.EBUSY)
    assert "whether new is still usable was not asked" in p6(b).reason
    assert "died with the move" not in p6(b).reason


def test_p6_rests_on_the_records_of_the_move_and_of_each_answer() -> None:
    b = failed()
    usable_by = b.status("new", "destination", error=errno.ENOTTY)
    tried = b.do("mirror", "destination", error=errno.EINVAL, vm="new", source="old")
    verdict = p6(b)
    assert verdict.outcome is Outcome.KEPT
    by_kind = {type(b.records[number]).__name__ for number in verdict.records}
    assert by_kind == {"Invoke", "Done", "Observation", "Counted", "Asked"}
    assert {usable_by.seq, tried.seq - 1, tried.seq} <= set(verdict.records)
    observed = [record.seq for record in b.records if isinstance(record, Observation) and record.label != "start"]
    assert set(observed) <= set(verdict.records)


def test_p6_a_destination_that_then_takes_the_context_was_usable() -> None:
    b = again(ask=False)
    verdict = p6(b)
    assert (verdict.outcome, verdict.signature) == (Outcome.KEPT, "")
    assert "new was usable: the move from old to new succeeded" in verdict.reason


def test_p6_a_mirror_that_is_refused_for_its_flags_never_came_to_the_migration_flags() -> None:
    b = usable()
    b.do("mirror", "destination", error=errno.EINVAL, vm="new", source="old", flags=1)
    assert p6(b).signature == "not-tried-again"


@pytest.mark.parametrize("crossed", [True, False])
def test_p6_a_destination_that_died_while_the_move_was_under_way_answers_as_the_dead_do(crossed: bool) -> None:
    """Two moves cross: one takes the context away, and the other finds its destination dead."""
    b = ready()
    waiting = b.invoke("move", "source", vm="old", source="new")
    b.move("old", "new", "destination", error=0 if crossed else errno.EBUSY)
    b.done(waiting, "fail", error=errno.EIO)
    b.status("old", "source", error=errno.EIO)
    assert ("destination-after-failed-move:EIO" in p6(b).signature) is not crossed
