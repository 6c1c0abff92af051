# SPDX-License-Identifier: Apache-2.0
"""`sevchaos list`: what there is to run."""

from __future__ import annotations

import textwrap

import click

import experiments
from chaos import experiment


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(*, as_json: bool) -> None:
    """Name the experiments of the catalogue, and say why each is worth a run."""
    found = {name: (path, experiment.load(path)) for name, path in experiments.catalogue().items()}
    if as_json:
        import msgspec

        rows = [
            {"name": name, "kind": path.parent.name, "promises": one.promises, "why": one.why}
            for name, (path, one) in found.items()
        ]
        click.echo(msgspec.json.encode(rows))
        return
    for name, (path, one) in found.items():
        click.echo(f"{click.style(name, bold=True)}  ({path.parent.name}; {', '.join(one.promises)})")
        click.echo(textwrap.fill(one.why, width=96, initial_indent="    ", subsequent_indent="    "))
