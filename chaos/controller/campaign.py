# SPDX-License-Identifier: Apache-2.0
"""Many runs: which lab carries out which, and how many at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from chaos.controller.carry_out import RunResult, carry_out
from chaos.controller.console import SerialConsole
from chaos.controller.host import Host, Session
from chaos.experiment.model import Experiment
from chaos.history.records import Invoke, Record
from chaos.judge import findings


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the options say of every run."""

    seed: int
    repeat: int
    runs: Path
    timeout: float
    known: tuple[findings.Finding, ...]
    withhold: frozenset[str]
    shared: bool


Tell = Callable[[str, str], None]  # which run, and what it is doing


@dataclass(frozen=True, slots=True)
class _Stint:
    """Runs that one opened host carries out one after the other: each an experiment and its seed."""

    host: Host
    runs: tuple[tuple[Experiment, int], ...]
    done: list[RunResult]


def _stints(hosts: Sequence[Host], wanted: Sequence[Experiment], plan: _Plan, jobs: int = 1) -> list[_Stint]:
    """Every experiment on every host, `plan.repeat` times. A lab is opened anew for each, this machine once for all.
    With fewer of these than `jobs`, the repetitions of each are divided among several labs."""
    stints = []
    for host in hosts:
        each = [tuple((experiment, plan.seed + number) for number in range(plan.repeat)) for experiment in wanted]
        if host.anew:
            labs = math.ceil(jobs / (len(hosts) * len(wanted)))
            size = math.ceil(plan.repeat / labs)
            stints += [
                _Stint(host.suited(runs[0][0]), runs[at : at + size], [])
                for runs in each
                for at in range(0, plan.repeat, size)
            ]
        else:
            stints.append(_Stint(host, tuple(chain.from_iterable(each)), []))
    return stints


async def _all(stints: Sequence[_Stint], jobs: int, plan: _Plan, tell: Tell) -> list[RunResult]:
    """Carry them all out, at most `jobs` at a time, and return their runs in the order of the stints."""
    waiting = iter(stints)

    async def work() -> None:
        for stint in waiting:
            await _carry_out(stint, plan, tell)

    await asyncio.gather(*(work() for _ in range(jobs)))  # where one fails, asyncio.run ends the others
    return [result for stint in stints for result in stint.done]


async def _carry_out(stint: _Stint, plan: _Plan, tell: Tell) -> None:
    while left := stint.runs[len(stint.done) :]:
        console = SerialConsole()
        async with stint.host.open(console.line) as session:
            for experiment, seed in left:
                stint.done.append(await _one(stint.host, session, console, experiment, seed, plan, tell))
                if stint.done[-1].broken is not None or session.spent:
                    break  # the session went with it; the next run gets a new one


async def _one(
    host: Host, session: Session, console: SerialConsole, experiment: Experiment, seed: int, plan: _Plan, tell: Tell
) -> RunResult:
    where = host.describe()
    run = f"{experiment.name} on {where.kernel_source or 'this machine'}"
    if plan.repeat > 1:
        run += f", {seed - plan.seed + 1} of {plan.repeat}"
    tell(run, "")

    def watch(record: Record) -> None:
        if isinstance(record, Invoke):
            tell(run, f": {record.phase or record.f} ({record.agent})")

    return await carry_out(
        session, experiment, seed=seed, where=where, runs=plan.runs, timeout=plan.timeout, known=plan.known,
        withhold=plan.withhold, shared=plan.shared, console=console, watch=watch,
    )  # fmt: skip
