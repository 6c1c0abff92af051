# SPDX-License-Identifier: Apache-2.0
"""Questions of a runner: lines among the records, answers among the orders, each for what asked."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from chaos.controller.conversation import Conversation, not_ours
from chaos.controller.lab_failpoints import PspFailpoints
from chaos.controller.lab_witness import Clock
from chaos.errors import InternalError, Unsupported
from chaos.history import records
from chaos.history.records import Note
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.linux.loop import TimedOut
from chaos.runner import questions
from chaos.runner.holds.failpoints import RunFailpoints
from chaos.runner.questions import (
    ArmFailpoints,
    CouldNotBreak,
    FailpointCount,
    Granted,
    LookAtFailpoints,
    Looked,
    NothingToBreak,
    OutsideAnswer,
    OutsideQuestion,
    WithdrawFailpoints,
)
from chaos.runner.recorder import OutsideGone, Recorder
from chaos.runner.uplink import Outside
from tests.unit.psp.machine import Machine

LOOK = LookAtFailpoints(name="a")


class Ends:
    """Two pipes: a runner's standard input and output, and the outside's ends of them."""

    def __init__(self) -> None:
        self.stdin, self.to_runner = os.pipe()
        self.from_runner, self.stdout = os.pipe()
        self.recorder = Recorder(self.stdout)
        self.runner = Outside(self.recorder, self.stdin)

    def say(self, data: bytes) -> None:
        os.write(self.to_runner, data)

    def close(self) -> None:
        for fd in (self.stdin, self.to_runner, self.from_runner, self.stdout):
            try:
                os.close(fd)
            except OSError:
                continue  # a test hung up

    def heard(self) -> bytes:
        """The next line of the runner's; there is never more than one."""
        data = b""
        while not data.endswith(b"\n"):
            data += os.read(self.from_runner, 4096)
        return data

    def answering(self, answer: Callable[[OutsideQuestion], bytes]) -> threading.Thread:
        """Answer the next question with these bytes."""

        def serve() -> None:
            line = self.heard()
            assert questions.is_question(line)
            self.say(answer(questions.decode(line)))

        thread = threading.Thread(target=serve)
        thread.start()
        return thread


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def encoded(answer: OutsideAnswer, number: int) -> bytes:
    return questions.encode(questions.numbered(answer, number))


def test_an_answer_is_that_to_the_question(ends: Ends) -> None:
    looked = Looked(points=(questions.FailpointCount(failpoint="NOP=skip", count=1, first=5, last=5),), stalled="")
    thread = ends.answering(lambda question: encoded(looked, question.number))
    assert ends.runner.ask(LOOK) == questions.numbered(looked, 1)
    thread.join()


def test_orders_and_answers_are_kept_apart(ends: Ends) -> None:
    """However the bytes come: the order behind an answer is still there afterwards, and so is its second half."""
    orders = ends.runner.orders()
    ends.say(b'{"first":1}\n')
    assert next(orders) == b'{"first":1}'
    thread = ends.answering(lambda q: encoded(Granted(), q.number) + b'\n{"second":')
    assert isinstance(ends.runner.ask(LOOK), Granted)
    thread.join()
    ends.say(b"2}\n")
    assert next(orders) == b'{"second":2}'
    os.close(ends.to_runner)
    assert list(orders) == []


def test_an_answer_that_comes_too_late_is_not_the_next_ones(ends: Ends) -> None:
    with pytest.raises(TimedOut, match=r"waited 0\.01 s for the outside to answer look"):
        ends.runner.ask(LOOK, within=0.01)
    ends.heard()
    late = encoded(CouldNotBreak(reason="an old story"), 1)
    thread = ends.answering(lambda q: late + encoded(Granted(), q.number))
    assert ends.runner.ask(WithdrawFailpoints(name="a")).number == 2
    thread.join()
    with pytest.raises(TimedOut):
        ends.runner.ask(LOOK, within=0.01)
    ends.say(encoded(Granted(), 3) + b"{}\n")
    assert next(ends.runner.orders()) == b"{}", "nor is it an order"


@pytest.mark.parametrize(
    ("answer", "error"),
    [(NothingToBreak(reason="not ours"), Unsupported), (CouldNotBreak(reason="it broke"), InternalError)],
)
def test_a_no_is_an_error_with_its_reason(
    ends: Ends, answer: NothingToBreak | CouldNotBreak, error: type[Exception]
) -> None:
    thread = ends.answering(lambda q: encoded(answer, q.number))
    with pytest.raises(error, match=answer.reason):
        ends.runner.ask(LOOK)
    thread.join()


def test_nobody_is_there(ends: Ends) -> None:
    os.close(ends.to_runner)
    with pytest.raises(OutsideGone):
        ends.runner.ask(LOOK)
    os.close(ends.from_runner)
    with pytest.raises(OutsideGone):
        ends.runner.ask(LOOK)


def test_what_is_no_answer_is_a_bug(ends: Ends) -> None:
    thread = ends.answering(lambda q: b'{"answer":"perhaps"}\n')
    with pytest.raises(InternalError, match="perhaps"):
        ends.runner.ask(LOOK)
    thread.join()


def test_a_conversation_answers_questions_and_hands_records_on() -> None:
    """A line at a time, wherever the bytes are cut."""

    async def main() -> None:
        asked: list[OutsideQuestion] = []

        async def answer(question: OutsideQuestion) -> OutsideAnswer:
            asked.append(question)
            return questions.numbered(Granted(), question.number)

        talk = Conversation()
        told: list[records.Record] = []
        talk.listen(told.append, answer)
        note = records.encode(Note(t=1, topic="progress", text='{"ask": nothing}'))
        question = questions.encode(ArmFailpoints(number=7, name="a", failpoints="NOP=skip", seed=1))
        for byte in note + question + note:
            await talk.stdout(bytes([byte]))
        assert [type(record) for record in told] == [Note, Note]
        assert asked == [ArmFailpoints(number=7, name="a", failpoints="NOP=skip", seed=1)]
        assert await talk.stdin() == questions.encode(Granted(number=7))

    asyncio.run(main())


def test_the_firmware_of_this_machine_is_not_ours() -> None:
    answer = asyncio.run(not_ours(LookAtFailpoints(number=3, name="a")))
    assert isinstance(answer, NothingToBreak) and answer.number == 3 and "firmware faults need the lab" in answer.reason


def test_a_run_breaks_its_firmware_and_it_is_whole_afterwards() -> None:
    """All ends joined but for QEMU's: failpoints armed in a runner fire in the software PSP, and are taken back."""

    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            await control.ready()
            machine.plug_in()
            machine.init()
            lab = PspFailpoints(control, Clock(ahead=1_000, doubt=0))
            await lab.begin()
            arm = ArmFailpoints(number=1, name="f", failpoints="ACTIVATE*1=fail:INVALID_ASID; NOP=skip", seed=1)
            assert await lab.answer(ArmFailpoints(number=9, name="other", failpoints="INIT=skip", seed=1)) == Granted(
                number=9
            )
            assert await lab.answer(arm) == Granted(number=1)
            again = await lab.answer(arm)
            assert isinstance(again, CouldNotBreak) and "'f' is armed already" in again.reason
            refused = await lab.answer(ArmFailpoints(number=2, name="g", failpoints="NOPE=skip", seed=1))
            assert isinstance(refused, CouldNotBreak) and "there is no command 'NOPE'" in refused.reason
            handle = machine.start()
            assert machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)[0] is FirmwareStatus.INVALID_ASID
            looked = await lab.answer(LookAtFailpoints(number=3, name="f"))
            at = (await control.status()).fired[0].at_ns + 1_000  # in the lab's time
            assert isinstance(looked, Looked) and looked.points == (
                FailpointCount(failpoint="ACTIVATE*1=fail:INVALID_ASID", count=1, first=at, last=at),
                FailpointCount(failpoint="NOP=skip", count=0),
            )

            await lab.answer(ArmFailpoints(number=4, name="hold", failpoints="DECOMMISSION=stall", seed=1))
            machine.submit(FirmwareCommand.DECOMMISSION, handle.to_bytes(4, "little"))
            await control.next_firing()
            await control.next_firing()
            looked = await lab.answer(LookAtFailpoints(number=5, name="hold"))
            assert isinstance(looked, Looked) and looked.stalled == "DECOMMISSION"
            assert machine.answer(0.05) is None
            assert await lab.settle() == "its firmware is not as it was: platform WORKING, before INIT"
            assert machine.answer() is FirmwareStatus.SUCCESS, "what was stalled goes on"
            status, _ = machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)
            assert status is FirmwareStatus.INVALID_PLATFORM_STATE, "no plan is left"
            assert await lab.settle() == ""
            await lab.answer(ArmFailpoints(number=6, name="end", failpoints="NOP=dead", seed=1))
            machine.submit(FirmwareCommand.NOP)
            await control.next_firing()
            assert await lab.settle() == "its firmware is dead"
            await control.quit()

    asyncio.run(main())


def test_a_run_has_one_source_of_chance(ends: Ends) -> None:
    """Each plan has luck of its own, and the same seed the same."""

    def seeds_of(run: int) -> tuple[int, ...]:
        asked: list[OutsideQuestion] = []

        def answer(question: OutsideQuestion) -> bytes:
            asked.append(question)
            return encoded(Granted(), question.number)

        firmware = RunFailpoints(ends.runner, run, None)
        for _ in range(2):
            thread = ends.answering(answer)
            firmware.arm("*%10=skip")
            thread.join()
        return tuple(question.seed for question in asked if isinstance(question, ArmFailpoints))

    assert seeds_of(1) == seeds_of(1)
    assert len({*seeds_of(1), *seeds_of(2)}) == 4
