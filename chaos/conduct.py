# SPDX-License-Identifier: Apache-2.0
"""One run from order to verdict, seen from outside: directory, history, judgement."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from chaos import history
from chaos.errors import KernelPanicked, SevchaosError
from chaos.experiment import Experiment, Order
from chaos.findings import Finding
from chaos.history import End, History, Kernel, Record
from chaos.host import Session, last_words
from chaos.judge import judge
from chaos.store import Host as Description
from chaos.store import RunDirectory
from chaos.verdict import RunVerdict


@dataclass(frozen=True, slots=True)
class Conducted:
    """A run that is over. `broken` is what ended it before its time, if anything did."""

    experiment: Experiment
    history: History
    verdict: RunVerdict
    directory: Path
    broken: SevchaosError | None


async def conduct(
    session: Session,
    experiment: Experiment,
    *,
    seed: int,
    where: Description,
    runs: Path,
    timeout: float,
    known: tuple[Finding, ...],
    console: Console,
    watch: Callable[[Record], None],
) -> Conducted:
    """Carry an experiment out on an open host and judge it. Raises `NoSpace` or `UsageError` before it begins."""
    directory = RunDirectory.create(runs, experiment, seed, where)
    writer = history.Writer(directory.history)
    broken: SevchaosError | None = None
    with (directory.path / "dmesg.log").open("w") as dmesg, console.into(directory.path / "console.log"):

        def record(entry: Record) -> None:
            written = writer.write(entry)
            if isinstance(written, Kernel):
                dmesg.write(f"<{written.level}>[{written.t / 1e9:12.6f}] {written.text}\n")
            watch(written)

        try:
            order = Order(experiment=experiment, seed=seed, host=where.host)
            await session.carry_out(order, record=record, timeout=timeout)
        except SevchaosError as error:
            broken = error
            _close(error, writer, record)
        except asyncio.CancelledError:
            record(End(t=_last(writer), complete=False, reason="interrupted"))
            raise
        finally:
            writer.close()
    told = writer.history()
    verdict = judge(experiment, told, known=known)
    directory.write_verdict(verdict)
    return Conducted(experiment, told, verdict, directory.path, broken)


class Console:
    """The serial console of a host that outlives a run: its lines go to the log of the run that is on."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def line(self, text: str) -> None:
        if self._file is not None:
            self._file.write(f"{text}\n")

    @contextlib.contextmanager
    def into(self, path: Path) -> Iterator[None]:
        with path.open("w") as self._file:
            yield
        self._file = None


def _last(writer: history.Writer) -> int:
    return writer.records[-1].t if writer.records else 0


def _close(error: SevchaosError, writer: history.Writer, record: Callable[[Record], None]) -> None:
    """The runner could not say how it ended, so it is said from outside, at the time of its last record."""
    if isinstance(error, KernelPanicked):
        record(Kernel(t=_last(writer), level=0, text=f"Kernel panic - not syncing: {error.message}"))
    if not (writer.records and isinstance(writer.records[-1], End)):
        record(End(t=_last(writer), complete=False, reason=last_words(error)))
