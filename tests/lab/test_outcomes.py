# SPDX-License-Identifier: Apache-2.0
"""The part of the catalogue that is carried out here for the table of outcomes alone: with what the other tests carry
out, every fault strikes on each kernel (but for NOT_IN_CI)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.conftest import Sevchaos
from tests.lab.told import carried_out

pytestmark = pytest.mark.lab

STRIKING = (
    "both-on-one-cpu",
    "disable-misc-while-charged",
    "exhausted-sev",
    "firmware-init-fails",
    "freeze-destination-in-move",
    "kill-both-in-move",
    "kill-cgroup-of-both-in-move",
    "limit-refuses-move",
    "lose-source-descriptors",
    "move-fails-half-locked",
    "network-flaps-before-move",
    "oom-destination-in-move",
    "remove-cgroup-while-charged",
    "stop-source-in-move",
    "storage-missing",
    "uncharge-is-slow",
    "vcpu-thread-ends-in-move",
)
"""For each fault that no experiment of another file applies, the one that applies it soonest."""
IN_ONE_LAB = ("cpu-offline-before-move", "drivers-reloaded")
NOT_IN_CI = {
    "signal-storm": "on a loaded machine its signals keep the kernel from anything else; it waits for the night",
    "fail-nth": "it wants a kernel with fault injection, which has to be built first (test_sweeps)",
}


def test_every_fault_comes_out_as_the_table_says(kernel: str, sevchaos: Sevchaos, tmp_path: Path) -> None:
    assert list(carried_out(sevchaos, tmp_path, kernel, *STRIKING).runs) == list(STRIKING)


def test_a_cpu_that_was_offline_is_a_sev_hosts_when_it_comes_back(
    kernel: str, sevchaos: Sevchaos, tmp_path: Path
) -> None:
    """Of a lab's CPU the kernel finds out then that it has no SEV, and whoever loads the drivers next is told so."""
    told = carried_out(sevchaos, tmp_path, kernel, *IN_ONE_LAB)
    assert [(name, run["earlier"]) for name, run in told.runs.items()] == list(zip(IN_ONE_LAB, (0, 1), strict=True))
