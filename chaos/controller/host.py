# SPDX-License-Identifier: Apache-2.0
"""Where runs happen: a lab, or this machine. Both are one runner that takes orders and gives records.

    async with host.open(console) as session:        what the machine lacks is said here, before a run begins
        await session.carry_out(order, record=…, timeout=…)
        if not session.spent:
            await session.carry_out(another, …)       on the same kernel, which may remember the first

The records are written down by the caller as they come, outside the lab: a kernel that panics costs the run, never
its record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from chaos.controller.directory import Host as Description
from chaos.errors import HostLacks, InternalError, LabFailed, LabHung, SevchaosError
from chaos.history import records
from chaos.history.records import End, History, Note, Record
from chaos.judge.ledger.firmware_contexts import Contexts
from chaos.linux.process import die_with
from chaos.runner import questions
from chaos.runner.order import Order
from chaos.runner.questions import Answer, Question, Refused

if TYPE_CHECKING:
    from chaos.controller.lab_witness import Clock
    from chaos.lab.machine import Lab
    from chaos.lab.protocol import Exited
    from chaos.lab.session import Wish

Say = Callable[[str], None]
Write = Callable[[Record], None]
Answerer = Callable[[Question], Awaitable[Answer]]
RUNNER = "chaos.runner.main"
# A process that is killed closes its VMs first. A kernel that has oopsed meanwhile never comes to the end of that.
GONE_WITHIN = 60.0


class Session(Protocol):
    @property
    def spent(self) -> str:
        """Why no further order should be given, "" if one may: a fault that nothing undoes is left in the host."""

    async def carry_out(self, order: Order, *, record: Write, timeout: float) -> None:
        """Carry out one order; `record` gets each record as it comes.

        Raises what broke the host; what was recorded until then stands, and the session is of no more use.
        """


class Host(Protocol):
    @property
    def anew(self) -> bool:
        """Whether each experiment is to find it as nobody has used it yet: it is opened for each, not once for all."""

    def describe(self) -> Description: ...

    def open(self, console: Callable[[str], None]) -> AbstractAsyncContextManager[Session]:
        """A runner that waits for orders; `console` gets each line of the serial console.

        Raises what the machine lacks.
        """


class Conversation:
    """One runner: orders and answers in on its stdin, records and questions out on its stdout, what went wrong on its
    stderr."""

    def __init__(self) -> None:
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self._rest = b""
        self._record: Write = lambda entry: None
        self._answer: Answerer = not_ours
        self._end: asyncio.Future[End] | None = None
        self.words = ""

    async def stdin(self) -> bytes:
        return await self._input.get()

    async def stdout(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if questions.is_question(line):
                self._input.put_nowait(questions.encode(await self._answer(questions.decode(line))))
                continue
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
        self, order: Order, record: Write, runner: asyncio.Task[int], timeout: float, *, answer: Answerer
    ) -> End:
        """The End of the order, which is not given to `record`: others may have something to say before it."""
        self.listen(record, answer)
        self._end = asyncio.get_running_loop().create_future()
        self._input.put_nowait(msgspec.json.encode(order) + b"\n")
        both: set[asyncio.Future[Any]] = {self._end, runner}
        await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._end.done():
            return self._end.result()
        if not runner.done():
            raise LabHung(f"the run was not done after {timeout:g} s", remedy="give it longer with --timeout")
        code = runner.result()
        raise SevchaosError(
            f"the runner ended with {code}:\n{self.words.strip()}", remedy="this is a bug of ours; please report it"
        )


async def not_ours(question: Question) -> Answer:
    """What is answered where the firmware is a real one."""
    return Refused(number=question.number, reason="this machine's firmware is not ours to break; a lab's is")


class LabHost:
    """A lab, restored from the same bytes each time it is opened."""

    anew = True

    def __init__(self, wish: Wish, *, say: Say) -> None:
        self._wish = wish
        self._say = say

    def describe(self) -> Description:
        from chaos.lab.qemu import find_qemu

        return Description(
            host="lab",
            kernel_source=self._wish.kernel,
            qemu=".".join(map(str, find_qemu().version)),
            asids=(self._wish.sev_asids, self._wish.es_asids),
            cpus=self._wish.cpus,
            memory=self._wish.memory,
        )

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Session]:
        from chaos.controller.lab_witness import compare_clocks
        from chaos.lab.session import execute, open_lab

        talk = Conversation()
        async with open_lab(self._wish, say=self._say, listener=console) as lab:
            clock = await compare_clocks(lab)
            runner = execute(lab, [RUNNER], stdin=talk.stdin, stdout=talk.stdout, stderr=talk.stderr, warm=True)
            async with _under_way(_code(runner)) as task:
                yield LabSession(lab, clock, talk, task)


async def _code(runner: Awaitable[Exited]) -> int:
    return (await runner).code


@contextlib.asynccontextmanager
async def _under_way(work: Coroutine[object, object, int]) -> AsyncIterator[asyncio.Task[int]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class LabSession:
    def __init__(self, lab: Lab, clock: Clock, talk: Conversation, runner: asyncio.Task[int]) -> None:
        self.lab, self._clock, self._talk, self._runner = lab, clock, talk, runner
        self.spent = ""

    async def carry_out(self, order: Order, *, record: Write, timeout: float) -> None:
        """The records of the runner, and before the last of them what the firmware saw."""
        from chaos.controller.lab_failpoints import PspFailpoints
        from chaos.controller.lab_witness import firmware_records

        told: list[Record] = []

        def keep(entry: Record) -> None:
            told.append(entry)
            record(entry)

        psp = self.lab.psp
        psp.records.clear()
        psp.lost = 0
        firmware = PspFailpoints(psp, self._clock)
        before = await firmware.begin()
        await psp.trace(True)
        try:
            end = await self._talk.ask(order, keep, self._runner, timeout, answer=firmware.answer)
        except LabHung as hung:
            hung.console = self.lab.console.tail()
            raise
        finally:
            with contextlib.suppress(LabFailed):  # then there is no firmware any more
                self.spent = await firmware.settle() or Contexts.of(History(tuple(told))).gone
        await psp.trace(False)  # and with it comes everything that was traced
        if psp.lost:
            text = f"the firmware: {psp.lost} commands were not recorded"
            record(Note(t=end.t, topic="witness", text=text, witness="firmware"))
        for command in firmware_records(psp.records, told, self._clock, before=before):
            record(command)
        record(end)


class LocalHost:
    """This machine, with its own SEV. A `shared` one may have guests of others; else they are a reason not to begin."""

    anew = False  # it is the same machine each time, and a runner takes longer to start than most runs

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared

    def describe(self) -> Description:
        return Description(host="local", release=os.uname().release, cpus=os.cpu_count() or 0)

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Session]:
        if os.geteuid() != 0:
            raise HostLacks(
                "runs on this machine need root: they make cgroups and open /dev/sev",
                remedy="become root, or use --host lab, which needs nothing",
            )
        _refuse(shared=self._shared)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", RUNNER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True, preexec_fn=partial(die_with, os.getpid()),
        )  # fmt: skip
        talk = Conversation()
        try:
            async with _under_way(_converse(process, talk)) as task:
                yield _LocalSession(talk, task)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)  # its warden removes what it had made
                await _gone(process)


async def _gone(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(GONE_WITHIN):
            await process.wait()
    except TimeoutError:
        raise LabFailed(
            f"the runner, process {process.pid}, was killed and is not gone after {GONE_WITHIN:g} s",
            remedy="the kernel holds it: `dmesg` says why, and only a reboot helps",
        ) from None


def _refuse(*, shared: bool) -> None:
    """Here already, so that nothing is started. Of others' guests the runner asks again before each run."""
    from chaos.kvm.sev import Platform
    from chaos.safety.survey import Paths, hierarchy, refuse_fragile, refuse_others

    paths = Paths()
    refuse_fragile(paths)
    if shared:
        return
    root, platform = hierarchy(paths), None
    with contextlib.suppress(OSError):
        platform = Platform.open(paths.sev)
    try:
        refuse_others(root, platform)
    finally:
        if platform is not None:
            platform.close()


class _LocalSession:
    def __init__(self, talk: Conversation, runner: asyncio.Task[int]) -> None:
        self._talk, self._runner = talk, runner
        self.spent = ""

    async def carry_out(self, order: Order, *, record: Write, timeout: float) -> None:
        record(await self._talk.ask(order, record, self._runner, timeout, answer=not_ours))


async def _converse(process: asyncio.subprocess.Process, talk: Conversation) -> int:
    """Carry bytes to and fro until the process ends; returns its exit code."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    stdin = process.stdin

    async def feed() -> None:
        while order := await talk.stdin():
            stdin.write(order)
            await stdin.drain()

    feeding = asyncio.create_task(feed())
    try:
        await asyncio.gather(_pump(process.stdout, talk.stdout), _pump(process.stderr, talk.stderr))
        return await process.wait()
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, sink: Callable[[bytes], Awaitable[None]]) -> None:
    while data := await reader.read(1 << 16):
        await sink(data)


def last_words(error: SevchaosError) -> str:
    """How a run that broke is described in its End record."""
    return error.message if not isinstance(error, LabFailed) else f"the host broke: {error.message}"
