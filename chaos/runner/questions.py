# SPDX-License-Identifier: Apache-2.0
"""What a runner can ask of the outside while a run is under way, and is answered at once.

The outside starts the host and writes the history down. In the lab it also owns the firmware, which no program inside
can break. A question is a line on the runner's standard output among the records, and its answer a line on its standard
input, where orders come otherwise. One question at a time; both carry its number, so that an answer that comes too late
is not taken for the answer to the next.

What was armed belongs to the outside, which takes it back at the end of every run, however that ends.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import msgspec

from chaos.errors import InternalError, Unsupported
from chaos.linux.loop import TimedOut
from chaos.runner.recorder import OutsideGone, Recorder

ANSWER_WITHIN = 20.0
_CHUNK = 1 << 16
_QUESTION = b'{"ask":'
_ANSWER = b'{"answer":'


class _Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="ask"):
    number: int = 0


class Arm(_Question, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="arm"):
    """Follow these failpoints from now on, to be known by this name. `seed` decides where they leave it to chance."""

    name: str
    failpoints: str
    seed: int


class Withdraw(_Question, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="withdraw"):
    """Follow those of this name no more, and answer the command that one of them stalls."""

    name: str


class Look(_Question, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="look"):
    """What those of this name have done so far."""

    name: str


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One failpoint: how often it has struck, and when it first and last did, CLOCK_MONOTONIC of the host."""

    failpoint: str
    count: int
    first: int = 0
    last: int = 0


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="answer"):
    number: int = 0


class Granted(_Answer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="granted"):
    pass


class Refused(_Answer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """This host has no such thing to break."""

    reason: str


class Failed(_Answer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="failed"):
    """It could not be done, though this host has such a thing."""

    reason: str


class Looked(_Answer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="looked"):
    """Each failpoint, in order. `stalled` is the command that one of them keeps without an answer, "" if none does."""

    points: tuple[Point, ...]
    stalled: str


Question = Arm | Withdraw | Look
Answer = Granted | Refused | Failed | Looked

_questions: msgspec.json.Decoder[Question] = msgspec.json.Decoder(Question)
_answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def numbered(answer: Answer, number: int) -> Answer:
    """The answer as that to the question of this number."""
    return msgspec.structs.replace(answer, number=number)


def is_question(line: bytes) -> bool:
    """Whether a line of the runner's is one, and no record."""
    return line.startswith(_QUESTION)


def decode(line: bytes) -> Question:
    """Raises msgspec.DecodeError."""
    return _questions.decode(line)


class Outside:
    """The runner's end. It alone reads `fd`, line by line, so that orders and answers cannot be mixed up."""

    def __init__(self, recorder: Recorder, fd: int) -> None:
        self._recorder = recorder
        self._fd = fd
        self._rest = b""
        self._asked = 0

    def orders(self) -> Iterator[bytes]:
        """Each line that is an order, until there are no more."""
        while (line := self._line(None)) is not None:
            if line.strip() and not line.startswith(_ANSWER):  # one that came too late
                yield line

    def ask(self, question: Question, within: float = ANSWER_WITHIN) -> Answer:
        """Ask, and wait for the answer.

        Raises `Unsupported` if the host has no such thing, `InternalError` if it could not be done, `TimedOut` if
        nothing was heard, and `OutsideGone` if nobody is there.
        """
        self._asked += 1
        what = f"the outside to answer {question.__struct_config__.tag}"
        self._recorder.send(encode(msgspec.structs.replace(question, number=self._asked)))
        deadline = time.monotonic() + within
        while True:
            left = deadline - time.monotonic()
            line = self._line(left) if left > 0 else b""
            if line is None:
                raise OutsideGone
            if not line:
                raise TimedOut(what, within)
            answer = self._answer(line)
            if answer is not None:
                return answer

    def _answer(self, line: bytes) -> Answer | None:
        """The answer to the latest question, None if this is that to an earlier one."""
        try:
            answer = _answers.decode(line)
        except msgspec.DecodeError as error:
            raise InternalError(f"the outside answered {line[:200]!r}: {error}") from error
        if answer.number != self._asked:
            return None
        if isinstance(answer, Refused):
            raise Unsupported(answer.reason)
        if isinstance(answer, Failed):
            raise InternalError(answer.reason)
        return answer

    def _line(self, within: float | None) -> bytes | None:
        """The next line without its end; b"" if none comes within so many seconds, None at the end of the input."""
        deadline = None if within is None else time.monotonic() + within
        while b"\n" not in self._rest:
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
                if not select.select([self._fd], [], [], left)[0]:
                    return b""
            data = os.read(self._fd, _CHUNK)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line if line else b" "  # an empty line is one all the same
