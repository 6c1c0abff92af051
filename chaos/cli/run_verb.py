# SPDX-License-Identifier: Apache-2.0
"""`sevchaos run`: carry experiments out, and judge them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import msgspec

import experiments
from chaos import fault
from chaos.cli.common import (
    DEFAULT_KERNEL,
    firmware_option,
    jobs_option,
    machine_options,
    progress,
    runs_option,
    say,
    silent,
)
from chaos.cli.reporting import bounds_options, chosen, format_option, show
from chaos.controller.campaign import Campaign, carry_out_all, plan
from chaos.controller.carry_out import RunResult
from chaos.controller.host import Host
from chaos.controller.lab_host import LabHost
from chaos.controller.local_host import LocalHost
from chaos.errors import UsageError
from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep
from chaos.judge import findings, verdict
from chaos.lab.session import Wish


@click.command("run")
@click.argument("names", nargs=-1, metavar="NAME…")
@click.option("--all", "everything", is_flag=True, help="The whole catalogue.")
@click.option(
    "--select",
    "expression",
    metavar="EXPR",
    help="Run the catalogue entries matching EXPR, e.g. `kill and not network`. Words match faults, kinds, listed "
    "promises, or parts of a name.",
)
@click.option(
    "--host",
    type=click.Choice(["lab", "local"]),
    default="lab",
    show_default=True,
    help="Where: in the lab, or on this machine with its own SEV.",
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="K",
    help=f"Kernel of the lab, see `sevchaos lab run --help`. Repeatable. [default: {DEFAULT_KERNEL}]",
)
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Only source of chance. [default: a random one]")
@format_option
@bounds_options
@click.option(
    "--accept-known",
    is_flag=True,
    help="Do not count deviations that match a written finding on this kernel, nor questions that an experiment says "
    "it cannot ask. Both are shown all the same, and so is a finding that was not seen where it should be.",
)
@runs_option
@click.option(
    "--timeout",
    type=click.FloatRange(1, 86400),
    metavar="S",
    help="Abort a run after S seconds. [default: 180, 720 on a kernel with KASAN or KCSAN; more with sweeps]",
)
@machine_options
@click.option(
    "--repeat",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Run each experiment N times, with seeds SEED, SEED+1, …",
)
@jobs_option
@click.option(
    "--fresh",
    is_flag=True,
    help="A lab for each run. Otherwise one is used for further runs as long as nothing leaked in it, its kernel was "
    "quiet and its accounts are right.",
)
@click.option(
    "--withhold",
    multiple=True,
    metavar="FAULT",
    help="Do not apply this fault, and ask for its evidence all the same: the run must end unknown. Repeatable.",
)
@click.option(
    "--shared-host",
    "shared",
    is_flag=True,
    help="With --host local: run although SEV guests of others live here. A part of the ASIDs is left to them, and "
    "whatever strikes the whole host is skipped.",
)
@firmware_option
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def run_(
    *, names: tuple[str, ...], host: str, kernels: tuple[str, ...], seed: int | None, form: str | None, as_json: bool,
    accept_known: bool, runs: Path, timeout: float | None, wish: Wish, quiet: bool, repeat: int,
    everything: bool, expression: str | None, withhold: tuple[str, ...], shared: bool, firmware: str | None, jobs: int,
    fresh: bool,
    bounds: verdict.Bounds,
) -> int:  # fmt: skip
    """Carry out experiments, by name, by file or by selection, and say which promises the kernel kept.

    Every promise is judged. Those that an experiment lists must be kept; any other one counts if it is broken.

    Exits 0 if some are kept and nothing counts against the kernel, 1 if any is broken, 3 if something was left on the
    host, 2 if any is unknown or none is kept, 4 if all were skipped.
    """
    form = chosen(form, as_json)
    selected = experiments.select(expression) if everything or expression is not None else {}
    wanted = [experiments.find(name) for name in dict.fromkeys((*names, *selected))]  # checked before anything starts
    if not wanted:
        raise UsageError("nothing to run", remedy="name experiments, or give --select EXPR or --all")
    for name in withhold:
        fault.load(name)
    if firmware is not None:
        wanted = [_with_firmware(experiment, firmware) for experiment in wanted]
    voice = silent if quiet else say
    hosts: list[Host]
    if host == "local":
        if kernels:
            raise UsageError("--kernel chooses a lab's kernel; --host local has its own", remedy="leave one out")
        if jobs > 1:
            raise UsageError("--jobs is how many labs; --host local is one machine", remedy="leave one out")
        if fresh:
            raise UsageError("--fresh is a lab for each run; --host local has none", remedy="leave one out")
        hosts = [LocalHost(shared=shared)]
    else:
        if shared:
            raise UsageError("--shared-host is about this machine; a lab is nobody else's", remedy="leave it out")
        hosts = [LabHost(replace(wish, kernel=kernel), say=voice) for kernel in kernels or (DEFAULT_KERNEL,)]
    known = findings.load() if accept_known else ()
    used = secrets.randbelow(1 << 32) if seed is None else seed
    campaign = Campaign(
        seed=used, repeat=repeat, runs=runs, timeout=timeout, known=known, withhold=frozenset(withhold), shared=shared,
        fresh=fresh,
    )  # fmt: skip
    with progress(quiet) as tell:
        done = asyncio.run(carry_out_all(plan(hosts, wanted, campaign), jobs, campaign, tell))
    _report(done, form, bounds)
    return verdict.exit_code([result.verdict for result in done], bounds)


def _with_firmware(experiment: Experiment, plan: str) -> Experiment:
    """The experiment with a firmware that follows a plan from the first step on."""
    step = FaultStep(fault="firmware", options={"plan": plan})
    return msgspec.structs.replace(experiment, script=(step, *experiment.script))


def _report(done: Sequence[RunResult], form: str, bounds: verdict.Bounds) -> None:
    from reports.run import Run

    show([Run(c.experiment, c.history, c.verdict, c.directory) for c in done], form, bounds)
    for result in done:
        if result.broken is not None:
            from chaos.cli.common import explain

            explain(result.broken)
