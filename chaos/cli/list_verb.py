# SPDX-License-Identifier: Apache-2.0
"""`sevchaos list`: what there is to run."""

from __future__ import annotations

import textwrap

import click

import experiments
from chaos.experiment import load


@click.command("list")
@click.argument("what", type=click.Choice(["experiments", "faults"]), default="experiments")
@click.option("--select", "wanted", metavar="EXPR", help="Only those, see `sevchaos run --help`.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(*, what: str, wanted: str | None, as_json: bool) -> None:
    """Name the experiments of the catalogue, with the promises that each puts to the test, and say why it is worth a
    run; or name the faults there are. A run judges every promise; those must be kept."""
    if what == "faults":
        _faults(as_json=as_json)
        return
    found = {name: (path, load.load(path)) for name, path in experiments.select(wanted).items()}
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


def _faults(*, as_json: bool) -> None:
    from chaos import fault
    from chaos.cli.explain_verb import describe

    told = [describe(name) for name in fault.names()]
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(told))
        return
    for one in told:
        click.echo(f"{click.style(one['name'], bold=True)}  (strikes {one['target']}; needs {one['needs']})")
        first = " ".join(one["does"].split("\n\n")[0].split())
        click.echo(textwrap.fill(first, width=96, initial_indent="    ", subsequent_indent="    "))
