# SPDX-License-Identifier: Apache-2.0
"""The controller's end of the control channel, for asyncio.

    control = await PspControl.open(sock)
    await control.ready()
    await control.plan(Plan(rules=(Rule(Fail("RESOURCE_LIMIT"), command="LAUNCH_START"),)))
    firing = await control.next_firing()
    snapshot = await control.save()
    await control.quit()

Every wait has a deadline in seconds and, when it passes, raises LabHung saying what was waited for. When the process
ends, whoever waits, and every later request, gets PspDied. What the process cannot do is an InternalError with its
reason: a wrong plan is refused here already, by the types.

Start the process from a thread that lives as long as it should: the kernel kills it with the thread (see `process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable
from typing import Any, Final, Self, TypeVar

import msgspec

from chaos.errors import InternalError, LabHung, PspDied
from chaos.lab.psp import wire
from chaos.lab.psp.mailbox import CommandRecord
from chaos.lab.psp.plan import FailpointPlan, Firing

DEADLINE_S: Final = 10.0
_LINE_LIMIT: Final = 1 << 30  # a snapshot holds the launch data of guests that are being launched

_T = TypeVar("_T")


class PspControl:
    """One software PSP. Not for use from several event loops; requests from several tasks are kept apart."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next = 1
        self._waiting: dict[int, asyncio.Future[wire.AnyReply]] = {}
        self._ready: asyncio.Future[wire.PspReady] = asyncio.get_running_loop().create_future()
        self._firings: asyncio.Queue[Firing | None] = asyncio.Queue()
        self._dead: str | None = None
        self.records: list[CommandRecord] = []
        self.lost = 0
        self._task = asyncio.create_task(self._receive(), name="psp control")

    @classmethod
    async def open(cls, connection: socket.socket) -> Self:
        """Take over `connection`, the other end of what the process got as --control-fd."""
        connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connection, limit=_LINE_LIMIT)
        return cls(reader, writer)

    async def close(self) -> None:
        """Hang up, which ends the process. May be called twice."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._die("the controller hung up")

    async def ready(self, deadline: float = DEADLINE_S) -> int:
        """Wait until commands are answered. Returns the process id."""
        message = await self._within(asyncio.shield(self._ready), deadline, "to be ready")
        return message.pid

    async def save(self, deadline: float = DEADLINE_S) -> wire.PspSnapshot:
        """Firmware and registers. Stop the machine first: commands that come later are not in it."""
        reply = await self._ask(wire.Save(self._number()), deadline)
        assert isinstance(reply, wire.SavedReply)
        return reply.snapshot

    async def load(self, snapshot: wire.PspSnapshot, deadline: float = DEADLINE_S) -> None:
        """Give a process started with --restore its state; it is ready after that."""
        await self._ask(wire.Load(self._number(), snapshot), deadline)

    async def plan(self, plan: FailpointPlan, deadline: float = DEADLINE_S) -> None:
        """Follow `plan` alone from the next command on; `FailpointPlan()` ends all faults but a stall that is on."""
        await self._ask(wire.SetPlan(self._number(), plan), deadline)

    async def add(self, plan: FailpointPlan, deadline: float = DEADLINE_S) -> None:
        """Follow `plan` as well, after the rules there are."""
        await self._ask(wire.AddPlan(self._number(), plan), deadline)

    async def withdraw(self, name: str, deadline: float = DEADLINE_S) -> None:
        """End the faults of this name, and a stall of one of them."""
        await self._ask(wire.WithdrawPlan(self._number(), name), deadline)

    async def release(self, deadline: float = DEADLINE_S) -> None:
        """Let the stalled command go on. InternalError if there is none."""
        await self._ask(wire.ReleaseStalled(self._number()), deadline)

    async def status(self, deadline: float = DEADLINE_S) -> wire.StatusReply:
        """How things stand; see StatusReply."""
        reply = await self._ask(wire.AskStatus(self._number()), deadline)
        assert isinstance(reply, wire.StatusReply)
        return reply

    async def trace(self, on: bool, deadline: float = DEADLINE_S) -> None:
        """Have commands added to `records`. All that ended before any later reply are in it when that comes."""
        await self._ask(wire.Trace(self._number(), on), deadline)

    async def wbinvd(self, deadline: float = DEADLINE_S) -> None:
        """Say that all caches were written back (with --watch-wbinvd)."""
        await self._ask(wire.Wbinvd(self._number()), deadline)

    async def quit(self, deadline: float = DEADLINE_S) -> None:
        """End the process, and hang up."""
        await self._ask(wire.Quit(self._number()), deadline)
        await self.close()

    async def next_firing(self, deadline: float = DEADLINE_S) -> Firing:
        """The next rule that fired, in order, each handed out once."""
        firing = await self._within(self._firings.get(), deadline, "to follow its plan")
        if firing is None:
            self._firings.put_nowait(None)  # for the next one who asks
            raise self._death()
        return firing

    def _number(self) -> int:
        self._next += 1
        return self._next

    async def _ask(self, request: wire.AnyRequest, deadline: float) -> wire.AnyReply:
        if self._dead is not None:
            raise self._death()
        future: asyncio.Future[wire.AnyReply] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        what = f"to answer {request.__struct_config__.tag}"
        try:
            self._writer.write(wire.encode(request))
            reply = await self._within(future, deadline, what)
        finally:
            self._waiting.pop(request.id, None)
        if isinstance(reply, wire.PspFailed):
            raise InternalError(f"the software PSP refused {request.__struct_config__.tag}: {reply.message}")
        return reply

    async def _within(self, awaitable: Awaitable[_T], deadline: float, what: str) -> _T:
        try:
            async with asyncio.timeout(deadline):
                return await awaitable
        except TimeoutError:
            raise LabHung(
                f"waited {deadline:g} s for the software PSP {what}",
                remedy="look whether the process is stopped or the machine is overloaded",
            ) from None

    async def _receive(self) -> None:
        reason = "it closed its control channel"
        try:
            while line := await self._reader.readline():
                self._take(wire.decode_answer(line))
        except (ConnectionError, ValueError, msgspec.MsgspecError) as error:
            reason = f"its control channel broke: {error}"
        self._die(reason)

    def _take(self, message: wire.AnyReply | wire.AnyEvent) -> None:
        match message:
            case wire.PspReady():
                self._ready.set_result(message)
            case wire.Fired():
                self._firings.put_nowait(message.firing)
            case wire.PspTraced():
                self.records.extend(message.records)
                self.lost += message.lost
            case _:
                future = self._waiting.get(message.id)
                if future is not None and not future.done():
                    future.set_result(message)

    def _die(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        waiting: list[asyncio.Future[Any]] = [*self._waiting.values(), self._ready]
        for future in waiting:
            if not future.done():
                future.set_exception(self._death())
                future.exception()  # whoever waits gets it; nobody waiting is no mistake
        self._firings.put_nowait(None)

    def _death(self) -> PspDied:
        return PspDied(f"the software PSP is gone: {self._dead}", remedy="its last words are on its standard error")
