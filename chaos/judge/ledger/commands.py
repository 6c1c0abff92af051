# SPDX-License-Identifier: Apache-2.0
"""Which command that the firmware was sent was whose.

Whoever watches the firmware has another clock, and compares the two to about a millisecond. But the commands are
numbered there, and some questions are one command each. Where just as many of these are on record, one after the other,
and were answered the same in the same order, each is matched with its command; the clock only has to agree. Where
anything is amiss none of that kind is matched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from errno import ETIMEDOUT
from itertools import pairwise

from chaos.history.records import Done, Firmware, History, Invoke, Observation

LOOKS = "PLATFORM_STATUS"  # what an observation sends
DEBUGS = {"dbg_decrypt": "DBG_DECRYPT", "dbg_encrypt": "DBG_ENCRYPT"}
"""Operations that debug a guest, and the commands that either may send, once or several times."""
_OPERATIONS = {f: f.upper() for f in ("guest_status", "launch_start", "launch_finish")}
_UNANSWERED = -1
_NEVER = 1 << 62  # above the number of any command
DOUBT = 5_000_000
"""Nanoseconds that the two clocks may be apart, with room to spare."""


@dataclass(frozen=True, slots=True)
class _Question:
    """`record` is what holds the answer: the firmware's status, `_UNANSWERED` if it gave none."""

    began: int
    ended: int
    record: int
    answer: int


@dataclass(frozen=True, slots=True)
class Matched:
    """`orders` has the number of the command by the record that holds its answer, a Done or an Observation."""

    orders: Mapping[int, int] = field(default_factory=dict)
    _times: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, history: History) -> Matched:
        seen = [record for record in history.records if isinstance(record, Firmware)]
        if [record.order for record in seen] != list(range(len(seen))):
            return cls()
        pairs = [pair for command, asked in _questions(history).items() for pair in _pairs(command, asked, seen)]
        times = tuple((question.began, question.ended, command.order) for question, command in pairs)
        return cls({question.record: command.order for question, command in pairs}, times)

    def between(self, began: int, ended: int) -> tuple[int, int]:
        """The numbers of the last command that was answered before then, and of the first one that was sent later."""
        last = max((order for _, over, order in self._times if over < began), default=-1)
        return last, min((order for begun, _, order in self._times if begun > ended), default=_NEVER)


def _questions(history: History) -> dict[str, list[_Question]]:
    found: dict[str, list[_Question]] = {command: [] for command in (*_OPERATIONS.values(), LOOKS)}
    for invoke, done in history.operations():
        if invoke.f in _OPERATIONS and done is not None:
            found[_OPERATIONS[invoke.f]] += _asked(invoke, done)
        elif invoke.f == "platform" and invoke.args.get("command") == LOOKS and done is not None and not done.firmware:
            found[LOOKS] += _asked(invoke, done)
    for record in history.records:
        if isinstance(record, Observation) and record.guests is not None:
            found[LOOKS].append(_Question(record.t, record.until, record.seq, 0))
    return {command: sorted(asked, key=lambda question: question.began) for command, asked in found.items()}


def _asked(invoke: Invoke, done: Done) -> Iterator[_Question]:
    """The operation, if it got as far as the firmware. Of one that was killed nobody can say."""
    answer = done.firmware or (_UNANSWERED if done.errno == ETIMEDOUT else None)
    if done.outcome == "ok" or (done.outcome == "fail" and answer is not None):
        yield _Question(done.began or invoke.t, done.ended or done.t, done.seq, answer or 0)


def _pairs(command: str, asked: Sequence[_Question], seen: Sequence[Firmware]) -> Iterator[tuple[_Question, Firmware]]:
    sent = [r for r in seen if r.command == command and (command != LOOKS or r.status == 0)]  # a count was read
    one_by_one = all(question.ended <= later.began for question, later in pairwise(asked))
    if one_by_one and len(asked) == len(sent) and all(map(_may_be, asked, sent)):
        yield from ((question, sent[number]) for number, question in enumerate(asked))


def _may_be(question: _Question, command: Firmware) -> bool:
    near = question.began - DOUBT <= command.t <= question.ended + DOUBT
    return near and question.answer == command.status
