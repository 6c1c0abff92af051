# SPDX-License-Identifier: Apache-2.0
"""What an experiment may say of its VMs, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.errors import UsageError
from chaos.experiment import model
from chaos.experiment.load import load as load_file
from chaos.experiment.model import Experiment
from chaos.experiment.steps import CommandStep, walk


def load(where: Path, vms: str, *steps: str) -> Experiment:
    path = where / "e.yaml"
    script = "\n".join(f"  - {{do: {step}}}" for step in steps or ("observe, label: nothing",))
    path.write_text(
        f"name: e\nwhy: a test\npromises: [P1]\nvmms: {{a: {{cgroup: a}}}}\nvms: {vms}\nscript:\n{script}\n"
    )
    return load_file(path)


def test_types_of_vms(tmp_path: Path) -> None:
    vms = "{x: {vmm: a, kind: sev, type: 2}, y: {vmm: a, kind: sev-es, type: 3}, z: {vmm: a, kind: plain, type: 3}}"
    assert load(tmp_path, vms).types == {2, 3}
    assert load(tmp_path, "{x: {vmm: a, kind: sev}}").types == {0}


@pytest.mark.parametrize(
    ("vm", "complaint"),
    [
        ("kind: sev, type: 3", r"vms\.x\.type: a sev guest cannot have type 3"),
        ("kind: sev-es, type: 2", r"vms\.x\.type: a sev-es guest cannot have type 2"),
        ("kind: sev, type: 4", r"vms\.x\.type: there is no such choice \(it is '4'\)"),
    ],
)
def test_a_type_must_be_one_of_its_kind(tmp_path: Path, vm: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load(tmp_path, f"{{x: {{vmm: a, {vm}}}}}")


def test_a_mirror_is_made_and_not_launched_and_needs_no_capacity_of_its_own(tmp_path: Path) -> None:
    vms = "{x: {vmm: a, kind: sev-es}, m: {vmm: a, kind: mirror}}"
    loaded = load(tmp_path, vms, "launch, vm: x, finish: false", "mirror, source: x, vm: m", "finish, vm: x")
    assert loaded.keys == {"sev_es"}
    with pytest.raises(UsageError, match=r"script\[0\]\.vm: m is a mirror, which is not launched"):
        load(tmp_path, vms, "launch, vm: m")
    with pytest.raises(UsageError, match=r"script\[0\]\.source: there is no VM 'y'"):
        load(tmp_path, vms, "mirror, source: y, vm: m")


MOVE = "{do: move, destination: x, source: y}"
MOVES = "{do: moves, destination: y, sources: [x]}"
MANY = "{do: moves, destination: x, sources: [x, y], rounds: 100000, threads: 8}"
BARE = "{x: {vmm: a, kind: sev}, y: {vmm: a, kind: plain, vcpus: 0, type: 3}}"


def test_what_inits_are_tried_needs_capacity_of_their_keys(tmp_path: Path) -> None:
    bare = "{y: {vmm: a, kind: plain, vcpus: 0}, z: {vmm: a, kind: plain, vcpus: 0, type: 3}}"
    assert load(tmp_path, bare).keys == set()
    assert load(tmp_path, bare, "init, vm: y").keys == {"sev"}
    assert load(tmp_path, bare, "init, vm: y, command: es-init").keys == {"sev_es"}
    assert load(tmp_path, bare, "init, vm: z").keys == {"sev_es"}


def test_vcpus_that_are_added_count(tmp_path: Path) -> None:
    loaded = load(tmp_path, BARE, "vcpu, vm: y, id: 3", "vcpu, vm: y, id: 9", "vcpu, vm: x, id: 1")
    assert (loaded.vcpus("x"), loaded.vcpus("y")) == (2, 2)


def test_a_list_of_commands() -> None:
    assert CommandStep(vm="v", ids="0-3,5,9-10").numbers == (0, 1, 2, 3, 5, 9, 10)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("move, destination: y", r"source: nothing to take"),
        ("move, destination: y, source: x, fd: pipe", r"source: a VM and a wrong descriptor"),
        ("mirror, vm: y, fd: nothing", r"script\[0\]\.fd: there is no such choice \(it is 'nothing'\)"),
        (
            "mirror, vm: y, source: x, flags: 4294967296",
            r"flags: expected a whole number <= 4294967295 \(it is '4294967296'\)",
        ),
        ("init, vm: y, features: 0x10000000000000000", r"features: 0x10000000000000000 has more than 64 bits"),
        ("init, vm: y, command: init3", r"command: there is no such choice \(it is 'init3'\)"),
        ("command, vm: x, ids: all", r"ids: expected text of another form"),
        ("command, vm: x, ids: 9-3", r"ids: 9-3 are 0 commands"),
        ("command, vm: x, ids: 0-9999", r"ids: 0-9999 are 10000 commands"),
        ("irqfd, vm: z, gsis: '48'", r"vm: there is no VM 'z'"),
        ("irqfd, vm: x, gsis: '31-33'", r"gsis: 31-33 are not all among 32 to 255"),
        ("irqfd, vm: x, gsis: 9-3", r"gsis: 9-3 are not all among 32 to 255"),
        ("signal, gsis: 256-257", r"gsis: 256-257 are not all among 32 to 255"),
        ("ioeventfd, vm: x, ports: 16-18", r"ports: 16-18 are not all among 32 to 95"),
        ("interrupts, vm: y", r"vm: y has no vCPU that could be interrupted"),
        ("memslot, vm: x, slot: 1", r"slot: expected a whole number >= 2"),
        ("vcpu, vm: x, id: -1", r"id: expected a whole number >= 0"),
        (f"together, steps: [{MOVES}]", r"steps: expected a list of length >= 2"),
        (f"together, steps: [{MOVES}, {MOVES}]", r"steps: y makes two of the operations"),
        (f"together, steps: [{MOVES}, {{do: moves, destination: x, sources: [z]}}]", r"sources: there is no VM 'z'"),
        (f"together, steps: [{MOVES}, {{do: launch, vm: x}}]", r"steps\[1\]\.do: there is no such choice"),
        (f"together, steps: [{MOVES}, {MANY}]", r"rounds: these are 1600000 moves"),
        (f"together, steps: [{MOVES}, {MOVE}], meanwhile: [{{do: observe, label: l}}]", r"meanwhile: counters"),
    ],
)
def test_arguments_of_steps(tmp_path: Path, step: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load(tmp_path, BARE, step)


def test_a_guest_is_handed_over_between_two_vmms(tmp_path: Path) -> None:
    vms = "{x: {vmm: a, kind: sev}, y: {vmm: a, kind: plain}}"
    with pytest.raises(UsageError, match=r"script\[0\]\.destination: x and y belong to one VMM"):
        load(tmp_path, vms, "migrate, source: x, destination: y")


LIKED = """\
name: liked
why: It is like nothing else. It stands by itself.
promises: [P1]
vmms: {a: {cgroup: a}, b: {cgroup: b}}
vms:
  x: {vmm: a, kind: sev}
  m: {vmm: a, kind: mirror}
  y: {vmm: b, kind: plain}
script:
  - {do: launch, vm: x, finish: false}
  - {do: mirror, source: x, vm: m}
  - {do: run, vm: x}
  - {do: count, vm: x, ticks: 1}
  - {do: migrate, source: x, destination: y, before: {move: [{do: pause, vm: m}, {do: observe, label: before}]}}
"""


def like(where: Path, rest: str) -> Experiment:
    (where / "liked.yaml").write_text(LIKED)
    path = where / "other.yaml"
    path.write_text(f"name: other\nwhy: a test\n{rest}\n")
    return load_file(path)


def test_an_experiment_like_another_with_other_guests(tmp_path: Path) -> None:
    liked = like(tmp_path, "like: liked\nkind: sev-es\ntype: 3\nvcpus: 2\npromises: [P2]")
    assert (liked.name, liked.why, liked.promises, liked.unaskable) == ("other", "a test", ("P2",), {})
    given = {name: (vm.kind.value, vm.type, vm.vcpus) for name, vm in liked.vms.items()}
    assert given == {"x": ("sev-es", 3, 2), "m": ("mirror", 3, 1), "y": ("plain", 3, 2)}
    assert [step.__struct_config__.tag for _, step in walk(liked.script)] == ["launch", "mirror", "migrate", "observe"]
    plain = like(tmp_path, "like: liked\nunaskable: {P1: {signature: unheard, why: nobody knows}}")
    assert plain.unaskable == {"P1": model.Unaskable(signature="unheard", why="nobody knows")}
    assert plain.script == load_file(tmp_path / "liked.yaml").script


@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        ("like: nothing", r"like: there is no nothing\.yaml beside it"),
        ("like: other", "like: other is like another one itself"),
        ("like: liked\nkind: plain", r"kind: there is no such choice \(it is 'plain'\)"),
        ("like: liked\nscript: []", "script: there is no such key here"),
        ("like: liked\nvcpus: 17", "vcpus: expected a whole number <= 16"),
        ("like: liked\ntype: 3", r"vms\.x\.type: a sev guest cannot have type 3"),
        ("like: liked\npromises: [P99]", "there is no promise 'P99'"),
    ],
)
def test_what_is_like_nothing(tmp_path: Path, rest: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=rf"other\.yaml: {complaint}|other\.yaml: promises: {complaint}"):
        like(tmp_path, rest)


def test_what_is_wrong_in_the_other_file_is_said_of_that_one(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("name: broken\n")
    with pytest.raises(UsageError, match=r"broken\.yaml: why: it is missing"):
        like(tmp_path, "like: broken")
