# SPDX-License-Identifier: Apache-2.0
"""Many runs: which lab carries out which, and how many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.controller.carry_out import RunResult, carry_out
from chaos.controller.console import SerialConsole
from chaos.controller.host import Host, Session
from chaos.experiment.model import Experiment
from chaos.experiment.steps import SweepStep
from chaos.history.records import Console, History, Invoke, Kernel, Record
from chaos.judge import findings
from chaos.judge.checkers.p12_quiet_kernel import report
from chaos.judge.verdict import Outcome, RunVerdict


@dataclass(frozen=True, slots=True)
class Campaign:
    """What is the same for every run. `known` are the findings to accept, `timeout` is None for as long as the host and
    the experiment need. With `fresh` each run gets a lab that no other has used."""

    seed: int
    repeat: int
    runs: Path
    timeout: float | None
    known: tuple[findings.Finding, ...]
    withhold: frozenset[str] = frozenset()
    shared: bool = False
    fresh: bool = False


Tell = Callable[[str, str], None]  # which run, and what it is doing


@dataclass(slots=True, eq=False)
class Planned:
    """A run that is to be, and once it is over what came of it."""

    host: Host
    experiment: Experiment
    seed: int
    result: RunResult | None = None


def plan(hosts: Sequence[Host], wanted: Sequence[Experiment], campaign: Campaign) -> list[Planned]:
    """Every experiment on every host, `campaign.repeat` times."""
    return [
        Planned(host.suited(experiment), experiment, campaign.seed + number)
        for host in hosts
        for experiment in wanted
        for number in range(campaign.repeat)
    ]


async def carry_out_all(planned: Sequence[Planned], jobs: int, campaign: Campaign, tell: Tell) -> list[RunResult]:
    """Carry these runs out, on at most `jobs` opened hosts at a time, and return what came of them in their order."""
    hosts: list[Host] = []
    for run in planned:
        if run.host not in hosts:
            hosts.append(run.host)
    left = sorted(planned, key=lambda run: hosts.index(run.host))  # or a host would be closed to be opened again

    async def work() -> None:
        while left:
            await _on_one_host(left, campaign, tell)

    await asyncio.gather(*(work() for _ in range(jobs)))  # where one fails, asyncio.run ends the others
    return [run.result for run in planned if run.result is not None]


async def _on_one_host(left: list[Planned], campaign: Campaign, tell: Tell) -> None:
    """Open the host that the next run wants, and carry out on it what else wants it, as long as it is fit for that."""
    run, console = left.pop(0), SerialConsole()
    async with run.host.open(console.line) as session:
        while True:
            run.result = result = await _one(session, console, run, campaign, tell)
            used = run.host.anew and (campaign.fresh or traces(result.verdict, result.history))
            following = next((other for other in left if other.host == run.host), None)
            if result.broken is not None or session.spent or used or following is None:
                return
            left.remove(following)
            run = following


# What these say is about the host, and holds for whoever comes next. The others are about guests that are gone by then.
_OF_THE_HOST = frozenset({"P1", "P2", "P8", "P9", "P11", "P12", "P13", "P14"})
_SURELY = frozenset({"P9", "P12"})


def traces(run: RunVerdict, history: History) -> str:
    """What the next run may find on the host of this one, "" if nothing: it came to its end, nothing leaked and the
    kernel was quiet, of which it is sure, and no other account of the host is wrong. One that was skipped as a whole
    has done nothing, but may have read what the kernel said of the run before it."""
    said = any(report(record) for record in history.records if isinstance(record, Kernel | Console))
    if not said and all(verdict.outcome is Outcome.SKIPPED for verdict in run.verdicts):
        return run.left
    told = [run.left] if run.left else []
    for verdict in run.verdicts:
        unsure = verdict.promise in _SURELY and verdict.outcome is not Outcome.KEPT
        if unsure or (verdict.promise in _OF_THE_HOST and verdict.outcome is Outcome.BROKEN):
            told.append(f"{verdict.promise} {verdict.outcome.value}")
    return ", ".join(told)


def runs_in(experiment: Experiment) -> int:
    """How many runs it is taken to be as long as. A sweep goes through its steps once for each fault point."""
    return min(20, 1 + 5 * sum(isinstance(step, SweepStep) for step in experiment.script))


async def _one(session: Session, console: SerialConsole, planned: Planned, campaign: Campaign, tell: Tell) -> RunResult:
    host, experiment, seed = planned.host, planned.experiment, planned.seed
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
