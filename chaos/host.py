# SPDX-License-Identifier: Apache-2.0
"""Where runs happen: a lab, or this machine. Both are one runner that takes orders and gives records.

The records are written down by the caller as they come, outside the lab: a kernel that panics costs the run, never
its record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Protocol

import msgspec

from chaos import history
from chaos.errors import HostLacks, LabFailed, LabHung, SevchaosError
from chaos.experiment import Order
from chaos.history import End, Note, Record
from chaos.store import Host as Description

Say = Callable[[str], None]
RUNNER = "chaos.runner"


class Host(Protocol):
    def describe(self) -> Description: ...

    async def carry_out(
        self, order: Order, *, record: Callable[[Record], None], console: Callable[[str], None], timeout: float
    ) -> None:
        """Carry out one order. `record` gets each record as it comes, `console` each line of the serial console.

        Raises what broke the host; what was recorded until then stands.
        """


class _Records:
    """Cuts a byte stream into records."""

    def __init__(self, record: Callable[[Record], None]) -> None:
        self._rest = b""
        self._record = record

    async def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._record(history.decode(line))


def _but_the_end(record: Callable[[Record], None], told: list[Record]) -> Callable[[Record], None]:
    """Passes records on and keeps them, the last one back: what the firmware saw is told before it."""

    def sink(entry: Record) -> None:
        told.append(entry)
        if not isinstance(entry, End):
            record(entry)

    return sink


class _Words:
    """Collects what a runner says on stderr: nothing, if all is well."""

    def __init__(self) -> None:
        self.text = ""

    async def __call__(self, data: bytes) -> None:
        self.text = (self.text + data.decode(errors="replace"))[-4000:]


def _check_end(code: int, words: _Words) -> None:
    if code:
        raise SevchaosError(
            f"the runner ended with {code}:\n{words.text.strip()}", remedy="this is a bug of ours; please report it"
        )


class LabHost:
    """A lab of its own for every run, restored from the same bytes."""

    def __init__(self, wish: object, *, say: Say) -> None:
        from chaos.lab.session import Wish

        assert isinstance(wish, Wish)
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

    async def carry_out(
        self, order: Order, *, record: Callable[[Record], None], console: Callable[[str], None], timeout: float
    ) -> None:
        from chaos.lab.session import execute, open_lab
        from chaos.lab.witness import compare_clocks, firmware_records

        words = _Words()
        lines = iter([msgspec.json.encode(order) + b"\n"])

        async def orders() -> bytes:
            return next(lines, b"")

        told: list[Record] = []
        async with open_lab(self._wish, say=self._say, listener=console) as lab:
            clock = await compare_clocks(lab)
            await lab.psp.trace(True)
            sink = _Records(_but_the_end(record, told))
            ended = await execute(lab, [RUNNER], stdin=orders, stdout=sink, stderr=words, warm=True, timeout=timeout)
            await lab.psp.trace(False)  # and with it everything that was traced
            if lab.psp.lost:
                record(Note(t=told[-1].t, topic="witness", text=f"the firmware: {lab.psp.lost} commands not recorded"))
            for command in firmware_records(lab.psp.records, told, clock):
                record(command)
        for entry in told:
            if isinstance(entry, End):
                record(entry)
        _check_end(ended.code, words)


class LocalHost:
    """This machine, with its own SEV."""

    def describe(self) -> Description:
        return Description(host="local", release=os.uname().release, cpus=os.cpu_count() or 0)

    async def carry_out(
        self, order: Order, *, record: Callable[[Record], None], console: Callable[[str], None], timeout: float
    ) -> None:
        if os.geteuid() != 0:
            raise HostLacks(
                "runs on this machine need root: they make cgroups and open /dev/sev",
                remedy="become root, or use --host lab, which needs nothing",
            )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", RUNNER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        words, records = _Words(), _Records(record)
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        process.stdin.close()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(_pump(process.stdout, records), _pump(process.stderr, words))
                code = await process.wait()
        except TimeoutError:
            raise LabHung(f"the run was not done after {timeout:g} s", remedy="give it longer with --timeout") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)  # its warden removes what it had made
                await process.wait()
        _check_end(code, words)


async def _pump(reader: asyncio.StreamReader, sink: Callable[[bytes], object]) -> None:
    while data := await reader.read(1 << 16):
        result = sink(data)
        if asyncio.iscoroutine(result):
            await result


def last_words(error: SevchaosError) -> str:
    """How a run that broke is described in its End record."""
    return error.message if not isinstance(error, LabFailed) else f"the host broke: {error.message}"
