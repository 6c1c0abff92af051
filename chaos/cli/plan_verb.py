# SPDX-License-Identifier: Apache-2.0
"""`sevchaos plan`: what a run would do, without doing it."""

from __future__ import annotations

import textwrap

import click

import experiments
from chaos.experiment.load import encode
from chaos.experiment.model import Experiment


@click.command("plan")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--json", "as_json", is_flag=True, help="For machines: the experiment as it would be carried out.")
def plan_(*, names: tuple[str, ...], as_json: bool) -> None:
    """Print the schedule of experiments, step by step. Nothing is started."""
    for experiment in [experiments.find(name) for name in names]:
        show(experiment, as_json=as_json)


def show(experiment: Experiment, *, as_json: bool) -> None:
    """On stdout."""
    from reports import sentences

    if as_json:
        click.echo(encode(experiment))
        return
    click.echo(f"{click.style(experiment.name, bold=True)}  puts to the test: {', '.join(experiment.promises)}")
    click.echo("    Those must be kept; any other promise counts if it is broken.")
    click.echo(textwrap.fill(experiment.why, width=96, initial_indent="    ", subsequent_indent="    "))
    for name, vmm in experiment.vmms.items():
        vms = ", ".join(f"{vm} ({spec.kind.value})" for vm, spec in experiment.vms.items() if spec.vmm == name)
        click.echo(f"  VMM {name} in cgroup {vmm.cgroup}: {vms or 'no VM'}")
    if experiment.questions == "automatic":
        click.echo("  Around each move, and at the end, what no step asks is asked too (docs/experiments.md).")
    for number in range(len(experiment.script)):
        text = sentences.step(experiment, number)
        click.echo(textwrap.fill(text, width=96, initial_indent=f"  {number:>3} ", subsequent_indent=" " * 6))
