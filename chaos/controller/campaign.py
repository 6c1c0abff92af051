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
from chaos.experiment.steps import SweepStep
from chaos.history.records import Invoke, Record
from chaos.judge import findings


@dataclass(frozen=True, slots=True)
class Campaign:
    """What is the same for every run. `known` are the findings to accept, `timeout` is None for as long as the host and
    the experiment need."""

    seed: int
    repeat: int
    runs: Path
    timeout: float | None
    known: tuple[findings.Finding, ...]
    withhold: frozenset[str]
    shared: bool


Tell = Callable[[str, str], None]  # which run, and what it is doing


@dataclass(frozen=True, slots=True)
class Stint:
    """Runs that one opened host carries out one after the other: each an experiment and its seed."""

    host: Host
    runs: tuple[tuple[Experiment, int], ...]
    done: list[RunResult]


def stints(hosts: Sequence[Host], wanted: Sequence[Experiment], campaign: Campaign, jobs: int = 1) -> list[Stint]:
    """Every experiment on every host, `campaign.repeat` times. A lab is opened anew for each, this machine once for
    all. With fewer of these than `jobs`, the repetitions of each are divided among several labs."""
    found = []
    for host in hosts:
        each = [
            tuple((experiment, campaign.seed + number) for number in range(campaign.repeat)) for experiment in wanted
        ]
        if host.anew:
            labs = math.ceil(jobs / (len(hosts) * len(wanted)))
            size = math.ceil(campaign.repeat / labs)
            found += [
                Stint(host.suited(runs[0][0]), runs[at : at + size], [])
                for runs in each
                for at in range(0, campaign.repeat, size)
            ]
        else:
            found.append(Stint(host, tuple(chain.from_iterable(each)), []))
    return found


async def carry_out_all(planned: Sequence[Stint], jobs: int, campaign: Campaign, tell: Tell) -> list[RunResult]:
    """Carry these stints out, at most `jobs` at a time, and return their runs in the order of the stints."""
    waiting = iter(planned)

    async def work() -> None:
        for stint in waiting:
            await _carry_out(stint, campaign, tell)

    await asyncio.gather(*(work() for _ in range(jobs)))  # where one fails, asyncio.run ends the others
    return [result for stint in planned for result in stint.done]


async def _carry_out(stint: Stint, campaign: Campaign, tell: Tell) -> None:
    while left := stint.runs[len(stint.done) :]:
        console = SerialConsole()
        async with stint.host.open(console.line) as session:
            for experiment, seed in left:
                stint.done.append(await _one(stint.host, session, console, experiment, seed, campaign, tell))
                if stint.done[-1].broken is not None or session.spent:
                    break  # the session went with it; the next run gets a new one


def runs_in(experiment: Experiment) -> int:
    """How many runs it is taken to be as long as. A sweep goes through its steps once for each fault point."""
    return min(20, 1 + 5 * sum(isinstance(step, SweepStep) for step in experiment.script))


async def _one(
    host: Host,
    session: Session,
    console: SerialConsole,
    experiment: Experiment,
    seed: int,
    campaign: Campaign,
    tell: Tell,
) -> RunResult:
    where = host.describe()
    run = f"{experiment.name} on {where.kernel_source or 'this machine'}"
    if campaign.repeat > 1:
        run += f", {seed - campaign.seed + 1} of {campaign.repeat}"
    tell(run, "")

    def watch(record: Record) -> None:
        if isinstance(record, Invoke):
            tell(run, f": {record.phase or record.f} ({record.agent})")

    timeout = campaign.timeout or host.patience * runs_in(experiment)
    return await carry_out(
        session, experiment, seed=seed, where=where, runs=campaign.runs, timeout=timeout, known=campaign.known,
        withhold=campaign.withhold, shared=campaign.shared, console=console, watch=watch,
    )  # fmt: skip
