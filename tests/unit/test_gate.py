# SPDX-License-Identifier: Apache-2.0
"""A gate that several crews of native threads wait at, and what is told of the answers of a loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from errno import EBADF, ENOTTY

import pytest

from chaos.linux.fd import OwnedFd
from chaos.native import LoopProgram, LoopStep, NativeLoop, RunningLoop, gate
from chaos.native.edge import answered, tally

WITHIN = 30.0
TCGETS = 0x5401


@pytest.fixture
def shut() -> Iterator[OwnedFd]:
    with gate.new(1) as made:
        yield made


@pytest.fixture
def null() -> Iterator[int]:
    with OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as opened:
        yield opened.number


def waiting(fd: int, shut: OwnedFd, rounds: int | None = 1) -> RunningLoop:
    return NativeLoop((LoopProgram((LoopStep(fd, TCGETS), LoopStep(-1, TCGETS)), rounds=rounds),), ring=1 << 10).start(
        gate=shut.number
    )


def test_nobody_begins_before_the_gate_opens_and_all_do_then(null: int) -> None:
    with gate.new(3) as shut:
        crews = [waiting(null, shut) for _ in range(3)]
        assert not any(crew.wait(0.02) for crew in crews)
        assert [crew.calls() for crew in crews] == [(0,)] * 3
        moment = gate.open_at(shut.number)
        outcomes = [crew.join(WITHIN) for crew in crews]
    assert all(outcome.threads[0].began >= moment for outcome in outcomes)
    assert all(outcome.threads[0].calls == 2 for outcome in outcomes)


def test_a_single_call_is_made_when_the_loop_beside_it_is_under_way(null: int) -> None:
    with gate.new(2) as shut:
        alone = NativeLoop((LoopProgram((LoopStep(null, TCGETS),)),), ring=1).start(gate=shut.number)
        gate.open_at(shut.number, time.monotonic_ns())
        before = time.monotonic_ns()
        loop = waiting(null, shut, rounds=50)
        (call,) = alone.join(WITHIN).calls()
        first, second, *_ = loop.join(WITHIN).calls()
        assert before < first.ended <= call.began
        assert first.ended <= second.began, "waiting belongs to no call"


def test_a_loop_waits_after_its_first_call(null: int) -> None:
    with gate.new(2) as shut:
        loop = waiting(null, shut, rounds=50)
        gate.open_at(shut.number, time.monotonic_ns())
        while not sum(loop.calls()):
            assert not loop.wait(0)
        other = waiting(null, shut, rounds=50)
        first, second, *_ = loop.join(WITHIN).calls()
        assert first.ended < next(other.join(WITHIN).calls()).ended <= second.began


def test_one_who_never_comes_is_not_waited_for_for_ever(null: int) -> None:
    with gate.new(2) as shut:
        gate.open_at(shut.number, time.monotonic_ns())
        assert waiting(null, shut).join(WITHIN).threads[0].calls == 2


def test_a_crew_that_comes_late_finds_it_open(shut: OwnedFd, null: int) -> None:
    gate.open_at(shut.number, time.monotonic_ns())
    assert waiting(null, shut).join(WITHIN).threads[0].calls == 2


def test_who_is_stopped_at_the_gate_makes_no_call(shut: OwnedFd, null: int) -> None:
    crew = waiting(null, shut)
    crew.stop()
    assert crew.join(WITHIN).threads[0].calls == 0


def test_answers_are_counted_by_step_and_found_by_errno(shut: OwnedFd, null: int) -> None:
    gate.open_at(shut.number, time.monotonic_ns())
    (thread,) = waiting(null, shut, rounds=50).join(WITHIN).threads
    assert dict(tally(thread)) == {(0, ENOTTY): 50, (1, EBADF): 50}
    found = list(answered(thread, EBADF))
    assert len(found) == 50 and {call.index for call in found} == {1}
    assert [call.began for call in found] == sorted(call.began for call in found)
    assert list(answered(thread, 0)) == []
