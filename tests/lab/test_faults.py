# SPDX-License-Identifier: Apache-2.0
"""Faults on stock kernels, each in an experiment: it strikes, what is promised is kept all the same, and withheld it
leaves no evidence and proves nothing."""

from __future__ import annotations

import pytest

from chaos.history.records import Fault
from tests.lab.conftest import Once, Sevchaos, as_expected
from tests.lab.told import Told

pytestmark = pytest.mark.lab

EXPERIMENTS = {
    "create-vcpu": "vcpus-created-in-move",
    "memlock": "memlock-stops-launch",
    "hole-punch": "hole-in-move",
    "memslot-gone": "memslot-gone-in-move",
    "memory-pressure": "pressure-in-migration",
    "cpu-throttle": "throttled-through-migration",
    "netem": "relay-impairs",
    "partition": "relay-partition-before-state",
}


Both = tuple[Told, Told]


@pytest.fixture
def both(once: Once[Both], kernel: str, sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return once(kernel, lambda: with_and_without(sevchaos, str(tmp_path_factory.mktemp("runs")), kernel))


def with_and_without(sevchaos: Sevchaos, where: str, kernel: str) -> Both:
    """All of them with their faults, and without, each in one go of a lab."""
    # With this seed every kind of fate is among those of the relay's first dozen packets, several times.
    options = (*EXPERIMENTS.values(), "--kernel", kernel, "--seed", "4", "--json", "--accept-known", "--runs", where)
    done = sevchaos("run", *options)
    without = sevchaos("run", *options, *(word for fault in EXPERIMENTS for word in ("--withhold", fault)))
    return Told(as_expected(done)), Told(without.stdout)


def evidence_of(told: Told, fault: str) -> list[bool | None]:
    records = told.history(EXPERIMENTS[fault]).records
    return [r.struck for r in records if isinstance(r, Fault) and (r.fault, r.event) == (fault, "evidence")]


@pytest.mark.parametrize("fault", EXPERIMENTS)
def test_a_fault_strikes_and_leaves_no_evidence_if_it_was_withheld(both: Both, fault: str) -> None:
    given, withheld = both
    assert evidence_of(given, fault) and all(evidence_of(given, fault))
    assert not any(evidence_of(withheld, fault))
    assert "kept" not in withheld.outcomes(EXPERIMENTS[fault]).values()
