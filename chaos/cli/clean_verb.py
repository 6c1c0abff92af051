# SPDX-License-Identifier: Apache-2.0
"""`sevchaos clean`: what a dead run left on this host."""

from __future__ import annotations

import click

from chaos.errors import CleanupFailed, HostLacks


@click.command("clean")
def clean_() -> None:
    """Remove the cgroups of runs with --host local whose runner is dead, end what lives in them, and end its tracing.

    Runs that are alive are left alone. Labs leave nothing; what they keep on purpose goes by `sevchaos lab clean`.
    """
    from chaos.linux import tracefs
    from chaos.safety import claim
    from chaos.safety.survey import Paths, hierarchy

    lacking = ""
    try:
        removed = tracefs.clean()
        try:
            removed += claim.clean(hierarchy(Paths()))
        except HostLacks as lacks:
            lacking = lacks.message
    except OSError as error:
        raise CleanupFailed(f"{error.filename}: {error.strerror}", remedy="become root, and try again") from error
    for path in removed:
        click.echo(f"removed {path}")
    if not removed:
        click.echo(f"nothing can have been left here: {lacking}" if lacking else "nothing was left over")
