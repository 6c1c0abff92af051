# SPDX-License-Identifier: Apache-2.0
"""How the verbs that judge say what came of it: `--format`, and `--json` for short. Reports go to stdout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from chaos.errors import UsageError
from chaos.judge import findings
from chaos.judge.verdict import UNBOUNDED, Bounds

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


def bounds_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--max-skipped` and `--max-unknown`; the command gets both as `bounds`."""
    options = (
        click.option("--max-skipped", type=click.IntRange(0), metavar="N",
                     help="Exit 2 if more than N promises are skipped, as a whole or in part.  "
                     "[default: any number may]"),
        click.option("--max-unknown", type=click.IntRange(0), metavar="N",
                     help="Exit 2 if more than N promises are unknown, those included that --accept-known accepts.  "
                     "[default: any number may]"),
    )  # fmt: skip

    @functools.wraps(command)
    def gathered(*, max_skipped: int | None, max_unknown: int | None, **others: Any) -> Any:
        return command(bounds=Bounds(skipped=max_skipped, unknown=max_unknown), **others)

    for option in reversed(options):
        gathered = option(gathered)
    return gathered


def show(runs: Sequence[Run], form: str, bounds: Bounds = UNBOUNDED) -> None:
    """Print the report on these runs."""
    from reports import as_json, junit, ktap, text

    if form == "text":
        text.show(runs, bounds=bounds)
    elif form == "json":
        click.echo(as_json.render(runs, bounds))
    else:
        render = junit.render if form == "junit" else ktap.render
        click.echo(render(runs, findings.load(), bounds))
