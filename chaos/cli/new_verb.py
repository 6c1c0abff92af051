# SPDX-License-Identifier: Apache-2.0
"""`sevchaos new`: an experiment to start from."""

from __future__ import annotations

import re
from pathlib import Path

import click

import experiments
from chaos.errors import UsageError


@click.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(["sev", "sev-es"]), default="sev", show_default=True, help="Of the guest.")
@click.option("--fault", default="kill", show_default=True, help="The fault that its script applies.")
def new_(*, name: str, kind: str, fault: str) -> None:
    """Write NAME.yaml into the current directory: a commented experiment that runs as it is."""
    from chaos.fault import find

    if not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", name):
        raise UsageError(f"{name!r} is no name", remedy="give lower case letters, digits and dashes, a letter first")
    find(fault, {})
    path = Path(f"{name}.yaml")
    try:
        with path.open("x") as file:
            file.write(experiments.scaffold(name, kind=kind, fault=fault))
    except FileExistsError:
        raise UsageError(f"{path} is there already", remedy="choose another name") from None
    click.echo(f"{path} is written; change it, then: sevchaos validate {path}; sevchaos run ./{path}")
