# SPDX-License-Identifier: Apache-2.0
"""P3: whoever answers and should not, or the other way round."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Answer, Asked, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed, shipped
from tests.unit.core.doctored import (
    ES,
    KILL_DESTINATION,
    KILL_SOURCE,
    MOVE,
    begun,
    chain,
    check,
    failed,
    replaced,
    verdict_of,
    without,
)


def test_p3_a_source_that_still_answers() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            first, *rest = record.answers
            return msgspec.structs.replace(record, answers=(msgspec.structs.replace(first, errno=0), *rest))
        return record

    verdict = check("P3", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "source-after-move:answered")
    assert (verdict.expected, verdict.seen) == ("EIO", "1 ok")


def test_p3_a_live_source_that_answers_eio() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            *rest, last = record.answers
            return msgspec.structs.replace(record, answers=(*rest, msgspec.structs.replace(last, errno=errno.EIO)))
        return record

    verdict = check("P3", KILL_DESTINATION, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "source-after-failed-move:dead")
    assert verdict.seen == "30 ok, 1 EIO"


def test_p3_an_operation_that_a_dead_source_answers() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.do("get_state", "source", vm="old", error=errno.EIO)
    b.ask("old", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.KEPT
    b.do("get_state", "source", vm="old")
    b.do("launch_measure", "source", vm="old", error=errno.EIO, firmware=3)
    b.ask("old", "source", dead=True)
    verdict = CHECKERS["P3"](shipped(MOVE), b.finish())
    assert verdict.signature == "source-after-move:answered:get_state+source-after-move:answered:launch_measure"


def test_p3_a_message_that_did_not_come_is_no_answer_of_the_kernel() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.done(b.invoke("set_state", "source", vm="old"), "fail", error=errno.EPIPE, value={"call": "the source ended"})
    b.ask("old", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.KEPT
    b.done(b.invoke("get_state", "source", vm="old"), "fail", error=errno.EINVAL, value={"call": "KVM_GET_REGS"})
    b.ask("old", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).signature == "source-after-move:answered:get_state"


def test_p3_an_operation_that_a_live_source_refuses_as_dead() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination", error=errno.EBUSY)
    b.do("get_state", "source", vm="old", error=errno.EIO)
    b.ask("old", "source", dead=False)
    verdict = CHECKERS["P3"](shipped(MOVE), b.finish())
    assert (verdict.signature, verdict.expected) == ("source-after-failed-move:dead:get_state", "no EIO")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"answers": ()}, "was asked nothing"),
        ({"agent": "destination"}, "did not create it"),
    ],
)
def test_p3_worthless_answers(values: dict[str, object], reason: str) -> None:
    verdict = check("P3", MOVE, replaced(Asked, {}, **values))
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p3_a_control_that_is_dead_too() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(msgspec.structs.replace(answer, control=errno.EIO) for answer in record.answers)
            return msgspec.structs.replace(record, answers=answers)
        return record

    verdict = check("P3", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "EIO means nothing" in verdict.reason


def test_p3_all_descriptors_must_be_asked() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(answer for answer in record.answers if answer.fd != "vcpu 1")
            return msgspec.structs.replace(record, answers=answers)
        return record

    verdict = check("P3", ES, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "not vcpu 1" in verdict.reason


@pytest.mark.parametrize("fd", ["vm", "vcpu 0", "device"])
@pytest.mark.parametrize("nth", [0, 3, -1])
def test_p3_every_question_must_be_put_to_every_descriptor(fd: str, nth: int) -> None:
    """A kernel that lets one ioctl of the dead through may not be found kept by a history that did not ask it."""

    def change(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        gone = [answer for answer in record.answers if answer.fd == fd][nth]
        return msgspec.structs.replace(record, answers=tuple(a for a in record.answers if a is not gone))

    for name in (MOVE, *([KILL_DESTINATION] if fd != "device" else [])):
        verdict = check("P3", name, change)
        assert verdict.outcome is Outcome.UNKNOWN and f"not everything was asked: {fd} not KVM_" in verdict.reason


@pytest.mark.parametrize("name", [MOVE, KILL_DESTINATION])
def test_p3_a_history_without_device_descriptors(name: str) -> None:
    """As those are that were written before devices were asked."""

    def change(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        answers = tuple(answer for answer in record.answers if answer.fd != "device")
        return msgspec.structs.replace(record, answers=answers, device=device)

    device: int | None = None
    verdict = check("P3", name, change)
    assert verdict.outcome is Outcome.UNKNOWN and "device descriptors were not asked" in verdict.reason
    device = 0
    verdict = check("P3", name, change)
    assert verdict.outcome is Outcome.UNKNOWN and "its device descriptor was not asked" in verdict.reason
    device = errno.EMFILE
    verdict = check("P3", name, change)
    assert verdict.outcome is Outcome.UNKNOWN and "KVM_CREATE_DEVICE failed with EMFILE" in verdict.reason
    device = errno.ENODEV  # then no VM of this kernel has any
    assert check("P3", name, change).outcome is Outcome.KEPT


def test_p3_a_device_that_answers() -> None:
    def change(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        answers = (msgspec.structs.replace(a, errno=errno.ENXIO) if a.fd == "device" else a for a in record.answers)
        return msgspec.structs.replace(record, answers=tuple(answers))

    verdict = check("P3", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "source-after-move:answered")
    assert verdict.seen == "4 ENXIO"


@pytest.mark.parametrize("f", ["get_state", "register_region", "move", "lose_fd"])
def test_p3_the_dead_are_asked_again_after_whatever_is_done_to_them(f: str) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    b.do("pause", "source", vm="old")
    assert verdict_of("P3", b.history()).outcome is Outcome.KEPT
    b.do(f, "source", vm="old", error=0 if f == "lose_fd" else errno.EIO)
    verdict = verdict_of("P3", b.history())
    assert verdict.outcome is Outcome.UNKNOWN and f"old was not asked again after {f}" in verdict.reason
    b.ask("old", "source", dead=True)
    assert verdict_of("P3", b.finish()).outcome is Outcome.KEPT


def test_p3_a_source_that_was_not_asked() -> None:
    verdict = check("P3", MOVE, without(Asked))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "old was not asked afterwards" in verdict.reason


def test_p3_a_source_that_was_asked_before_the_move_only() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.ask("old", "source", dead=False)
    b.move("old", "new", "destination")
    assert CHECKERS["P3"](shipped(MOVE), b.finish()).outcome is Outcome.UNKNOWN


def test_p3_a_dead_process_cannot_be_asked() -> None:
    assert check("P3", KILL_SOURCE).reason.startswith("the source process is dead")


def test_p3_a_move_that_nobody_can_tell_about() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.kill("destination")
    b.done(invoke, "info")
    b.kill("source")
    for promise in ("P3", "P4", "P5", "P6"):
        verdict = CHECKERS[promise](shipped(MOVE), b.history())
        assert verdict.outcome is Outcome.UNKNOWN
        assert "nobody can say whether it took effect" in verdict.reason


def test_p3_each_source_of_a_chain_is_asked() -> None:
    b = chain()
    b.ask("b", "destination", dead=True)
    verdict = CHECKERS["P3"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "a was not asked" in verdict.reason
    b.ask("a", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.KEPT


def test_p3_of_a_source_that_dies_before_its_move() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("get_state", "source", vm="old", error=errno.EIO)
    b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    assert verdict_of("P3", b.finish()).signature == "source-in-move:eio-before-move"


def test_p3_a_control_without_a_descriptor_shows_nothing() -> None:
    """It must be a VM that lives; one that answers EBADF is none at all."""

    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(msgspec.structs.replace(answer, control=errno.EBADF) for answer in record.answers)
            return msgspec.structs.replace(record, answers=answers)
        return record

    verdict = check("P3", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN and "had no descriptor" in verdict.reason


def test_p3_the_firmwares_own_eio_is_no_sign_of_death() -> None:
    """GUEST_STATUS reaches the firmware only if the VM lives; its refusal carries a status."""

    def refused(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        first = msgspec.structs.replace(record.answers[0], errno=errno.EIO, firmware=16)
        return msgspec.structs.replace(record, answers=(first, *record.answers[1:]))

    verdict = check("P3", MOVE, refused)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "source-after-move:answered")
    verdict = CHECKERS["P3"](shipped(MOVE), changed(failed().finish(), refused))
    assert verdict.outcome is not Outcome.BROKEN, verdict.reason


def test_p3_of_a_descriptor_of_an_unknown_kind_no_question_is_due() -> None:
    def change(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        more = Answer(fd="memory 0", ioctl="KVM_SOMETHING", errno=errno.EIO, control=0)
        return msgspec.structs.replace(record, answers=(*record.answers, more))

    assert check("P3", MOVE, change).outcome is Outcome.KEPT


def test_p3_of_a_vm_that_the_experiment_does_not_have_no_vcpus_are_due() -> None:
    b = Builder()
    b.begin()
    b.launch("mine", "source", "sev")
    b.launch("yours", "destination")
    b.move("mine", "yours", "destination")
    b.ask("mine", "source", dead=True, vcpus=0)
    verdict = CHECKERS["P3"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_p3_an_answer_from_before_the_move_that_is_written_down_after_it_is_no_deviation() -> None:
    """Moves of a loop are recorded when the loop is over."""
    for late in (False, True):
        b = begun()
        b.launch("old", "source", "sev")
        b.launch("new", "destination")
        early = b.tick()
        moved = b.move("old", "new", "destination")
        asked = b.invoke("launch_measure", "source", vm="old")
        answer = b.done(asked)
        if not late:
            b.records[-2] = msgspec.structs.replace(asked, t=early)
            b.records[-1] = msgspec.structs.replace(answer, began=early + 1, ended=early + 2)
        b.ask("old", "source", dead=True, vcpus=1)
        verdict = verdict_of("P3", b.history())
        assert verdict.outcome is (Outcome.BROKEN if late else Outcome.KEPT), verdict.reason
        if late:
            assert (verdict.expected, verdict.seen) == ("EIO", "ok")
            assert {moved.seq, asked.seq, answer.seq} <= set(verdict.records)
