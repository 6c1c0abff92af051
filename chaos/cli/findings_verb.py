# SPDX-License-Identifier: Apache-2.0
"""`sevchaos findings`: which promises stock kernels break, and whether a kernel does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from chaos.cli.common import jobs_option, progress, runs_option, say, silent
from chaos.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.judge.findings import Finding
    from chaos.judge.sightings import KernelSightings


@click.command("findings")
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="K",
    help="Look on this kernel, see `sevchaos lab run --help`. Repeatable.",
)
@jobs_option
@runs_option
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def findings_(*, kernels: tuple[str, ...], jobs: int, runs: Path, as_json: bool, quiet: bool) -> int:
    """The written findings, and the kernels on which each was seen.

    With --kernel they are looked for: of each finding an experiment that shows it is carried out on each of these
    kernels, a minute a kernel. Any kernel can be asked so, yours too, and one on which nobody has looked yet.

    \b
    sevchaos findings
    sevchaos findings --kernel debian:7.3 --kernel ~/src/linux

    Exits 0 if each finding was seen or not seen, or is about what such a kernel does not have; 2 if one is unknown.
    """
    from chaos.judge import findings, sightings
    from reports import sighting_table

    known = findings.load()
    seen = _look(known, kernels, jobs, runs, quiet=quiet) if kernels else sightings.written(known)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(sighting_table.as_data(known, seen)))
    else:
        sighting_table.show(known, seen, looked=bool(kernels))
    unknown = any(one.seen is sightings.SightingOutcome.UNKNOWN for column in seen for one in column.sightings)
    return ExitCode.UNKNOWN if unknown else ExitCode.KEPT


def _look(
    known: Sequence[Finding], kernels: Sequence[str], jobs: int, runs: Path, *, quiet: bool
) -> list[KernelSightings]:
    import asyncio

    import experiments
    from chaos.controller.campaign import Campaign, carry_out_all, plan
    from chaos.controller.lab_host import LabHost
    from chaos.judge.sightings import KernelSightings, sighting
    from chaos.lab.session import Wish

    shown_by = {finding.id: finding.shown_by[0] for finding in known}
    wanted = [experiments.find(name) for name in dict.fromkeys(shown_by.values())]
    voice = silent if quiet else say
    campaign = Campaign(seed=0, repeat=1, runs=runs, timeout=None, known=())
    hosts = [LabHost(Wish(kernel=kernel), say=voice) for kernel in dict.fromkeys(kernels)]
    with progress(quiet) as tell:
        done = asyncio.run(carry_out_all(plan(hosts, wanted, campaign), jobs, campaign, tell))
    found = []
    for number, host in enumerate(hosts):
        mine = {run.experiment.name: run for run in done[number * len(wanted) : (number + 1) * len(wanted)]}
        version = next((run.verdict.kernel for run in mine.values() if run.verdict.kernel), "")
        seen = tuple(sighting(finding, mine[shown_by[finding.id]].verdict, known) for finding in known)
        found.append(KernelSightings(host.describe().kernel_source, version, seen))
    return found
