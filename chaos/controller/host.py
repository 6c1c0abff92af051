# SPDX-License-Identifier: Apache-2.0
"""Where runs happen: a lab, or this machine. Both are one runner that takes orders and gives records.

    async with host.open(console) as session:        what the machine lacks is said here, before a run begins
        await session.carry_out(order, record=…)
        if not session.spent:
            await session.carry_out(another, …)       on the same kernel, which may remember the first

The records are written down by the caller as they come, outside the lab: a kernel that panics costs the run, never
its record.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from chaos.controller.conversation import Write
from chaos.controller.host_description import HostDescription
from chaos.errors import LabFailed, SevchaosError
from chaos.experiment.model import Experiment
from chaos.runner.order import Order

RUNNER = "chaos.runner.main"
PATIENCE = 180.0


class Session(Protocol):
    @property
    def spent(self) -> str:
        """Why no further order should be given, "" if one may: a fault that nothing undoes is left in the host."""

    async def carry_out(self, order: Order, *, record: Write) -> None:
        """Carry out one order; `record` gets each record as it comes.

        Raises what broke the host; what was recorded until then stands, and the session is of no more use.
        """


class Host(Protocol):
    @property
    def anew(self) -> bool:
        """Whether it is as nobody has used it yet each time that it is opened."""

    @property
    def patience(self) -> float:
        """Seconds after which a run of a dozen operations is taken to hang, unless somebody says how many."""

    def describe(self) -> HostDescription: ...

    def suited(self, experiment: Experiment) -> Host:
        """The same as this experiment needs it."""

    def open(self, console: Callable[[str], None]) -> AbstractAsyncContextManager[Session]:
        """A runner that waits for orders; `console` gets each line of the serial console.

        Raises what the machine lacks.
        """


@contextlib.asynccontextmanager
async def _under_way(work: Coroutine[object, object, int]) -> AsyncIterator[asyncio.Task[int]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def last_words(error: SevchaosError) -> str:
    """How a run that broke is described in its End record; what else there is to say is in the error."""
    message = error.message.partition("\n")[0]
    return message if not isinstance(error, LabFailed) else f"the host broke: {message}"
