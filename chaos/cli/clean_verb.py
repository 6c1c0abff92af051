# SPDX-License-Identifier: Apache-2.0
"""`sevchaos clean`: what a dead run left on this host."""

from __future__ import annotations

import click

from chaos.errors import CleanupFailed, HostLacks


@click.command("clean")
def clean_() -> None:
    """Remove the cgroups of runs with --host local whose runner is dead, and end what lives in them.

    Runs that are alive are left alone. Labs leave nothing; what they keep on purpose goes by `sevchaos lab clean`.
    """
    from chaos import cleanup
    from chaos.survey import Paths, hierarchy

    try:
        root = hierarchy(Paths())
    except HostLacks as lacks:
        click.echo(f"nothing can have been left here: {lacks.message}")
        return
    try:
        removed = cleanup.clean(root)
    except OSError as error:
        raise CleanupFailed(f"{error.filename}: {error.strerror}", remedy="become root, and try again") from error
    for path in removed:
        click.echo(f"removed {path}")
    if not removed:
        click.echo("nothing was left over")
