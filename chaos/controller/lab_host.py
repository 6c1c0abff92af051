# SPDX-License-Identifier: Apache-2.0
"""The lab as a host: a run in a QEMU machine that was booted or restored for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from chaos.cache.entries import Say
from chaos.controller.conversation import Conversation, Write
from chaos.controller.host import PATIENCE, RUNNER, Session, _under_way
from chaos.controller.host_description import HostDescription
from chaos.controller.lab_witness import Clock
from chaos.controller.pulse import Pulse
from chaos.errors import LabFailed, LabHung
from chaos.experiment.model import Experiment
from chaos.history.records import End, Fault, History, Invoke, Note, Record, StoodStill
from chaos.judge.ledger.firmware_contexts import Contexts
from chaos.lab.machine import Lab
from chaos.lab.protocol import ProgramExited
from chaos.lab.session import Wish
from chaos.runner.order import Order

if TYPE_CHECKING:  # loaded when a lab is opened: a command that opens none is spared it
    from chaos.controller.lab_failpoints import PspFailpoints
    from chaos.lab.kernel.find import LabKernel


_FOR_GOOD = {
    "storage": "the firmware's storage was spoiled",  # a driver that could not write may not know what is in force
    "reload": "the drivers were loaded anew",  # the tracer's probes of them are gone
    "kernel-return": "a kernel function was made to return something else",
    "platform-reset": "the platform was reset",
}
"""Operations and faults whose effect nobody undoes, or nobody could prove to be undone."""


class LabHost:
    """A lab, restored from the same bytes each time it is opened."""

    anew = True

    def __init__(self, wish: Wish, *, say: Say) -> None:
        self._wish = wish
        self._say = say

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabHost) and self._wish == other._wish

    def __hash__(self) -> int:
        return hash(self._wish)

    def describe(self) -> HostDescription:
        from chaos.lab.qemu import find_qemu

        return HostDescription(
            host="lab",
            kernel_source=self._wish.kernel,
            qemu=".".join(map(str, find_qemu().version)),
            asids=(self._wish.sev_asids, self._wish.es_asids),
            cpus=self._wish.cpus,
            memory=self._memory,
            ccp=dict(self._wish.ccp),
        )

    @property
    def _memory(self) -> int:
        return self._wish.memory or self._kernel.memory

    @property
    def patience(self) -> float:
        return PATIENCE * self._kernel.slowness

    @cached_property
    def _kernel(self) -> LabKernel:
        """Found once: to find one is to look at each of its modules."""
        from chaos.lab.kernel.find import find_kernel

        return find_kernel(self._wish.kernel)

    def suited(self, experiment: Experiment) -> LabHost:
        ccp = tuple(sorted({**dict(self._wish.ccp), **experiment.ccp}.items()))
        return LabHost(replace(self._wish, ccp=ccp), say=self._say)

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Session]:
        from chaos.controller.lab_witness import compare_clocks
        from chaos.lab.session import execute, open_lab

        talk = Conversation()
        async with open_lab(self._wish, say=self._say, listener=console) as lab:
            clock = await compare_clocks(lab)
            runner = execute(lab, [RUNNER], stdin=talk.stdin, stdout=talk.stdout, stderr=talk.stderr, warm=True)
            async with _under_way(_code(runner)) as task:
                yield LabSession(lab, clock, talk, task, changed=bool(self._wish.ccp))


async def _code(runner: Awaitable[ProgramExited]) -> int:
    return (await runner).code


# Clocks of the lab and of this machine drift apart, and `Clock.doubt` is of the time when they were compared: by 4 ppm
# on a machine that was measured, which is a quarter of a millisecond in this time, and more where NTP slews.
COMPARED_FOR = 60.0  # seconds


class LabSession:
    """With `changed` the lab's driver has parameters of one experiment's, and may have left something by them."""

    def __init__(
        self, lab: Lab, clock: Clock, talk: Conversation, runner: asyncio.Task[int], *, changed: bool = False
    ) -> None:
        self.lab, self._clock, self._talk, self._runner, self._changed = lab, clock, talk, runner, changed
        self._compared = time.monotonic()
        self.spent = ""

    async def carry_out(self, order: Order, *, record: Write) -> None:
        """The records of the runner, and before the last of them what the firmware saw, also of a run that hung."""
        from chaos.controller.lab_failpoints import PspFailpoints

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
            with Pulse(self.lab.ran) as pulse:
                end = await self._ask(order, keep, firmware, told)
        except LabHung:
            with contextlib.suppress(LabFailed):
                await self._tell_of_firmware(told, before, record)
            raise
        await self._tell_of_firmware(told, before, record)
        for began, ended in pulse.stalls:
            record(StoodStill(t=began + self._clock.ahead, until=ended + self._clock.ahead))
        record(end)

    async def _ask(self, order: Order, keep: Write, firmware: PspFailpoints, told: Sequence[Record]) -> End:
        """And leave the firmware so that the next run can be told whether it is spent."""
        try:
            waiting = self.lab.kept_waiting
            return await self._talk.ask(order, keep, self._runner, answer=firmware.answer, kept_waiting=waiting)
        except LabHung as hung:
            hung.console = hung.console or await self.lab.interrogate()  # unless it was asked where that was found
            raise
        finally:
            with contextlib.suppress(LabFailed):  # then there is no firmware any more
                self.spent = await firmware.settle() or self._unsettled(told)

    def _unsettled(self, told: Sequence[Record]) -> str:
        """What of this lab no further run should find, though no account of the host need be wrong."""
        if gone := Contexts.of(History(tuple(told))).gone:
            return gone
        for record in told:
            if isinstance(record, Invoke) and (why := _FOR_GOOD.get(record.f)):
                return why
            if isinstance(record, Fault) and (why := _FOR_GOOD.get(record.fault)):
                return why
        if self._changed:
            return "its driver has the parameters of an experiment"
        return "its clock was compared long ago" if time.monotonic() - self._compared > COMPARED_FOR else ""

    async def _tell_of_firmware(self, told: Sequence[Record], before: int, record: Write) -> None:
        from chaos.controller.lab_witness import firmware_records

        psp = self.lab.psp
        await psp.trace(False)  # and with it comes everything that was traced
        if psp.lost:
            text = f"the firmware: {psp.lost} commands were not recorded"
            record(Note(t=told[-1].t if told else 0, topic="witness", text=text, witness="firmware"))
        for command in firmware_records(psp.records, told, self._clock, before=before):
            record(command)
