# SPDX-License-Identifier: Apache-2.0
"""P5 for what a CPU takes guests for by their ASIDs."""

from __future__ import annotations

from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import guest_moved
from tests.unit.core.doctored import verdict_of

Entry = tuple[int, int, int, tuple[int, ...]]
"""vCPU, ASID, how many generations, and the shared ones."""


def judged(*entered: Entry, lost: bool = False) -> Verdict:
    """Of a run whose guest went on."""
    b = guest_moved()
    b.status("new", "destination")
    b.count("new", "destination", 200)
    for vcpu, asid, generations, shared in entered:
        b.entered(vcpu, asid, generations, shared)
    if lost:
        b.note("entries into guests: the tracer had no room", "entries")
    return verdict_of("P5", b.finish())


def test_vcpus_with_asids_of_their_own() -> None:
    verdict = judged((0, 9, 2, ()), (1, 10, 1, ()), (2, 9, 1, ()))
    assert verdict.outcome is Outcome.KEPT
    assert "3 vCPUs were entered on CPU 1, each with ASIDs of its own" in verdict.reason


def test_an_asid_that_two_were_entered_with_in_one_generation() -> None:
    verdict = judged((0, 9, 2, (7,)), (1, 9, 1, (7,)), (1, 10, 1, ()))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "asid-of-two-vcpus")
    assert (verdict.expected, verdict.seen) == ("one vCPU", "two")
    assert "the vCPU of thread 70 with ASID 9, and another one too in its generation 7" in verdict.reason


def test_an_asid_of_the_guest_s_own_is_for_all_its_vcpus() -> None:
    verdict = judged((0, 3, 0, ()), (1, 3, 0, ()))
    assert verdict.outcome is Outcome.KEPT and "ASID" not in verdict.reason


def test_where_the_count_is_lost_nobody_can_say() -> None:
    verdict = judged(lost=True)
    assert verdict.outcome is Outcome.UNKNOWN and "a witness was lost: entries into guests" in verdict.reason
    assert max(verdict.records) > max(judged().records), "the note is among them"
    assert judged((0, 9, 1, (1,)), (1, 9, 1, (1,)), lost=True).outcome is Outcome.BROKEN, "what was counted is so"


def test_where_nobody_counted_nothing_is_said_of_it() -> None:
    assert judged().outcome is Outcome.KEPT
