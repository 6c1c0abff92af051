# SPDX-License-Identifier: Apache-2.0
"""The part of the catalogue that is carried out here for the table of outcomes alone: with what the other tests carry
out, every fault strikes on each kernel (but for NOT_IN_CI)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Sevchaos, as_expected

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
WITHIN = 900.0  # for all of them, on a machine that is busy with others


@pytest.fixture
def carried_out(kernel: str, sevchaos: Sevchaos, tmp_path: Path) -> Callable[..., list[Any]]:
    def run(*names: str) -> list[Any]:
        options = ("--kernel", kernel, "--seed", "7", "--json", "--accept-known", "--runs", str(tmp_path))
        told: list[Any] = json.loads(as_expected(sevchaos("run", *names, *options, within=WITHIN)))["runs"]
        assert [run["experiment"] for run in told] == list(names)
        return told

    return run


def test_every_fault_comes_out_as_the_table_says(carried_out: Callable[..., list[Any]]) -> None:
    carried_out(*STRIKING)


def test_a_cpu_that_was_offline_is_a_sev_hosts_when_it_comes_back(carried_out: Callable[..., list[Any]]) -> None:
    """Of a lab's CPU the kernel finds out then that it has no SEV, and whoever loads the drivers next is told so."""
    *_, reloaded = carried_out(*IN_ONE_LAB)
    assert reloaded["earlier"] == 1
