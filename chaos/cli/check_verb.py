# SPDX-License-Identifier: Apache-2.0
"""`sevchaos check`: judge a stored run again, on any machine."""

from __future__ import annotations

from pathlib import Path

import click

from chaos import findings, verdict
from chaos.judge import judge
from chaos.store import RunDirectory


@click.command("check")
@click.argument("directories", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Verdicts as JSON on stdout.")
@click.option("--accept-known", is_flag=True, help="As in `sevchaos run`.")
def check_(*, directories: tuple[Path, ...], as_json: bool, accept_known: bool) -> int:
    """Judge stored runs again. Nothing is carried out, and nothing in the run directory is changed."""
    from reports import machine, text

    known = findings.load() if accept_known else ()
    runs = []
    for directory in directories:
        experiment, history = RunDirectory(directory).read()
        runs.append(text.Run(experiment, history, judge(experiment, history, known=known), directory))
    if as_json:
        click.echo(machine.render(runs))
    else:
        text.show(runs)
    return verdict.exit_code([run.verdict for run in runs])
