# SPDX-License-Identifier: Apache-2.0
"""Every topology of a move with every kind of guest: across cgroups, in one, in a chain, there and refused back, with a
mirror, and of a mirror; SEV and SEV-ES, and both with a type where the kernel knows types."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import experiments
from chaos.errors import ExitCode
from chaos.experiment.steps import AskStep, CountStep, Step
from chaos.history.records import Asked, Counted, Done, History, Invoke, Note
from chaos.lab.kernel.find import night_kernels
from tests.lab.conftest import Once, Sevchaos
from tests.lab.told import Told, carried_out, charges
from tests.unit.core.doctored import RESTS_ON

pytestmark = pytest.mark.lab

EIO = 5
WITHOUT_TYPES, OLD, NEW = night_kernels()
TOPOLOGIES = (
    "move-across-cgroups", "move-in-one-cgroup", "move-chain", "move-back-refused", "move-with-mirror", "move-a-mirror",
)  # fmt: skip
GUESTS = [(OLD, ""), (OLD, "-es"), (NEW, ""), (NEW, "-es"), (NEW, "-typed"), (NEW, "-es-typed")]
AT_NIGHT = [(WITHOUT_TYPES, ""), (WITHOUT_TYPES, "-es"), (OLD, "-typed"), (OLD, "-es-typed")]
EVERY = [*GUESTS, *(pytest.param(*guest, marks=pytest.mark.nightly) for guest in AT_NIGHT)]

Carry = Callable[[str, str], Told]


def by_steps(read: History, name: str, kind: type[Counted | Asked], step: type[Step]) -> list[Any]:
    """Records of this kind that were made for steps of that, and not for a question of the runner's own."""
    script = experiments.find(name).script
    found = [r for r in read.records if isinstance(r, kind) and r.step < len(script)]
    return [record for record in found if isinstance(script[record.step], step)]


@pytest.fixture
def carry(once: Once[Told], sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Carry:
    """All topologies with one kind of guest."""

    def told(kernel: str, guest: str) -> Told:
        names = [f"{topology}{guest}" for topology in TOPOLOGIES]
        return once((kernel, guest), lambda: carried_out(sevchaos, tmp_path_factory.mktemp("runs"), kernel, *names))

    return told


@pytest.fixture
def told(carry: Carry) -> Told:
    return carry(NEW, "")


def signature(told: Told, name: str, promise: str) -> str:
    return str(next(v["signature"] for v in told.runs[name]["verdicts"] if v["promise"] == promise))


@pytest.mark.parametrize(("kernel", "guest"), EVERY)
def test_every_topology_comes_out_as_the_table_says(carry: Carry, kernel: str, guest: str) -> None:
    """`as_expected` has compared them."""
    assert sorted(carry(kernel, guest).runs) == sorted(f"{topology}{guest}" for topology in TOPOLOGIES)


@pytest.mark.parametrize(("kernel", "guest"), EVERY)
def test_each_verdict_points_at_the_records_behind_it(carry: Carry, kernel: str, guest: str) -> None:
    told = carry(kernel, guest)
    for name, run in told.runs.items():
        records = told.history(name).records
        for verdict in run["verdicts"]:
            pointed = [records[number] for number in verdict["records"]]
            if verdict["listed"] and verdict["outcome"] in ("kept", "broken") and verdict["promise"] != "P12":
                kinds = RESTS_ON[verdict["promise"]]
                assert any(isinstance(record, kinds) for record in pointed), (name, verdict)


@pytest.mark.nightly
@pytest.mark.parametrize("kernel", [WITHOUT_TYPES])
def test_a_kernel_without_types_skips_and_never_holds(kernel: str, sevchaos: Sevchaos, tmp_path: Path) -> None:
    name = "move-across-cgroups-typed"
    done = sevchaos("run", name, "--kernel", kernel, "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.SKIPPED
    told = Told(done.stdout)
    assert set(told.outcomes(name).values()) == {"skipped"}
    records = told.history(name).records
    assert not any(isinstance(record, Invoke) for record in records)
    assert "KVM_CAP_VM_TYPES" in next(r.text for r in records if isinstance(r, Note) and r.topic == "skipped")


def test_a_typed_vm_cannot_be_entered_after_a_move(carry: Carry) -> None:
    """Finding 0003."""
    told = carry(NEW, "-typed")
    name = "move-across-cgroups-typed"
    assert signature(told, name, "P5").endswith("stopped-after-move-of-typed:KVM_RUN-EINVAL")
    before, after = (r for r in told.history(name).records if isinstance(r, Counted))
    assert (before.ended, after.ended) == ("", "KVM_RUN: EINVAL")


def test_a_moved_mirror_is_charged_and_stays_charged(told: Told) -> None:
    """Finding 0004."""
    read = told.history("move-a-mirror")
    paid = {label: charges(read, label) for label in ("mirrored", "moved", "end")}
    assert paid["mirrored"] == {".": {"sev": 1}, "owner": {"sev": 1}, "source": {}, "destination": {}}
    assert paid["moved"]["destination"] == {"sev": 1} and paid["end"]["destination"] == {"sev": 1}


def test_a_mirror_follows_its_owner_and_both_run(told: Told) -> None:
    name = "move-with-mirror"
    read = told.history(name)
    assert charges(read, "owner-closed")["destination"] == {"sev": 1}  # the mirror keeps it alive
    counted = [(r.vm, r.stale, r.ended) for r in by_steps(read, name, Counted, CountStep)]
    assert counted == [(vm, 0, "") for vm in ("old", "mirror", "new", "mirror")]
    assert [told.outcomes(name)[promise] for promise in ("P1", "P3", "P4", "P9")] == ["kept"] * 4


def test_every_vcpu_goes_on_where_it_stopped(sevchaos: Sevchaos, tmp_path: Path) -> None:
    told = carried_out(sevchaos, tmp_path, NEW, "move-four-vcpus")
    read = told.history("move-four-vcpus")
    before, after = (r for r in read.records if isinstance(r, Counted))
    assert len(before.each) == len(after.each) == 4
    assert all(now >= was + 100 for was, now in zip(before.each, after.each, strict=True))
    assert (before.stale, after.stale) == (0, 0)
    op = next(r.op for r in read.records if isinstance(r, Invoke) and r.f == "set_state")
    given = next(r.value for r in read.records if isinstance(r, Done) and r.op == op)
    assert given["vcpus"] == 4
    assert given["differs"] == []


def test_the_way_back_is_refused_and_the_guest_goes_on(told: Told) -> None:
    name = "move-back-refused"
    read = told.history(name)
    moves = [r.op for r in read.records if isinstance(r, Invoke) and r.f == "move"]
    assert [r.errno for r in read.records if isinstance(r, Done) and r.op in moves] == [0, EIO, 0]
    counted = [r.ticks for r in by_steps(read, name, Counted, CountStep)]
    assert all(later >= earlier + 100 for earlier, later in itertools.pairwise(counted))
    dead, live, dead_too = by_steps(read, name, Asked, AskStep)
    assert (dead.vm, live.vm, dead_too.vm) == ("old", "new", "new")
    last = [r for r in read.records if isinstance(r, Asked)][-2:]
    assert {asked.vm for asked in last} == {"old", "new"}
    assert {answer.errno for asked in (dead, dead_too, *last) for answer in asked.answers} == {EIO}
    assert EIO not in {answer.errno for answer in live.answers}
    assert told.outcomes(name)["P6"] == "kept"


def test_a_mirror_of_sev_es_pays_nothing_until_it_is_moved(carry: Carry) -> None:
    """Finding 0004, under the other key: nothing is charged for SEV, and then the moved mirror is."""
    read = carry(OLD, "-es").history("move-a-mirror-es")
    paid = {label: charges(read, label) for label in ("mirrored", "moved", "end")}
    assert paid["mirrored"] == {".": {"sev_es": 1}, "owner": {"sev_es": 1}, "destination": {}}
    assert paid["moved"] == {".": {"sev": 1, "sev_es": 1}, "owner": {"sev_es": 1}, "destination": {"sev": 1}}
    assert paid["end"]["destination"] == {"sev": 1}
