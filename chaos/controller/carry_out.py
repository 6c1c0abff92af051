# SPDX-License-Identifier: Apache-2.0
"""One run from order to verdict, seen from outside: directory, history, judgement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from chaos.controller.console import SerialConsole, unsaid
from chaos.controller.directory import RunDirectory
from chaos.controller.host import Session, last_words
from chaos.controller.host_description import HostDescription
from chaos.errors import SevchaosError
from chaos.experiment.model import Experiment
from chaos.history import file
from chaos.history.records import End, Header, History, Kernel, Record
from chaos.judge.findings import Finding
from chaos.judge.judge import judge
from chaos.judge.verdict import RunVerdict
from chaos.runner.order import Order


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run that is over. `broken` is what ended it before its time, if anything did."""

    experiment: Experiment
    history: History
    verdict: RunVerdict
    directory: Path
    broken: SevchaosError | None


async def carry_out(
    session: Session,
    experiment: Experiment,
    *,
    seed: int,
    where: HostDescription,
    runs: Path,
    timeout: float,
    known: tuple[Finding, ...],
    withhold: frozenset[str] = frozenset(),
    shared: bool = False,
    console: SerialConsole,
    watch: Callable[[Record], None],
) -> RunResult:
    """Carry an experiment out on an open host and judge it. Raises `NoSpace` or `UsageError` before it begins."""
    directory = RunDirectory.create(runs, experiment, seed, where)
    writer = file.Writer(directory.history)
    broken: SevchaosError | None = None
    with (directory.path / "dmesg.log").open("w") as dmesg, console.into(directory.path / "console.log"):
        book = _Book(writer, dmesg, console, watch)
        try:
            order = Order(
                experiment=experiment, seed=seed, host=where.host, withhold=withhold, shared=shared, timeout=timeout
            )
            await session.carry_out(order, record=book.record)
        except SevchaosError as error:
            broken = error
            book.close(last_words(error))
        except asyncio.CancelledError:
            book.close("interrupted")
            raise
        finally:
            writer.close()
    told = writer.history()
    verdict = judge(experiment, told, known=known)
    directory.write_verdict(verdict)
    return RunResult(experiment, told, verdict, directory.path, broken)


@dataclass(slots=True)
class _Book:
    """What is written down of a run while it goes on. `ahead` is `log_ahead` of its header."""

    writer: file.Writer
    dmesg: TextIO
    console: SerialConsole
    watch: Callable[[Record], None]
    ahead: int = 0

    def record(self, entry: Record) -> None:
        """Before the End comes what only the console has said."""
        if isinstance(entry, Header):
            self.ahead = entry.log_ahead or 0
        if isinstance(entry, End):
            for line in unsaid(self.console.heard, self.writer.records):
                self._write(line)
        self._write(entry)

    def _write(self, entry: Record) -> None:
        written = self.writer.write(entry)
        self.console.after = written.t
        if isinstance(written, Kernel):
            self.dmesg.write(f"<{written.level}>[{(written.t - self.ahead) / 1e9:12.6f}] {written.text}\n")
        self.watch(written)

    def close(self, reason: str) -> None:
        """The runner could not say how it ended, so it is said from outside, at the time of its last record."""
        if not (self.writer.records and isinstance(self.writer.records[-1], End)):
            self.record(End(t=self.console.after, complete=False, reason=reason))
