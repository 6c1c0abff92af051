# SPDX-License-Identifier: Apache-2.0
"""This machine as a host: the runner is a child process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from chaos.controller.conversation import Conversation, Write, not_ours
from chaos.controller.host import PATIENCE, RUNNER, Session, _under_way
from chaos.controller.host_description import HostDescription
from chaos.errors import HostLacks, LabFailed
from chaos.experiment.model import Experiment
from chaos.linux.process import die_with
from chaos.runner.order import Order

# A process that is killed closes its VMs first. A kernel that has oopsed meanwhile never comes to the end of that.
GONE_WITHIN = 60.0


class LocalHost:
    """This machine, with its own SEV. A `shared` one may have guests of others; else they are a reason not to begin."""

    anew = False  # it is the same machine each time, and who it belongs to does not boot it for a run
    patience = PATIENCE

    def __init__(self, *, shared: bool = False) -> None:
        self._shared = shared

    def describe(self) -> HostDescription:
        return HostDescription(host="local", release=os.uname().release, cpus=os.cpu_count() or 0)

    def suited(self, experiment: Experiment) -> LocalHost:
        return self  # it is what it is, and the runner skips what it does not fit

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
    from chaos.safety.survey import Paths, hierarchy, refuse_fragile, refuse_others, require, survey

    paths = Paths()
    refuse_fragile(paths)
    root, platform = hierarchy(paths), None
    require(survey("local", paths, root), paths, keys=())
    if shared:
        return
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

    async def carry_out(self, order: Order, *, record: Write) -> None:
        record(await self._talk.ask(order, record, self._runner, answer=not_ours))


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
