# SPDX-License-Identifier: Apache-2.0
"""The runner's line to the controller: questions go out, answers and orders come in."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import msgspec

from chaos.errors import InternalError, Unsupported
from chaos.linux.loop import TimedOut
from chaos.runner.questions import (
    _ANSWER,
    CouldNotBreak,
    NothingToBreak,
    OutsideAnswer,
    OutsideQuestion,
    _answers,
    encode,
)
from chaos.runner.recorder import OutsideGone, Recorder

ANSWER_WITHIN = 20.0
_CHUNK = 1 << 16


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

    def ask(self, question: OutsideQuestion, within: float = ANSWER_WITHIN) -> OutsideAnswer:
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

    def _answer(self, line: bytes) -> OutsideAnswer | None:
        """The answer to the latest question, None if this is that to an earlier one."""
        try:
            answer = _answers.decode(line)
        except msgspec.DecodeError as error:
            raise InternalError(f"the outside answered {line[:200]!r}: {error}") from error
        if answer.number != self._asked:
            return None
        if isinstance(answer, NothingToBreak):
            raise Unsupported(answer.reason)
        if isinstance(answer, CouldNotBreak):
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
