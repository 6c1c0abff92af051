# SPDX-License-Identifier: Apache-2.0
"""P8: what never ends, and what a signal does not end."""

from __future__ import annotations

from chaos.history import History
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
