# SPDX-License-Identifier: Apache-2.0
"""Typed VMs, mirrors, chains, ways back and several vCPUs, each once on the kernel where it matters."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from chaos.errors import ExitCode
from chaos.history import Asked, Counted, Done, Invoke, Note
from tests.lab.conftest import Sevchaos
from tests.lab.test_experiments import Told, charges

pytestmark = pytest.mark.lab

EIO = 5
ON_612 = ("move-across-cgroups-typed", "move-a-mirror", "move-with-mirror", "move-four-vcpus", "move-back-refused")
ON_61 = ("move-chain-es", "move-with-mirror-es")


def carried_out(sevchaos: Sevchaos, where: Path, kernel: str, *names: str) -> Told:
    options = ("--kernel", kernel, "--seed", "7", "--json", "--accept-known", "--runs", str(where))
    done = sevchaos("run", *names, *options)
    assert done.returncode == ExitCode.HELD, done.stderr.decode()
    return Told(done.stdout)


@pytest.fixture(scope="module")
def kept() -> dict[str, Told]:
    return {}


@pytest.fixture
def told(kept: dict[str, Told], sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Told:
    if not kept:
        kept["6.12"] = carried_out(sevchaos, tmp_path_factory.mktemp("runs"), "debian:6.12", *ON_612)
    return kept["6.12"]


def signature(told: Told, name: str, promise: str) -> str:
    return str(next(v["signature"] for v in told.runs[name]["verdicts"] if v["promise"] == promise))


def test_a_kernel_without_types_skips_and_never_holds(sevchaos: Sevchaos, tmp_path: Path) -> None:
    name = "move-across-cgroups-typed"
    done = sevchaos("run", name, "--kernel", "debian:6.1", "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.SKIPPED
    told = Told(done.stdout)
    assert set(told.outcomes(name).values()) == {"skipped"}
    records = told.history(name).records
    assert not any(isinstance(record, Invoke) for record in records)
    assert "KVM_CAP_VM_TYPES" in next(r.text for r in records if isinstance(r, Note) and r.topic == "skipped")


def test_a_typed_vm_cannot_be_entered_after_a_move(told: Told) -> None:
    """Finding 0003."""
    name = "move-across-cgroups-typed"
    assert signature(told, name, "P5").endswith("stopped-after-move:KVM_RUN-EINVAL")
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
    counted = [(r.vm, r.stale, r.ended) for r in read.records if isinstance(r, Counted)]
    assert counted == [(vm, 0, "") for vm in ("old", "mirror", "new", "mirror")]
    assert [told.outcomes(name)[promise] for promise in ("P1", "P3", "P4", "P9")] == ["held"] * 4


def test_every_vcpu_goes_on_where_it_stopped(told: Told) -> None:
    read = told.history("move-four-vcpus")
    before, after = (r for r in read.records if isinstance(r, Counted))
    assert len(before.each) == len(after.each) == 4
    assert all(now >= was + 70 for was, now in zip(before.each, after.each, strict=True))
    assert (before.stale, after.stale) == (0, 0)
    op = next(r.op for r in read.records if isinstance(r, Invoke) and r.f == "set_state")
    given = next(r.value for r in read.records if isinstance(r, Done) and r.op == op)
    assert given["vcpus"] == 4
    assert given["differs"] == []


def test_the_way_back_is_refused_and_the_guest_goes_on(told: Told) -> None:
    name = "move-back-refused"
    read = told.history(name)
    moves = [r.op for r in read.records if isinstance(r, Invoke) and r.f == "move"]
    assert [r.errno for r in read.records if isinstance(r, Done) and r.op in moves] == [0, EIO]
    counted = [r.ticks for r in read.records if isinstance(r, Counted)]
    assert all(later >= earlier + 100 for earlier, later in itertools.pairwise(counted))
    dead, live = (r for r in read.records if isinstance(r, Asked))
    assert {answer.errno for answer in dead.answers} == {EIO}
    assert EIO not in {answer.errno for answer in live.answers}
    assert told.outcomes(name)["P6"] == "held"


def test_on_the_old_kernel_chains_and_mirrors_of_sev_es_are_what_the_findings_say(
    sevchaos: Sevchaos, tmp_path: Path
) -> None:
    told = carried_out(sevchaos, tmp_path, "debian:6.1", *ON_61)
    chain = told.outcomes("move-chain-es")
    assert {promise: chain[promise] for promise in ("P3", "P4")} == {"P3": "held", "P4": "held"}
    read = told.history("move-with-mirror-es")
    assert [charges(read, label)["tenant"] for label in ("mirrored", "moved", "owner-closed")] == [{"sev_es": 1}] * 3
