# SPDX-License-Identifier: Apache-2.0
"""What an experiment may say of its VMs, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import experiment
from chaos.errors import UsageError
from chaos.experiment import Experiment


def load(where: Path, vms: str, *steps: str) -> Experiment:
    path = where / "e.yaml"
    script = "\n".join(f"  - {{do: {step}}}" for step in steps or ("observe, label: nothing",))
    path.write_text(
        f"name: e\nwhy: a test\npromises: [P1]\nvmms: {{a: {{cgroup: a}}}}\nvms: {vms}\nscript:\n{script}\n"
    )
    return experiment.load(path)


def test_types_of_vms(tmp_path: Path) -> None:
    vms = "{x: {vmm: a, kind: sev, type: 2}, y: {vmm: a, kind: sev-es, type: 3}, z: {vmm: a, kind: plain, type: 3}}"
    assert load(tmp_path, vms).types == {2, 3}
    assert load(tmp_path, "{x: {vmm: a, kind: sev}}").types == {0}


@pytest.mark.parametrize(
    ("vm", "complaint"),
    [
        ("kind: sev, type: 3", r"vms\.x\.type: a sev guest cannot have type 3"),
        ("kind: sev-es, type: 2", r"vms\.x\.type: a sev-es guest cannot have type 2"),
        ("kind: sev, type: 4", r"vms\[\.\.\.\]\.type: Invalid enum value 4"),
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


def test_a_guest_is_handed_over_between_two_vmms(tmp_path: Path) -> None:
    vms = "{x: {vmm: a, kind: sev}, y: {vmm: a, kind: plain}}"
    with pytest.raises(UsageError, match=r"script\[0\]\.destination: x and y belong to one VMM"):
        load(tmp_path, vms, "migrate, source: x, destination: y")
