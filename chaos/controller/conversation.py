# SPDX-License-Identifier: Apache-2.0
"""What a controller and a runner say to each other: orders and questions one way, records the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from chaos.errors import InternalError, LabHung, SevchaosError
from chaos.history import records
from chaos.history.records import End, Record
from chaos.lab.patience import first_of
from chaos.runner import questions
from chaos.runner.order import Order
from chaos.runner.questions import NothingToBreak, OutsideAnswer, OutsideQuestion

Write = Callable[[Record], None]
Answerer = Callable[[OutsideQuestion], Awaitable[OutsideAnswer]]


class Conversation:
    """One runner: orders and answers in on its stdin, records and questions out on its stdout, what went wrong on its
    stderr."""

    def __init__(self) -> None:
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._rest = b""
        self._record: Write = lambda entry: None
        self._answer: Answerer = not_ours
        self._end: asyncio.Future[End] | None = None
        self._latest = b"nothing"
        self.words = ""

    async def stdin(self) -> bytes:
        return await self._input.get()

    async def stdout(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if questions.is_question(line):
                self._input.put_nowait(questions.encode(await self._answer(questions.decode(line))))
                continue
            self._latest = line
            try:
                entry = records.decode(line)
            except msgspec.DecodeError as error:
                if self._end is not None and not self._end.done():
                    self._end.set_exception(InternalError(f"what the runner wrote is no record: {error}: {line!r}"))
                return
            if isinstance(entry, End) and self._end is not None:
                self._end.set_result(entry)
            else:
                self._record(entry)

    async def stderr(self, data: bytes) -> None:
        self.words = (self.words + data.decode(errors="replace"))[-4000:]

    def listen(self, record: Write, answer: Answerer) -> None:
        """Give records to the one, and questions to the other."""
        self._record = record
        self._answer = answer

    async def ask(
        self, order: Order, record: Write, runner: asyncio.Task[int], *, answer: Answerer,
        kept_waiting: Callable[[], float] = lambda: 0.0,
    ) -> End:  # fmt: skip
        """The End of the order, which is not given to `record`: others may have something to say before it.

        Raises `LabHung` after the time the order gives and what the host was `kept_waiting` meanwhile, with what the
        runner has said of where it is.
        """
        self.listen(record, answer)
        self._end = asyncio.get_running_loop().create_future()
        self._input.put_nowait(msgspec.json.encode(order) + b"\n")
        both: set[asyncio.Future[Any]] = {self._end, runner}
        await first_of(both, order.timeout, kept_waiting)
        if self._end.done():
            return self._end.result()
        if not runner.done():
            latest = self._latest[:300].decode(errors="replace")
            details = f"its last record: {latest}\n{self.words.strip()}"
            remedy = "give it longer with --timeout"
            raise LabHung(f"the run was not done after {order.timeout:g} s\n{details}", remedy=remedy)
        code = runner.result()
        raise SevchaosError(
            f"the runner ended with {code}:\n{self.words.strip()}", remedy="this is an internal error; please report it"
        )


async def not_ours(question: OutsideQuestion) -> OutsideAnswer:
    """What is answered where the firmware is a real one."""
    reason = "firmware faults need the lab; the PSP of a real host cannot be controlled"
    return NothingToBreak(number=question.number, reason=reason)
