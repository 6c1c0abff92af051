# SPDX-License-Identifier: Apache-2.0
"""`sevchaos check`: judge a stored run again, on any machine."""

from __future__ import annotations

from pathlib import Path

import click

from chaos.cli.reporting import bounds_options, chosen, format_option, show
from chaos.controller.directory import RunDirectory
from chaos.judge import findings, verdict
from chaos.judge.judge import judge


@click.command("check")
@click.argument("directories", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@format_option
@click.option("--accept-known", is_flag=True, help="As in `sevchaos run`.")
@bounds_options
def check_(
    *, directories: tuple[Path, ...], form: str | None, as_json: bool, accept_known: bool, bounds: verdict.Bounds
) -> int:
    """Judge stored runs again. Nothing is carried out, and nothing in the run directory is changed."""
    from reports.run import Run

    form = chosen(form, as_json)
    known = findings.load() if accept_known else ()
    runs = []
    for directory in directories:
        experiment, history = RunDirectory(directory).read()
        runs.append(Run(experiment, history, judge(experiment, history, known=known), directory))
    show(runs, form, bounds)
    return verdict.exit_code([run.verdict for run in runs], bounds)
