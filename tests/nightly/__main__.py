# SPDX-License-Identifier: Apache-2.0
"""See the package's docstring. Exits 0 if all is as the tables have it, 1 if not, 64 if it cannot be done as asked."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chaos.cli.common import explain
from chaos.controller import outcomes
from chaos.errors import SevchaosError
from chaos.lab.kernel.find import night_kernels
from tests.nightly import catalogue, mutation, parts

_reports = click.argument(
    "reports", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


@click.group()
def main() -> None:
    """Tables of outcomes, and what is compared with them at night."""


@main.command("run")
@click.option("--kernel", "kernels", multiple=True, metavar="K", help="Repeatable. [default: all three]")
@click.option("--part", "wanted", multiple=True, metavar="NAME", help="Only this one. Repeatable. [default: all]")
@click.option("--again", is_flag=True, help="Repeat what is done.")
def run_(kernels: tuple[str, ...], wanted: tuple[str, ...], again: bool) -> None:
    """Carry the parts out that are not done yet."""
    known = parts.parts(kernels or night_kernels())
    unknown = set(wanted) - {part.name for part in known}
    if unknown:
        raise click.UsageError(f"no part {', '.join(sorted(unknown))}; there is {', '.join(p.name for p in known)}")
    chosen = [part for part in known if part.name in wanted or not wanted]
    passed = {part.name: _passed(part, again) for part in chosen}
    for name, well in passed.items():
        click.echo(f"{'passed' if well else 'FAILED'}  {name}")
    sys.exit(0 if all(passed.values()) else 1)


def _passed(part: parts.NightlyPart, again: bool) -> bool:
    """One that cannot be carried out has not passed, and the others are carried out all the same."""
    try:
        return parts.run(part, click.echo, again=again)
    except SevchaosError as error:
        explain(error)
        return False


@main.command("outcomes")
@click.argument("kernels", nargs=-1, metavar="KERNEL…")
def outcomes_(kernels: tuple[str, ...]) -> None:
    """Carry the catalogue out and write the table of each kernel."""
    for kernel in kernels or night_kernels():
        click.echo(f"written: {catalogue.make_table(kernel, parts.STATE / 'outcomes')}")


@main.command("write")
@click.option("--part", is_flag=True, help="Of a part of the catalogue: what a table has of the rest stays.")
@_reports
def write_(reports: tuple[Path, ...], part: bool) -> None:
    """Write the tables from reports of `sevchaos run --json` or `sevchaos check --json`, of the whole catalogue."""
    for path in catalogue.write_tables(catalogue.read_reports(reports), whole=not part):
        click.echo(f"written: {path}")


@main.command("compare")
@click.option("--whole", is_flag=True, help="Each report is of the whole catalogue: what it lacks counts.")
@_reports
def compare_(reports: tuple[Path, ...], whole: bool) -> None:
    """Compare reports with the tables."""
    well = [parts.told(catalogue.against_tables(path.read_bytes(), whole=whole), click.echo) for path in reports]
    sys.exit(0 if all(well) else 1)


@main.command("mutation")
@click.option("--module", "modules", multiple=True, type=click.Path(path_type=Path), help="Repeatable. [default: all]")
@click.option("--sample", default=mutation.SAMPLE, show_default=True, metavar="N", help="Of a module; 0: all.")
@click.option("--seed", default=0, show_default=True, metavar="S", help="Which N.")
@click.option("--again", is_flag=True, help="Repeat what is done.")
def mutation_(modules: tuple[Path, ...], sample: int, seed: int, again: bool) -> None:
    """Try mutants of the judge: which of them no test kills."""
    chosen = modules or mutation.modules()
    sys.exit(0 if mutation.carry_out(chosen, click.echo, sample=sample, seed=seed, again=again) else 1)


if __name__ == "__main__":
    try:
        outcomes.load()
        main()
    except SevchaosError as error:
        explain(error)
        sys.exit(int(error.exit_code))
