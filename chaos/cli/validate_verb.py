# SPDX-License-Identifier: Apache-2.0
"""`sevchaos validate`: is this an experiment?"""

from __future__ import annotations

from pathlib import Path

import click

from chaos.cli.common import explain
from chaos.errors import ExitCode, UsageError
from chaos.experiment import load


@click.command("validate")
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path))
def validate_(*, files: tuple[Path, ...]) -> int:
    """Check experiment files. Of each that is none, say which key is wrong and what is allowed. Nothing is started."""
    refused = 0
    for file in files:
        try:
            loaded = load.load(file)
        except UsageError as error:
            refused += 1
            explain(error)
        else:
            click.echo(f"{file}: {loaded.name}, {len(loaded.script)} steps, {', '.join(loaded.promises)}")
    return ExitCode.USAGE if refused else ExitCode.KEPT
