# SPDX-License-Identifier: Apache-2.0
"""P8: what never ends, and what a signal does not end."""

from __future__ import annotations

import pytest

from chaos.history.records import Fault, History, Overdue
from chaos.judge.verdict import Outcome
from tests.unit.core.build import moved, source_killed
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, begun, verdict_of


def hung(*, fault: bool = False, exits: bool = False, status: int = -9, complete: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    if fault:
        b.kill_begins("destination")
    if exits:
        b.exited("destination", status)
        b.done(invoke, "info")
    return b.end(complete=complete)


def test_p8() -> None:
    assert verdict_of("P8", moved()).outcome is HELD
    verdict = verdict_of("P8", source_killed())
    assert verdict.outcome is HELD and "1 of them after a hold" in verdict.reason


def test_p8_what_never_ends() -> None:
    verdict = verdict_of("P8", hung())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "never-ended:move")
    assert verdict_of("P8", hung(exits=True)).signature == "never-ended:move"  # it had to be cleared away
    assert verdict_of("P8", hung(fault=True)).signature == "signal-did-not-end:move"
    assert verdict_of("P8", hung(fault=True, exits=True)).outcome is HELD
    assert verdict_of("P8", hung(exits=True, status=1)).outcome is HELD
    verdict = verdict_of("P8", hung(complete=False))
    assert verdict.outcome is UNKNOWN and "cut short" in verdict.reason
    assert verdict_of("P8", begun().finish()).outcome is UNKNOWN


@pytest.mark.parametrize(
    ("state", "free", "call", "outcome"),
    [
        ("D", True, "ioctl", DEVIATED),
        ("D", False, "ioctl", UNKNOWN),
        ("R", True, "ioctl", UNKNOWN),
        ("D", True, "", UNKNOWN),
    ],
)
def test_p8_what_was_waited_for_in_vain(state: str, free: bool, call: str, outcome: Outcome) -> None:
    """The script did not come to its end, since the VMs cannot be used any more."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    late = b.add(
        Overdue(t=b.tick(), op=move.op, step=3, free=free, state=state, sleeping="sev_lock_two_vms", call=call)
    )
    verdict = verdict_of("P8", b.end(complete=False, reason="step 3 (join): waited 30 s for move to end"))
    assert verdict.outcome is outcome
    if outcome is DEVIATED:
        assert verdict.signature == "never-ended:move" and verdict.seen == "it slept in sev_lock_two_vms"
        assert late.seq in verdict.records


def test_p8_says_where_the_kernel_saw_it_last() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.invoke("move", "destination", vm="new", source="old")
    b.traced(333, "sev_lock_two_vms", "leave", returned=0)
    last = b.traced(333, "sev_lock_vcpus_for_migration")
    verdict = verdict_of("P8", b.end())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "never-ended:move")
    assert verdict.seen == "its thread last entered sev_lock_vcpus_for_migration"
    assert last.seq in verdict.records


@pytest.mark.parametrize("ends", [True, False])
def test_p8_what_was_waited_for_in_vain_and_ended_all_the_same(ends: bool) -> None:
    """It slept where nothing of ours stopped it, until its process, or what it waited for, was done away with."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.add(Overdue(t=b.tick(), op=move.op, step=3, free=True, state="D", call="ioctl"))
    if ends:
        b.kill("destination")
        b.done(move, "info")
    else:
        b.exited("source", -9)
        b.done(move)
    assert verdict_of("P8", b.end()).outcome is (DEVIATED if ends else UNKNOWN)


def test_p8_a_fault_that_was_withheld_ends_nothing() -> None:
    b = begun()
    b.launch("new", "destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.add(Fault(t=b.tick(), fault="kill", event="withheld", step=1, target="destination", ends=("destination",)))
    b.exited("destination", -9)
    b.done(move, "info")
    assert verdict_of("P8", b.end()).signature == "never-ended:move"
