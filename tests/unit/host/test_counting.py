# SPDX-License-Identifier: Apache-2.0
"""The step that waits for a guest to count, of a guest that is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from chaos.experiment import steps
from chaos.history.records import Counted
from chaos.linux.loop import Loop
from chaos.runner.script import running
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed
from chaos.vmm.messages import Sampled


def test_a_guest_that_does_not_count_is_taken_out_so_that_it_is_told_where_it_was() -> None:
    told: list[object] = []
    sampled = Sampled(ticks=5, each=(5,), stale=0, where="exit", sound=(5,))
    vm = SimpleNamespace(name="old", running=True, every=1, vmm=SimpleNamespace(name="source"))
    vmms = SimpleNamespace(ask=lambda vmm, message: SimpleNamespace(sampled=sampled))
    guests = SimpleNamespace(launched=lambda name: vm, may_run=lambda vm: True, leave=lambda vm: told.append("left"))
    executor = SimpleNamespace(guests=guests, vmms=vmms, loop=Loop(), write=told.append, now=lambda: 1, step=3)
    with pytest.raises(StepFailed, match="old to count 100"):
        running.count(cast(Executor, executor), steps.CountStep(vm="old", ticks=100, within=0.01))
    counted, left = told
    assert isinstance(counted, Counted) and (counted.ticks, counted.sound) == (5, (5,))
    assert left == "left"
