# SPDX-License-Identifier: Apache-2.0
"""One run from order to verdict, seen from outside: directory, history, judgement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos import history
from chaos.errors import KernelPanicked, SevchaosError
from chaos.experiment import Experiment, Order
from chaos.findings import Finding
from chaos.history import End, History, Kernel, Record
from chaos.host import Host, last_words
from chaos.judge import judge
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
    host: Host,
    experiment: Experiment,
    *,
    seed: int,
    runs: Path,
    timeout: float,
    known: tuple[Finding, ...],
    watch: Callable[[Record], None],
) -> Conducted:
    """Carry an experiment out and judge it. Raises only what kept it from beginning."""
    description = host.describe()
    directory = RunDirectory.create(runs, experiment, seed, description)
    writer = history.Writer(directory.history)
    broken: SevchaosError | None = None
    with (directory.path / "console.log").open("w") as console, (directory.path / "dmesg.log").open("w") as dmesg:

        def record(entry: Record) -> None:
            written = writer.write(entry)
            if isinstance(written, Kernel):
                dmesg.write(f"<{written.level}>[{written.t / 1e9:12.6f}] {written.text}\n")
            watch(written)

        def line(text: str) -> None:
            console.write(f"{text}\n")

        try:
            order = Order(experiment=experiment, seed=seed, host=description.host)
            await host.carry_out(order, record=record, console=line, timeout=timeout)
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


def _last(writer: history.Writer) -> int:
    return writer.records[-1].t if writer.records else 0


def _close(error: SevchaosError, writer: history.Writer, record: Callable[[Record], None]) -> None:
    """The runner could not say how it ended, so it is said from outside, at the time of its last record."""
    if isinstance(error, KernelPanicked):
        record(Kernel(t=_last(writer), level=0, text=f"Kernel panic - not syncing: {error.message}"))
    if not (writer.records and isinstance(writer.records[-1], End)):
        record(End(t=_last(writer), complete=False, reason=last_words(error)))
