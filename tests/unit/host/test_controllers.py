# SPDX-License-Identifier: Apache-2.0
"""Controllers that a fault wants, in a hierarchy of plain files."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chaos.cgroup.group import Cgroup
from chaos.runner.cgroups import CgroupTree
from chaos.runner.fault_context import RunContext


@dataclass
class Warden:
    told: list[tuple[str, str, str]] = field(default_factory=list)

    def remember(self, path: Path, text: str) -> None:
        self.told.append(("remember", path.parent.name, text))

    def forget(self, path: Path, text: str) -> None:
        self.told.append(("forget", path.parent.name, text))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's cgroup in a hierarchy whose root alone gives the controller to its children."""
    run = tmp_path / "root" / "ours" / "run"
    run.mkdir(parents=True)
    for group, given in ((run.parents[1], "cpu misc\n"), (run.parent, "misc\n"), (run, "misc\n")):
        (group / "cgroup.controllers").write_text("cpu misc\n")
        (group / "cgroup.subtree_control").write_text(given)
    (run / "source").mkdir()
    return run


def context_of(run: Path, warden: Warden, stack: ExitStack) -> RunContext:
    cgroups = CgroupTree(Cgroup.at(run), None, None)  # type: ignore[arg-type]
    cgroups._below["source"] = Cgroup.at(run / "source")
    return RunContext(None, None, cgroups, warden, None, None, None, None, stack)  # type: ignore[arg-type]


def control(group: Path) -> str:
    return (group / "cgroup.subtree_control").read_text()


def test_what_is_enabled_is_remembered_first_and_given_back_when_the_run_is_over(run: Path) -> None:
    warden = Warden()
    with ExitStack() as stack:
        context_of(run, warden, stack).enable_controller("source", "cpu")
        assert warden.told == [("remember", "ours", "-cpu"), ("remember", "run", "-cpu")]
        assert (control(run.parent), control(run)) == ("+cpu", "+cpu")
        assert control(run.parents[1]) == "cpu misc\n", "it was enabled there"
    assert warden.told[2:] == [("forget", "run", "-cpu"), ("forget", "ours", "-cpu")]
    assert (control(run.parent), control(run)) == ("-cpu", "-cpu")


def test_a_cgroup_that_is_gone_by_then_needs_nothing_back(run: Path) -> None:
    warden = Warden()
    with ExitStack() as stack:
        context_of(run, warden, stack).enable_controller("source", "cpu")
        shutil.rmtree(run)
    assert warden.told[2:] == [("forget", "run", "-cpu"), ("forget", "ours", "-cpu")]
    assert control(run.parent) == "-cpu"
