# SPDX-License-Identifier: Apache-2.0
"""The catalogue carried out by the command itself, as a user would, and its report against a table of outcomes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path

import experiments
from chaos.controller import outcomes
from chaos.controller.outcomes import OutcomeDifference, RunOutcome
from chaos.errors import UsageError
from chaos.linux.version import order

SEED = 7
"""Of every run at night: what chance of ours decides (which packets netem drops) comes out the same each time."""
TABLES = Path(experiments.__file__).parent / "outcomes"
CHANCE_RUNS = 20
"""Of an experiment that is left to chance, when a table is made: a way that one run in five takes is met in 99 % of
such tables, and one that is met later is added to those that the table has."""


def carry_out(kernel: str, names: Sequence[str], runs: Path, *, repeat: int = 1) -> bytes:
    """The report on these experiments, `repeat` runs of each. Raises `UsageError` if there is none."""
    options = ("--kernel", kernel, "--seed", str(SEED), "--repeat", str(repeat), "--runs", str(runs))
    argv = [sys.executable, "-m", "chaos.cli", "run", *names, *options, "--accept-known", "--json"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=False)  # its progress is ours
    if not done.stdout:
        raise UsageError(f"sevchaos run exited {done.returncode} and gave no report", remedy="see what it said above")
    return done.stdout


def make_table(kernel: str, runs: Path) -> Path:
    """Carry the whole catalogue out on the kernel, what is left to chance many times, and write the table."""
    shutil.rmtree(runs, ignore_errors=True)
    first = outcomes.read_report(carry_out(kernel, list(experiments.catalogue()), runs))
    chancy = sorted(left_to_chance(first[0].kernel))
    more = outcomes.read_report(carry_out(kernel, chancy, runs, repeat=CHANCE_RUNS)) if chancy else ()
    (path,) = write_tables([*first, *more])
    return path


def left_to_chance(kernel: str) -> frozenset[str]:
    """The experiments of which the table that fits this kernel says so, or else the newest."""
    table = _before(kernel)
    found = table.experiments.items() if table is not None else ()
    return frozenset(name for name, expectation in found if expectation.chance) & set(experiments.catalogue())


def _before(kernel: str) -> outcomes.OutcomeTable | None:
    """The table that fits this kernel; of a series without one, the newest of all, for what it says of chance."""
    tables = outcomes.load()
    try:
        return outcomes.fitting(tables, kernel)
    except UsageError:
        return max(tables, key=lambda table: order(table.kernel), default=None)


def write_tables(runs: Iterable[RunOutcome], *, whole: bool = True) -> list[Path]:
    """The table of each kernel of these runs, written. Unless `whole`, what the table of that very kernel has of other
    experiments stays. Raises `UsageError` if an experiment of the catalogue has neither, or as `outcomes.make`."""
    paths = []
    for kernel, of_kernel in _by_kernel(runs):
        before = _before(kernel)
        kept = before.experiments if not whole and before is not None and before.kernel == kernel else {}
        made = outcomes.make(of_kernel, before=before)
        table = outcomes.OutcomeTable(kernel, {**kept, **made.experiments})
        missing = sorted(set(experiments.catalogue()) - set(table.experiments))
        if missing:
            raise UsageError(f"no run of {', '.join(missing)} on {kernel}", remedy="a table is of the whole catalogue")
        paths.append(TABLES / (kernel + outcomes.SUFFIX))
        paths[-1].write_text(outcomes.write(table))
    return paths


def against_tables(report: bytes, *, whole: bool) -> list[OutcomeDifference]:
    """What in this report is not as the table of its kernel has it.

    `whole` asks for the whole catalogue, and for everything that is in the table; else for nothing that the report does
    not have, and experiments that are not of the catalogue are left out.
    """
    catalogue = set(experiments.catalogue())
    tables = outcomes.load()
    found: list[OutcomeDifference] = []
    for kernel, runs in _by_kernel(outcomes.read_report(report)):
        table = outcomes.fitting(tables, kernel)
        of_catalogue = [run for run in runs if run.experiment in catalogue]
        names = catalogue | set(table.experiments) if whole else {run.experiment for run in of_catalogue}
        found += outcomes.compare(table, of_catalogue, names)
    return found


def _by_kernel(runs: Iterable[RunOutcome]) -> list[tuple[str, list[RunOutcome]]]:
    ordered = sorted(runs, key=lambda run: run.kernel)
    return [(kernel, list(of_kernel)) for kernel, of_kernel in groupby(ordered, key=lambda run: run.kernel)]


def read_reports(paths: Iterable[Path]) -> tuple[RunOutcome, ...]:
    return tuple(chain.from_iterable(outcomes.read_report(path.read_bytes()) for path in paths))
