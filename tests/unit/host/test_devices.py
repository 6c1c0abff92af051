# SPDX-License-Identifier: Apache-2.0
"""Which VMs are created with a device: all that P3 asks, and none whose end a held move would then keep from coming."""

from __future__ import annotations

import pytest

from chaos.experiment import steps as s
from chaos.runner.devices import with_device
from tests.unit.core.build import shipped


def kills(step: s.FaultStep) -> tuple[str, ...]:
    return (step.target,) if step.fault == "kill" else ()


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("move-across-cgroups", {"old"}),
        ("move-back-refused", {"old", "new"}),
        ("kill-destination-in-move", {"old"}),
        ("storm-through-move", {"old"}),
        ("two-heirs", {"old", "one", "two"}),
        ("kill-source-in-move", set()),
        ("source-closed-in-move", set()),
        ("kill-source-at-every-stage", set()),
    ],
)
def test_devices_of_the_catalogue(name: str, devices: set[str]) -> None:
    assert with_device(shipped(name), kills) == devices


def test_who_is_killed_with_the_destination_of_its_own_migration_has_one() -> None:
    """A move that is held keeps only its source's lock from others: it ends with the process that makes it."""
    experiment = shipped("kill-destination-and-retry")
    sources = {step.source for _, step in s.walk(experiment.script) if isinstance(step, s.MigrateStep)}
    assert with_device(experiment, kills) == sources
