# SPDX-License-Identifier: Apache-2.0
"""Interrupts by eventfd through moves: what arrives, what the dead source takes, and what is left behind."""

from __future__ import annotations

from errno import EIO

import pytest

from chaos.history.records import Done, History, Observation
from tests.lab.conftest import Once, Sevchaos
from tests.lab.told import Told, carried_out

pytestmark = pytest.mark.lab

NAMES = ("dead-source-torn-down", "interrupts-through-moves", "irqfd-on-both-sides")


@pytest.fixture
def told(once: Once[Told], kernel: str, sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """All three on one kernel."""
    return once(kernel, lambda: carried_out(sevchaos, tmp_path_factory.mktemp("runs"), kernel, *NAMES))


def answers(read: History, f: str, vm: str) -> list[Done]:
    return [done for invoke, done in read.operations() if (invoke.f, invoke.args.get("vm")) == (f, vm) and done]


def test_forty_interrupts_arrive_through_four_moves(told: Told) -> None:
    looks = answers(told.history("interrupts-through-moves"), "interrupts", "v5")
    assert [done.value["vectors"] for done in looks] == [list(range(32, 72))]


def test_the_dead_source_takes_an_interrupt_until_it_is_closed(told: Told) -> None:
    read = told.history("irqfd-on-both-sides")
    assert [done.value["vectors"] for done in answers(read, "interrupts", "old")] == [[40]]
    assert [done.value["vectors"] for done in answers(read, "interrupts", "new")] == [[40, 41], [40, 41, 49]]
    assert told.outcomes("irqfd-on-both-sides")["P7"] == "kept"


def test_a_dead_source_refuses_to_be_torn_down_and_nothing_is_left_of_it(told: Told) -> None:
    read = told.history("dead-source-torn-down")
    for f in ("ioeventfd", "irqfd", "set_memory"):
        assert EIO in [done.errno for done in answers(read, f, "old")]
    assert told.outcomes("dead-source-torn-down")["P9"] == "kept"
    ends = [r.eventfds for r in read.records if isinstance(r, Observation) and r.label in ("start", "end")]
    assert None not in ends and ends[0] == ends[1]
