# SPDX-License-Identifier: Apache-2.0
"""P5: a guest that stopped, is stale, or whose context is another one."""

from __future__ import annotations

import errno

import pytest

from chaos.checkers import CHECKERS
from chaos.history import Counted, Record
from chaos.verdict import Outcome
from tests.unit.core.build import shipped
from tests.unit.core.doctored import (
    ES,
    KILL_DESTINATION,
    MOVE,
    Change,
    answered,
    check,
    failed,
    replaced,
    without,
    without_operation,
)


def test_p5_guest_status_that_fails_after_the_move() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={}))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "guest_status-after-move:EBADF")
    assert "the guest itself went on: 100 ticks at old before, 203 at new after" in verdict.reason


def test_p5_a_finding_does_not_excuse_a_guest_that_was_not_counted() -> None:
    def change(record: Record) -> Record | None:
        record = answered_ebadf(record) or record
        return None if isinstance(record, Counted) and record.vm == "new" else record

    answered_ebadf = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", MOVE, change).signature == "guest_status-after-move:EBADF+part-unknown"


def test_p5_a_context_that_changed() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", value={"handle": 2, "policy": 0, "state": 1}))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "guest_status-after-move:handle+state")
    assert (verdict.expected, verdict.seen) == ("handle 1, state 3", "handle 2, state 1")


def test_p5_sev_es_that_cannot_run_here() -> None:
    verdict = check("P5", ES)
    assert verdict.outcome is Outcome.SKIPPED
    assert "cannot enter SEV-ES guests" in verdict.reason
    failing = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", ES, failing).signature == "guest_status-after-move:EBADF"


@pytest.mark.parametrize("ticks", [100, 99])
def test_p5_a_guest_that_stopped(ticks: int) -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ticks=ticks))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "counter-stopped-after-move")


def test_p5_a_guest_that_cannot_be_entered_does_not_go_on_whatever_its_registers_say() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ended="KVM_RUN: EINVAL"))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "stopped-after-move:KVM_RUN-EINVAL")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, ended="KVM_RUN: EINVAL")).outcome is Outcome.UNKNOWN


def test_p5_a_guest_whose_memory_is_stale() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, stale=1))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "stale-memory-after-move")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, stale=1)).outcome is Outcome.UNKNOWN


def test_p5_a_guest_that_stopped_after_a_failed_move() -> None:
    verdict = check("P5", KILL_DESTINATION, replaced(Counted, {"ticks": 900}, ticks=100))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "counter-stopped-after-failed-move")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(Counted, vm="new"), "not seen to count after"),
        (without(Counted, vm="old"), "not seen to count before"),
        (without_operation("guest_status", "new"), "new was not asked for its status afterwards"),
        (without_operation("guest_status", "old"), "GUEST_STATUS of old was not had before the move"),
        (answered("guest_status", "old", outcome="fail", errno=errno.EIO, firmware=3), "was not had before"),
    ],
)
def test_p5_needs_its_witnesses(change: Change, reason: str) -> None:
    verdict = check("P5", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p5_compares_the_context_after_a_failed_move_too() -> None:
    b = failed()
    assert CHECKERS["P5"](shipped(MOVE), b.history()).outcome is Outcome.HELD
    b = failed(status_error=errno.EBADF)
    assert CHECKERS["P5"](shipped(MOVE), b.history()).signature == "guest_status-after-failed-move:EBADF"
