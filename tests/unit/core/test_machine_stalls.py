# SPDX-License-Identifier: Apache-2.0
"""P12: what hangs because the machine under the lab stood still is put down to that, and nothing else is."""

from __future__ import annotations

import msgspec
import pytest

from chaos.history.records import StoodStill
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE
from tests.unit.core.test_hung_task import STRANGER, hangs

NS = 1_000_000_000
LOCKUP = "watchdog: BUG: soft lockup - CPU#1 stuck for 14s! [python3:1826]"
STALL = "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"  # after the 10 s of the header's patience


PATIENCE = {"RCU stall": 10, "hard lockup": 0}


def reported(text: str, *stalls: tuple[float, float], patience: dict[str, int] = PATIENCE) -> Verdict:
    """The kernel says this; `stalls` are how many seconds before that the machine stood still, from and to."""
    b = Builder()
    b.records[0] = msgspec.structs.replace(b.records[0], patience=patience)
    b.t += 60 * NS
    at = b.kernel(text, level=0).t
    for begun, over in stalls:
        b.add(StoodStill(t=round(at - begun * NS), until=round(at - over * NS)))
    return CHECKERS["P12"](shipped(MOVE), b.end())


@pytest.mark.parametrize("text", [LOCKUP, STALL])
@pytest.mark.parametrize(
    ("stalls", "outcome"),
    [
        ([(14.6, 0.0)], Outcome.KEPT),
        ([(14.9, 8.0), (7.5, 0.2)], Outcome.KEPT),
        ([(14.6, 5.0)], Outcome.UNKNOWN),  # and what was it then?
        ([(3.0, 0.0)], Outcome.UNKNOWN),
        ([(1.0, 0.0)], Outcome.UNKNOWN),
        ([(40.0, 20.0)], Outcome.BROKEN),  # long before
        ([(0.5, 0.0)], Outcome.BROKEN),
        ([(-5.0, -20.0)], Outcome.BROKEN),  # afterwards
        ([], Outcome.BROKEN),
    ],
)
def test_a_lockup_is_the_machines_as_long_as_that_stood_still(
    text: str, stalls: list[tuple[float, float]], outcome: Outcome
) -> None:
    verdict = reported(text, *stalls)
    assert verdict.outcome is outcome
    assert ("the machine under the lab, which stood still for" in verdict.reason) == (outcome is not Outcome.BROKEN)
    assert ("put down to" in verdict.reason) == (outcome is Outcome.KEPT)


@pytest.mark.parametrize(("stood_still", "outcome"), [(6, Outcome.KEPT), (3, Outcome.UNKNOWN), (0, Outcome.BROKEN)])
def test_a_task_that_hung_meanwhile_likewise(stood_still: int, outcome: Outcome) -> None:
    b = Builder()
    hangs(b, 400, STRANGER, for_seconds=6)
    at = next(r.t for r in b.records if "blocked for more" in getattr(r, "text", ""))
    b.add(StoodStill(t=at - stood_still * NS, until=at))
    assert CHECKERS["P12"](shipped(MOVE), b.end()).outcome is outcome


@pytest.mark.parametrize(
    "text", ["BUG: kernel NULL pointer dereference, address: 0", "WARNING: CPU: 1 PID: 2 at a.c:3 f+0x1/0x2"]
)
def test_no_other_report_is(text: str) -> None:
    assert reported(text, (20.0, 0.0)).outcome is Outcome.BROKEN


def test_a_kernel_that_never_reports_such_a_thing_has_no_time_to_compare_with() -> None:
    assert reported("NMI watchdog: Watchdog detected hard LOCKUP on cpu 1", (20.0, 0.0)).outcome is Outcome.BROKEN


def test_where_the_kernel_s_patience_is_not_known_there_is_none_either() -> None:
    assert reported(STALL, (20.0, 0.0), patience={}).outcome is Outcome.BROKEN
