# SPDX-License-Identifier: Apache-2.0
"""What the software PSP saw of a run, told in the lab's own time.

The PSP runs outside the lab and has another clock. The two are compared by asking the lab what time it is: the answer
lies between question and reply, so half of that is how wrong the comparison may be. TCG's clock follows the host's,
so one comparison serves a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from chaos.history.records import Done, Firmware, Invoke, Observation, Record
from chaos.lab import protocol
from chaos.lab.machine import Lab
from chaos.lab.psp.mailbox import CommandRecord

Window = tuple[int, int]  # first and last nanosecond

_QUESTIONS = 5
_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Clock:
    """`ahead` is how many nanoseconds the lab's CLOCK_MONOTONIC is ahead of ours, give or take `doubt`."""

    ahead: int
    doubt: int


async def compare_clocks(lab: Lab) -> Clock:
    """The best of a few questions. Raises what breaks the lab."""
    best: Clock | None = None
    for _ in range(_QUESTIONS):
        asked = time.monotonic_ns()
        lab.send(protocol.Ping())
        answer = await lab.receive(_DEADLINE, "the lab's clock")
        heard = time.monotonic_ns()
        assert isinstance(answer, protocol.Pong)
        clock = Clock(ahead=answer.monotonic - (asked + heard) // 2, doubt=(heard - asked) // 2)
        if best is None or clock.doubt < best.doubt:
            best = clock
    assert best is not None
    return best


def firmware_records(
    trace: Sequence[CommandRecord], records: Sequence[Record], clock: Clock, *, before: int
) -> Iterator[Firmware]:
    """The PSP's trace as records of the history. It had seen `before` commands when the run began; its own count of
    them shows which are missing.

    A command counts as sent during a move if it may have been: the doubt of the clocks is added on both sides. That
    can accuse a move of a command that came a millisecond before it, never acquit one. An observation made while a
    move is held asks for the firmware's guest count; that one PLATFORM_STATUS is ours.
    """
    moves = tuple(_moves(records))
    questions = [(r.t, r.until) for r in records if isinstance(r, Observation) and r.guests is not None]
    for command in trace:
        began = command.start_ns + clock.ahead
        asked = _covering(questions, began, clock.doubt) if command.command == "PLATFORM_STATUS" else None
        if asked is not None:
            questions.remove(asked)
        during = (op for op, window in moves if asked is None and _covering([window], began, clock.doubt))
        yield Firmware(
            t=began,
            order=command.sequence - before - 1,
            command=command.command,
            status=-1 if command.status is None else command.status,
            handle=command.handle,
            move=next(during, None),
            began=began,
            fault=command.fault,
            asked=command.asked,
        )


def _covering(windows: Iterable[Window], at: int, doubt: int) -> Window | None:
    return next((window for window in windows if window[0] - doubt <= at <= window[1] + doubt), None)


def _moves(records: Sequence[Record]) -> Iterator[tuple[int, Window]]:
    """Each move: its operation and when it was inside the kernel. Of one that was killed, when it may have been."""
    answers = {record.op: record for record in records if isinstance(record, Done)}
    for record in records:
        if isinstance(record, Invoke) and record.f == "move":
            answer = answers.get(record.op)
            if answer is None:
                yield record.op, (record.t, records[-1].t)
            elif answer.ended:
                yield record.op, (answer.began, answer.ended)
            else:
                yield record.op, (record.t, answer.t)
