# SPDX-License-Identifier: Apache-2.0
"""P5: a guest that stopped, is stale, or whose context is another one."""

from __future__ import annotations

import errno
from typing import Any

import msgspec
import pytest

from chaos.history.records import Counted, Header, Invoke, Record, Value
from chaos.judge import findings
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed, guest_moved, shipped
from tests.unit.core.doctored import (
    ES,
    KILL_DESTINATION,
    MOVE,
    Change,
    answered,
    check,
    failed,
    replaced,
    without_operation,
)


def test_p5_guest_status_that_fails_after_the_move() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={}))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "guest_status-after-move:EBADF")
    assert "the guest itself went on: 100 ticks at old before, 203 at new after" in verdict.reason


def test_p5_a_finding_does_not_excuse_a_guest_that_was_not_counted() -> None:
    def change(record: Record) -> Record | None:
        record = answered_ebadf(record) or record
        return None if isinstance(record, Counted) and record.vm == "new" else record

    answered_ebadf = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", MOVE, change).signature == "guest_status-after-move:EBADF+part-unknown"


def test_p5_a_context_that_changed() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", value={"handle": 2, "policy": 0, "state": 1}))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "guest_status-after-move:handle+state")
    assert (verdict.expected, verdict.seen) == ("handle 1, state 3", "handle 2, state 1")


def test_p5_sev_es_that_cannot_run_here() -> None:
    verdict = check("P5", ES)
    assert verdict.outcome is Outcome.SKIPPED
    assert "cannot enter SEV-ES guests" in verdict.reason
    failing = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", ES, failing).signature == "guest_status-after-move:EBADF+skipped:es-cannot-run"


def stopped_having_paused(astray: list[int | str], torn: list[int | str] | None = None) -> Change:
    """The guest counts no further at the destination, and this is what was said of it when it was taken out before."""
    said = answered("pause", "old", value={"last_ticks": [7], "astray": astray, "torn": torn or []})
    counted = replaced(Counted, {"vm": "new"}, ticks=100)
    return lambda record: counted(said(record) or record)


def test_p5_a_guest_that_was_lost_before_the_move_is_no_witness_of_it() -> None:
    assert check("P5", MOVE, stopped_having_paused([])).outcome is Outcome.BROKEN
    lost = check("P5", MOVE, stopped_having_paused([0]))
    assert lost.outcome is Outcome.UNKNOWN and "had left the guest's program" in lost.reason
    said = answered("pause", "old", value={"last_ticks": [7], "ended": "KVM_EXIT_SHUTDOWN"})
    stopped = check("P5", MOVE, lambda record: said(stopped_having_paused([])(record) or record))
    assert stopped.outcome is Outcome.UNKNOWN and "old had stopped by itself (KVM_EXIT_SHUTDOWN)" in stopped.reason
    torn = check("P5", MOVE, stopped_having_paused([], [0]))
    assert torn.outcome is Outcome.UNKNOWN and "memory was not what the registers said of vCPUs [0]" in torn.reason


def test_p5_the_context_is_asked_for_all_the_same() -> None:
    failing = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    astray = stopped_having_paused([0])
    verdict = check("P5", MOVE, lambda record: failing(record) if failing(record) != record else astray(record))
    assert verdict.signature == "astray-before-move+guest_status-after-move:EBADF"


def test_p5_a_vcpu_that_is_not_there_any_more_was_not_seen_to_go_on() -> None:
    four = replaced(Counted, {"vm": "old"}, each=(100, 100, 100, 100))
    for each, outcome in (((203,) * 4, Outcome.KEPT), ((203,) * 2, Outcome.UNKNOWN), ((99,) * 2, Outcome.BROKEN)):
        fewer = replaced(Counted, {"vm": "new"}, each=each)
        verdict = check("P5", MOVE, lambda record, fewer=fewer: fewer(four(record)))  # type: ignore[misc]
        assert verdict.outcome is outcome, verdict.reason


@pytest.mark.parametrize("broken", [{"stale": 3}, {"ended": "KVM_EXIT_SHUTDOWN"}])
def test_p5_a_guest_that_breaks_only_after_it_was_first_counted(broken: dict[str, object]) -> None:
    b = guest_moved()
    b.status("new", "destination")
    b.count("new", "destination", 203)
    assert CHECKERS["P5"](shipped(MOVE), b.history()).outcome is Outcome.KEPT
    b.records[-1] = msgspec.structs.replace(b.count("new", "destination", 307), **broken)
    assert CHECKERS["P5"](shipped(MOVE), b.end()).outcome is Outcome.BROKEN


@pytest.mark.parametrize("ticks", [100, 99])
def test_p5_a_guest_that_stopped(ticks: int) -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ticks=ticks))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "counter-stopped-after-move")


def test_p5_a_guest_that_cannot_be_entered_does_not_go_on_whatever_its_registers_say() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ended="KVM_RUN: EINVAL"))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "stopped-after-move:KVM_RUN-EINVAL")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, ended="KVM_RUN: EINVAL")).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("vm_type", [0, 2])
def test_p5_the_finding_about_typed_vms_excuses_no_others(vm_type: int) -> None:
    refused = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    stopped = replaced(Counted, {"vm": "new"}, ended="KVM_RUN: EINVAL")

    def change(record: Record) -> Record | None:
        if isinstance(record, Invoke) and record.f == "create":
            return msgspec.structs.replace(record, args={**record.args, "type": vm_type})
        return stopped(refused(record) or record)

    found = findings.matching(check("P5", MOVE, change), "6.12.117", findings.load())
    assert (found.id if found is not None else "") == ("0003" if vm_type else "")


def test_p5_a_guest_whose_memory_is_stale() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, stale=1))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "stale-memory-after-move")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, stale=1)).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("host", ["lab", "local"])
@pytest.mark.parametrize("broken", [{"stale": 65}, {"ended": "KVM_EXIT_SHUTDOWN"}, {"ticks": 99}])
def test_p5_a_guest_that_breaks_after_the_move_is_the_moves_matter_anywhere(host: str, broken: dict[str, Any]) -> None:
    counted = replaced(Counted, {"vm": "new"}, sound=(900,), **broken)
    somewhere = replaced(Header, {}, host=host)
    verdict = check("P5", MOVE, lambda record: somewhere(counted(record) or record))
    assert verdict.outcome is Outcome.BROKEN, verdict.reason


def test_p5_a_guest_that_stopped_after_a_failed_move() -> None:
    verdict = check("P5", KILL_DESTINATION, replaced(Counted, {"ticks": 900}, ticks=100))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "counter-stopped-after-failed-move")


def test_p5_what_the_firmware_refused_before_the_move_compares_with_nothing() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "old", outcome="fail", errno=errno.EIO, firmware=3))
    assert verdict.outcome is Outcome.UNKNOWN and "GUEST_STATUS of old was not had before the move" in verdict.reason


def test_p5_compares_the_context_after_a_failed_move_too() -> None:
    b = failed()
    assert CHECKERS["P5"](shipped(MOVE), b.history()).outcome is Outcome.KEPT
    b = failed(status_error=errno.EBADF)
    assert CHECKERS["P5"](shipped(MOVE), b.history()).signature == "guest_status-after-failed-move:EBADF"


def given(*, outcome: str = "ok", errno: int = 0, **value: Value) -> Change:
    """Another answer of the destination when it is given the registers."""
    return answered("set_state", "new", outcome=outcome, errno=errno, value=value)


@pytest.mark.parametrize(
    ("change", "signature"),
    [
        (given(differs=["vcpu 0: msr 0x174"]), "state-differs-after-move:msr-0x174"),
        (
            given(differs=["vcpu 1: regs rax", "vcpu 0: lapic at 896", "vcpu 0: regs rax"]),
            "state-differs-after-move:lapic-at-896+regs-rax",
        ),
        (
            given(outcome="fail", errno=errno.EINVAL, call="KVM_SET_SREGS"),
            "state-refused-after-move:KVM_SET_SREGS:EINVAL",
        ),
    ],
)
def test_p5_registers_that_the_destination_does_not_keep(change: Change, signature: str) -> None:
    verdict = check("P5", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_operation("set_state", "new"), "new was not given its registers"),
        (given(vcpus=1), "were not read again"),
        (given(outcome="fail", errno=errno.EPIPE, call="the other end"), "its registers did not arrive: the other end"),
    ],
)
def test_p5_registers_that_nobody_can_tell_about(change: Change, reason: str) -> None:
    verdict = check("P5", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def moved_twice(*, silent: str) -> Builder:
    """From a to b to c; `silent` are those of them that do not answer for their context."""
    b = Builder()
    b.begin()
    b.launch("a", "source", "sev")
    b.launch("b", "destination")
    b.launch("c", "source")
    for number, (vm, agent) in enumerate((("a", "source"), ("b", "destination"), ("c", "source"))):
        if number:
            b.move("abc"[number - 1], vm, agent)
            b.give_state(vm, agent)
        b.status(vm, agent, error=errno.EBADF if vm in silent else 0)
        b.count(vm, agent, 10 + 10 * number)
    return b


def test_p5_compares_with_the_last_answer_that_was_had_of_the_context() -> None:
    """b has lost the way to the firmware; c, to which it was moved on, is measured against a."""
    verdict = CHECKERS["P5"](shipped(MOVE), moved_twice(silent="bc").history())
    assert verdict.signature == "guest_status-after-move:EBADF"
    assert verdict.reason.count("GUEST_STATUS succeeded before and fails with EBADF") == 2
    verdict = CHECKERS["P5"](shipped(MOVE), moved_twice(silent="b").history())
    assert "GUEST_STATUS of c gives handle 1, policy 0, state 3 as before" in verdict.reason
    verdict = CHECKERS["P5"](shipped(MOVE), moved_twice(silent="abc").history())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "GUEST_STATUS of b was not had before the move" in verdict.reason


def test_p5_a_failed_move_after_which_the_status_fails_as_before() -> None:
    change = answered("guest_status", "old", outcome="fail", errno=errno.EBADF, value={})
    history = changed(failed(status_error=errno.EBADF).history(), change)
    verdict = CHECKERS["P5"](shipped(MOVE), history)
    assert verdict.outcome is Outcome.KEPT
    assert "fails with EBADF as before" in verdict.reason


def test_p5_each_vcpu_goes_on() -> None:
    def each(*ticks: int) -> Change:
        was = replaced(Counted, {"vm": "old"}, each=(100, 200))
        now = replaced(Counted, {"vm": "new"}, ticks=min(ticks), each=ticks)
        return lambda record: now(was(record) or record)

    assert check("P5", MOVE, each(101, 201)).outcome is Outcome.KEPT
    verdict = check("P5", MOVE, each(300, 200))
    assert (verdict.signature, verdict.expected) == ("counter-stopped-after-move", "more than 200 ticks")


def test_p5_a_status_that_says_nothing_is_not_the_same_as_before() -> None:
    silent = answered("guest_status", "old", value={})
    verdict = check("P5", MOVE, lambda record: answered("guest_status", "new", value={})(silent(record) or record))
    assert verdict.outcome is Outcome.UNKNOWN and "did not say handle and policy and state" in verdict.reason


def test_p5_a_run_that_fails_without_naming_its_call_is_named_itself() -> None:
    verdict = check("P5", MOVE, answered("run", "new", outcome="fail", errno=errno.EINVAL, value={}))
    assert verdict.signature == "not-entered-after-move:run:EINVAL"


def test_p5_a_plain_guest_goes_on_where_no_sev_es_guest_can_run() -> None:
    assert check("P5", MOVE, replaced(Header, {}, executes_es=False)).outcome is Outcome.KEPT
