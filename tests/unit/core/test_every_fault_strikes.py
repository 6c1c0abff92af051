# SPDX-License-Identifier: Apache-2.0
"""Every fault of every family is struck: by an experiment that CI carries out, or else one that the night does.

The faults are those of the entry points, and what applies them is read from the catalogue. Whether a fault that is
applied also strikes is the judge's: without evidence a run is void, and no table of outcomes expects a void run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Collection, Mapping

import experiments
import faults
from chaos import fault
from chaos.controller import outcomes
from chaos.experiment import load
from chaos.experiment.steps import FaultStep, walk
from chaos.judge.verdict import Outcome
from tests.lab import (
    test_conformance,
    test_deeper,
    test_experiments,
    test_faults,
    test_outcomes,
    test_storms,
    test_sweeps,
)

IN_CI = {
    *test_conformance.CONFORMANCE,
    *test_conformance.RACES,
    *(topology + guest for topology in test_deeper.TOPOLOGIES for _, guest in test_deeper.GUESTS),
    *test_experiments.FIRST,
    *test_faults.EXPERIMENTS.values(),
    *test_outcomes.STRIKING,
    *test_outcomes.IN_ONE_LAB,
    *test_storms.THROUGH_MOVE,
}
"""What tests/lab carries out and compares with the tables, by the tests' own lists."""


def applied() -> dict[str, set[str]]:
    """Fault → the experiments of the catalogue that apply it and are not skipped as a whole on any kernel. The tables
    are of stock kernels: what they skip and an instrumented one carries out counts."""
    skipped = {
        name
        for table in outcomes.load()
        for name, expectation in table.experiments.items()
        if any({entry.outcome for entry in way.values()} == {Outcome.SKIPPED} for way in expectation.ways)
    }
    skipped.discard(test_sweeps.ONE)
    found: dict[str, set[str]] = {}
    for name, path in experiments.catalogue().items():
        if name not in skipped:
            for _, step in walk(load.load(path).script):
                if isinstance(step, FaultStep):
                    found.setdefault(step.fault, set()).add(name)
    return found


def families() -> dict[str, str]:
    """Fault → the module that it is defined in."""
    points = importlib.metadata.entry_points(group=fault.GROUP)
    return {point.name: point.module for point in points if point.module.split(".")[0] == "faults"}


def table(by: Mapping[str, Collection[str]], ci: Collection[str]) -> str:
    rows = [f"{'family':<18} {'fault':<16} CI | night"]
    for name, family in sorted(families().items(), key=lambda item: item[::-1]):
        striking = sorted(by.get(name, ()))
        in_ci = ", ".join(n for n in striking if n in ci) or "-"
        at_night = ", ".join(n for n in striking if n not in ci) or "-"
        rows.append(f"{family:<18} {name:<16} {in_ci} | {at_night}")
    return "\n".join(rows)


def not_struck(by: Mapping[str, Collection[str]], among: Collection[str]) -> set[str]:
    return {name for name in families() if not set(by.get(name, ())) & set(among)}


def test_every_fault_is_struck() -> None:
    """By a night; but fail-nth only where somebody has built a kernel for it."""
    by = applied()
    assert not_struck(by, experiments.catalogue()) == set(), f"no experiment applies these:\n{table(by, IN_CI)}"


def test_every_fault_is_struck_in_ci_but_the_stated_slow_ones() -> None:
    by = applied()
    assert not_struck(by, IN_CI) == set(test_outcomes.NOT_IN_CI), f"CI carries out:\n{table(by, IN_CI)}"


def test_a_fault_that_nothing_applies_is_seen() -> None:
    by = {name: striking for name, striking in applied().items() if name != "oom"}
    assert not_struck(by, experiments.catalogue()) == {"oom"}
    assert any(row.split() == ["faults.vmm", "oom", "-", "|", "-"] for row in table(by, IN_CI).splitlines())


def test_every_family_registers_its_faults() -> None:
    """A fault in faults/ without an entry point would be in no table."""
    modules = [importlib.import_module(found.name) for found in pkgutil.iter_modules(faults.__path__, "faults.")]
    defined = {
        f"{module.__name__}:{name}"
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
        if issubclass(kind, fault.Fault) and not inspect.isabstract(kind)
    }
    points = importlib.metadata.entry_points(group=fault.GROUP)
    assert defined == {point.value for point in points if point.module.split(".")[0] == "faults"}


def test_what_ci_carries_out_is_of_the_catalogue() -> None:
    assert set(experiments.catalogue()) >= IN_CI
