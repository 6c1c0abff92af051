# SPDX-License-Identifier: Apache-2.0
"""Which command of the firmware's an answer is of: by their numbers, where nothing is amiss."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Done, Firmware
from chaos.judge.ledger.commands import DOUBT, Matched
from tests.unit.core.test_contexts import HWERROR, Told


def of(b: Told, f: str = "guest_status") -> list[int | None]:
    """The numbers of the commands that the operations of this name are matched with."""
    history = b.history()
    orders = Matched.of(history).orders
    return [orders.get(done.seq) for invoke, done in history.operations() if invoke.f == f and done is not None]


def asked(b: Told, *, error: int = 0, firmware: int = 0, status: int | None = None) -> Firmware:
    """GUEST_STATUS, which the firmware has answered so (`status`), or as the VMM was told."""
    b.status("old", "source", error=error, firmware=firmware)
    return b.sent("GUEST_STATUS", 1, status=firmware if status is None else status)


def two_and_a_look() -> Told:
    """Numbers 0 and 2 are of GUEST_STATUS, 1 of an observation."""
    b = Told()
    asked(b)
    b.observe("between", {"source": 1})
    b.sent("PLATFORM_STATUS")
    asked(b)
    return b


def look(b: Told) -> int | None:
    history = b.history()
    (observation,) = (record for record in history.records if getattr(record, "label", "") == "between")
    return Matched.of(history).orders.get(observation.seq)


def test_questions_are_matched_with_their_commands_in_turn() -> None:
    b = two_and_a_look()
    assert (of(b), look(b)) == ([0, 2], 1)


@pytest.mark.parametrize("amiss", ["one more", "another answer", "the clock"])
def test_where_anything_is_amiss_none_of_that_kind_is_matched(amiss: str) -> None:
    b = two_and_a_look()
    last = b.records[-1]
    if amiss == "one more":
        b.sent("GUEST_STATUS", 1)
    elif amiss == "another answer":
        b.records[-1] = msgspec.structs.replace(last, status=HWERROR)
    else:
        b.records[-1] = msgspec.structs.replace(last, t=last.t + DOUBT)
    assert (of(b), look(b)) == ([None, None], 1)


def test_without_all_numbers_from_the_first_on_nothing_is_matched() -> None:
    b = two_and_a_look()
    b.records = [msgspec.structs.replace(r, order=r.order + 1) if isinstance(r, Firmware) else r for r in b.records]
    assert (of(b), look(b)) == ([None, None], None)


@pytest.mark.parametrize(
    ("end", "off", "well"),
    [("ended", DOUBT, True), ("ended", DOUBT + 1, False), ("began", -DOUBT, True), ("began", -DOUBT - 1, False)],
)
def test_the_clock_may_be_off_by_so_much(end: str, off: int, well: bool) -> None:
    b = two_and_a_look()
    done = next(record for record in reversed(b.records) if isinstance(record, Done))
    b.records[-1] = msgspec.structs.replace(b.records[-1], t=getattr(done, end) + off)
    assert of(b) == ([0, 2] if well else [None, None])


@pytest.mark.parametrize(("overlap", "orders"), [(0, [0, 1]), (1, [None, None])])
def test_of_questions_that_were_asked_at_once_nobody_can_say_which_came_first(
    overlap: int, orders: list[int | None]
) -> None:
    b = Told()
    first, second = (b.invoke("guest_status", agent, vm="old") for agent in ("source", "destination"))
    ended = b.done(first).ended
    b.sent("GUEST_STATUS", 1)
    done = b.done(second)
    b.records[done.seq] = msgspec.structs.replace(done, began=ended - overlap)
    b.sent("GUEST_STATUS", 1)
    assert of(b) == orders


def test_an_answer_is_known_by_what_the_firmware_said() -> None:
    b = Told()
    asked(b, error=errno.EIO, firmware=HWERROR)
    asked(b, error=errno.ETIMEDOUT, status=-1)
    assert of(b) == [0, 1]


def test_who_did_not_get_as_far_as_the_firmware_has_asked_it_nothing() -> None:
    b = Told()
    b.status("old", "source", error=errno.EBADF)
    asked(b)
    assert of(b) == [None, 0]


def test_of_a_question_that_was_killed_nobody_can_say_whether_it_was_asked() -> None:
    b = Told()
    b.done(b.invoke("guest_status", "source", vm="old"), "info")
    asked(b)
    assert of(b) == [None, 0]


def test_a_count_that_could_not_be_read_was_no_answer() -> None:
    """Nor was what the firmware answered with an error."""
    b = two_and_a_look()
    b.records[-1] = msgspec.structs.replace(b.observe("later"), guests=None)
    b.sent("PLATFORM_STATUS", status=HWERROR)
    assert look(b) == 1


def test_operations_are_more_than_the_guests_status() -> None:
    b = Told()
    b.do("launch_start", "source", vm="old")
    b.sent("LAUNCH_START", 1)
    b.do("launch_finish", "source", vm="old")
    b.sent("LAUNCH_FINISH", 1)
    assert (of(b, "launch_start"), of(b, "launch_finish")) == ([0], [1])


def test_between_two_questions_are_the_commands_after_the_one_and_before_the_other() -> None:
    b = two_and_a_look()
    history = b.history()
    matched = Matched.of(history)
    one, two = (done for invoke, done in history.operations() if done is not None)
    assert matched.between(one.ended + 1, two.began - 1) == (0, 2)
    assert matched.between(one.began, one.ended)[0] == -1, "nothing was answered before the first"
    assert matched.between(two.began, two.ended)[1] > 2, "and nothing sent after the last"
    last, first = matched.between(one.ended, two.began)
    assert last == -1 and first > 2, "of what is of the same nanosecond nobody can say"


def platform(b: Told, command: str = "PLATFORM_STATUS", *, firmware: int = 0, status: int = 0) -> None:
    """A command to /dev/sev of this name, and the one that the firmware was sent at that time."""
    b.do("platform", "source", command=command, error=errno.EIO if firmware else 0, firmware=firmware)
    b.sent("PLATFORM_STATUS", status=status)


def test_whoever_asks_dev_sev_for_the_count_is_one_of_those_who_read_it() -> None:
    b = two_and_a_look()
    platform(b)
    assert (of(b, "platform"), look(b)) == ([3], 1)


def test_a_count_that_dev_sev_was_refused_is_none() -> None:
    b = two_and_a_look()
    platform(b, firmware=HWERROR, status=HWERROR)
    assert (of(b, "platform"), look(b)) == ([None], 1)


def test_other_commands_of_dev_sev_ask_for_no_count() -> None:
    b = two_and_a_look()
    b.do("platform", "source", command="PEK_CSR")
    b.do("platform", "source", command="PEK_CSR", error=errno.EIO, firmware=HWERROR)
    assert (of(b, "platform"), look(b)) == ([None, None], 1)
