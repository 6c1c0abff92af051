# SPDX-License-Identifier: Apache-2.0
"""What the runner asks by itself: an experiment of nothing but what is done is answered on every promise it puts to the
test, and nothing is asked while that would disturb."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import experiments
from chaos.history.records import Asked, Done, Fault, Held, History, Invoke, Observation, Released
from tests.lab.conftest import Once, Sevchaos
from tests.lab.told import Told

pytestmark = pytest.mark.lab

TWO = """
why: As somebody writes it who does not know what the checkers want to know.
vmms: {source: {cgroup: source}, destination: {cgroup: destination}}
vms: {old: {vmm: source, kind: sev}, new: {vmm: destination, kind: plain}}
script:
  - {do: launch, vm: old}
  - {do: launch, vm: new}
  - {do: run, vm: old}
"""
SCRIPTS = {
    "nothing-but-a-migration": "  - {do: migrate, source: old, destination: new}\n",
    "signals-before-resume": """
  - do: migrate
    source: old
    destination: new
    before: {resume: [{do: fault, fault: signal-storm, target: destination}]}
  - {do: count, vm: new, ticks: 100}
""",
    "paused-and-tried-twice": """
  - {do: pause, vm: old}
  - do: migrate
    source: old
    destination: new
    supervise: retry
    before: {move: [{do: fault, fault: kill, target: destination}]}
  - {do: run, vm: new}
""",
    "paused-and-moved": """
  - {do: pause, vm: old}
  - {do: migrate, source: old, destination: new}
""",
    "held": """
  - {do: arm, hold: there, kernel: {function: misc_cg_try_charge, vmm: destination}}
  - {do: move, source: old, destination: new, wait: false}
  - {do: hold, vm: new, at: there}
  - {do: release, hold: there}
  - {do: join, vm: new}
""",
}
PUT_TO_THE_TEST = {"P1", "P3", "P4", "P7", "P8", "P9", "P12"}
PROMISES = f"promises: [{', '.join(sorted({*PUT_TO_THE_TEST, 'P5'}))}]\n"
GUEST_STATUS_IS_LOST = "finding 0001"  # which is all that P5 has against a move between processes


@pytest.fixture
def told(once: Once[Told], kernel: str, sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return once(kernel, lambda: written(sevchaos, tmp_path_factory.mktemp("written"), kernel))


def written(sevchaos: Sevchaos, where: Path, kernel: str) -> Told:
    """All of them, and the scaffold; `own` is the first with the questions turned off."""
    texts = {name: f"name: {name}\n{PROMISES}{TWO}{script}" for name, script in SCRIPTS.items()}
    first = texts["nothing-but-a-migration"]
    texts["own"] = f"{first.replace('name: nothing-but-a-migration', 'name: own')}questions: own\n"
    texts["scaffold"] = experiments.scaffold("scaffold", kind="sev", fault="kill")
    files = [where / f"{name}.yaml" for name in texts]
    for path, text in zip(files, texts.values(), strict=True):
        path.write_text(text)
    done = sevchaos("run", *map(str, files), "--kernel", kernel, "--json", "--accept-known", "--runs", str(where))
    return Told(done.stdout)


def labels(read: History) -> list[str]:
    return [record.label for record in read.records if isinstance(record, Observation)]


@pytest.mark.parametrize("name", [*SCRIPTS, "scaffold"])
def test_a_script_that_asks_nothing_is_answered_on_every_promise(told: Told, name: str) -> None:
    outcomes = told.outcomes(name)
    listed = set(outcomes) & PUT_TO_THE_TEST
    assert {promise: outcomes[promise] for promise in listed} == dict.fromkeys(listed, "kept")
    assert "P1" in listed and "P3" in listed
    if name != "held":  # there the guest is left behind without its registers
        assert told.accepted(name)["P5"].startswith(GUEST_STATUS_IS_LOST)


def test_with_questions_of_its_own_alone_it_is_not(told: Told) -> None:
    outcomes = told.outcomes("own")
    assert {p for p in PUT_TO_THE_TEST if outcomes[p] != "kept"} >= {"P1", "P4"}
    assert labels(told.history("own")) == ["start", "end"]


def test_nothing_is_asked_while_an_operation_is_held_or_a_hold_is_armed(told: Told) -> None:
    """From the arming, before which the questions of the move are asked, to the release."""
    read = told.history("held")
    begun = next(record.seq for record in read.records if isinstance(record, Invoke) and record.f == "move")
    released = next(record.seq for record in read.records if isinstance(record, Released))
    assert any(isinstance(record, Held) and record.reached for record in read.records)
    between = read.records[begun - 4 : released]
    assert not [r for r in between if isinstance(r, Observation | Asked)]
    assert not [r for r in between if isinstance(r, Invoke) and r.f == "guest_status"]
    assert labels(read)[:3] == ["start", "before-4", "after-4"]


def test_a_fault_that_answers_in_the_kernels_stead_is_over_before_anything_is_asked(told: Told) -> None:
    read = told.history("signals-before-resume")
    applied, undone = (
        next(r.seq for r in read.records if isinstance(r, Fault) and r.event == event) for event in ("apply", "undo")
    )
    assert not [r for r in read.records[applied:undone] if isinstance(r, Observation | Asked)]
    assert [r for r in read.records[undone:] if isinstance(r, Asked)]


def test_what_a_step_has_asked_is_not_asked_twice(sevchaos: Sevchaos, kernel: str, tmp_path: Path) -> None:
    """`move-across-cgroups` observes by steps right before and after the move."""
    name = "move-across-cgroups"
    done = sevchaos("run", name, "--kernel", kernel, "--json", "--accept-known", "--runs", str(tmp_path))
    assert done.returncode == 0
    read = Told(done.stdout).history(name)
    seen = [record for record in read.records if isinstance(record, Observation)]
    questions = {record.op for record in read.records if isinstance(record, Invoke) and record.f == "guest_status"}
    changes = [r.seq for r in read.records if isinstance(r, Done) and r.op not in questions]
    for earlier, later in itertools.pairwise(seen):
        assert any(earlier.seq < seq < later.seq for seq in changes), (earlier.label, later.label)
