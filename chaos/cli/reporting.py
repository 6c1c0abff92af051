# SPDX-License-Identifier: Apache-2.0
"""How the verbs that judge say what came of it: `--format`, and `--json` for short. Reports go to stdout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from chaos.errors import UsageError
from chaos.judge import findings

if TYPE_CHECKING:
    from reports.run import Run

FORMATS = ("text", "json", "junit", "ktap")


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format` and `--json`; the command gets what `chosen` takes, as `form` and `as_json`."""
    options = (
        click.option("--format", "form", type=click.Choice(FORMATS), metavar="F",
                     help="Of the report on stdout: text for people, json, junit (XML) for CI systems, ktap as kernel "
                     "tests have it. `sevchaos check` gives any of them later.  [default: text]"),
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen(form: str | None, as_json: bool) -> str:
    """Raises `UsageError` if the two contradict each other."""
    if as_json and form not in (None, "json"):
        raise UsageError(f"--json is --format json, and --format {form} was given", remedy="leave one of them out")
    return "json" if as_json else form or "text"


def show(runs: Sequence[Run], form: str) -> None:
    """Print the report on these runs."""
    from reports import as_json, junit, ktap, text

    if form == "text":
        text.show(runs)
    elif form == "json":
        click.echo(as_json.render(runs))
    else:
        render = junit.render if form == "junit" else ktap.render
        click.echo(render(runs, findings.load()))
