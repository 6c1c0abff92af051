# SPDX-License-Identifier: Apache-2.0
"""P12: a task that the experiment kept asleep is put down to it, and no other."""

from __future__ import annotations

import msgspec
import pytest

from chaos.history.records import Done, End, Firmware, Invoke
from chaos.judge.checkers import CHECKERS
from chaos.judge.hung_task import SEEN_WITHIN
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE

NS = 1_000_000_000
TID = 333
# As 6.12 shows the thread whose GUEST_STATUS the firmware does not answer, one that waits for a mutex, and strangers.
STALLED = ("__schedule", "schedule", "schedule_timeout", "sev_wait_cmd_ioc", "__sev_do_cmd_locked", "sev_do_cmd")
BEHIND = ("__schedule", "schedule", "schedule_preempt_disabled", "__mutex_lock.constprop.0", "kvm_vm_ioctl")
FAULTING = ("__schedule", "schedule", "handle_userfault", "do_anonymous_page", "__get_user_pages")
STRANGER = ("__schedule", "schedule", "io_schedule", "folio_wait_bit_common", "ext4_write_begin")
STRANGER_BEHIND = ("__schedule", "schedule", "__mutex_lock.constprop.0", "ext4_write_begin")


def begun(place: str = "firmware", *, beside: str = "") -> tuple[Builder, Invoke]:
    """An operation that sleeps in a hold; there is a process `beside` its own."""
    b = Builder()
    for agent in (beside, "source"):
        if agent:
            b.spawn(agent)
    invoke = b.invoke("guest_status", "source", vm="old")
    held = b.hold_at(invoke, command="GUEST_STATUS")
    b.records[held.seq] = msgspec.structs.replace(held, place=place)
    return b, invoke


def hangs_on_console(b: Builder, tid: int, stack: tuple[str, ...], *, who: str = "") -> None:
    """The same on the serial console, where the log does not have it any more. Some kernels say there `who` speaks."""
    b.t += 6 * NS
    for text in (f"INFO: task vcpu:{tid} blocked for more than 6 seconds.", *(f" {f}+0x2b2/0x800" for f in stack)):
        b.console(f"[   12.345678]{who} {text}")


def hangs(b: Builder, tid: int, stack: tuple[str, ...], *, for_seconds: int = 6) -> None:
    """khungtaskd reports that it has slept so long, which is how much time has passed."""
    b.t += for_seconds * NS
    b.kernel(f"INFO: task vcpu:{tid} blocked for more than {for_seconds} seconds.", level=3)
    b.kernel("      Tainted: G           OE      6.12.117+deb12-amd64 #1", level=3)
    b.kernel(f"task:vcpu            state:D stack:0     pid:{tid}   tgid:300   ppid:1      flags:0x00000002", level=6)
    for text in ("Call Trace:", " <TASK>", *(f" {function}+0x2b2/0x800 [kvm]" for function in stack), " </TASK>"):
        b.kernel(text, level=6)


def answered(b: Builder, invoke: Invoke, tid: int = TID) -> None:
    done = b.done(invoke)
    b.records[done.seq] = msgspec.structs.replace(done, tid=tid)


def watched(b: Builder) -> None:
    """The firmware was told nothing."""
    b.add(Firmware(t=b.tick(), order=0, command="PLATFORM_STATUS", status=0))


def p12(b: Builder) -> Verdict:
    if not any(isinstance(record, Firmware) for record in b.records):
        watched(b)
    return CHECKERS["P12"](shipped(MOVE), b.end())


@pytest.mark.parametrize(
    ("place", "tid", "stack", "outcome"),
    [
        ("firmware", TID, STALLED, Outcome.KEPT),
        ("vcpu", TID, STRANGER, Outcome.KEPT),  # it is the very thread that is held
        ("firmware", 400, STALLED, Outcome.KEPT),
        ("firmware", 400, BEHIND, Outcome.KEPT),
        ("page", 400, FAULTING, Outcome.KEPT),
        ("page", 400, BEHIND, Outcome.KEPT),
        ("page", 400, STALLED, Outcome.BROKEN),
        ("firmware", 400, FAULTING, Outcome.BROKEN),
        ("firmware", 400, STRANGER, Outcome.BROKEN),
        ("firmware", 400, STRANGER_BEHIND, Outcome.BROKEN),
        ("firmware", 400, (), Outcome.BROKEN),
    ],
)
def test_a_task_that_sleeps_in_a_hold_or_behind_one(
    place: str, tid: int, stack: tuple[str, ...], outcome: Outcome
) -> None:
    b, invoke = begun(place)
    hangs(b, tid, stack)
    b.release("here")
    answered(b, invoke)
    verdict = p12(b)
    assert verdict.outcome is outcome
    assert ("That is put down to the hold 'here'" in verdict.reason) == (outcome is Outcome.KEPT)
    if outcome is Outcome.BROKEN:
        assert verdict.signature == "hung-task"


def test_a_hold_that_was_let_go_explains_nothing() -> None:
    b, invoke = begun()
    b.release("here")
    hangs(b, TID, STALLED)
    answered(b, invoke)
    assert p12(b).outcome is Outcome.BROKEN


def test_a_hold_that_came_after_the_task_had_gone_to_sleep_explains_nothing() -> None:
    b, invoke = begun()
    hangs(b, TID, STALLED, for_seconds=1)
    last = next(r for r in b.records if "blocked for more" in getattr(r, "text", ""))
    b.records[last.seq] = msgspec.structs.replace(last, text=f"INFO: task vcpu:{TID} blocked for more than 60 seconds.")
    answered(b, invoke)
    assert p12(b).outcome is Outcome.BROKEN


@pytest.mark.parametrize(
    ("began", "over", "outcome"),
    [
        (SEEN_WITHIN, 0, Outcome.KEPT),
        (SEEN_WITHIN + 1, 0, Outcome.BROKEN),
        (0, -1, Outcome.BROKEN),
    ],
)
def test_a_hold_was_there_from_when_the_task_went_to_sleep_until_it_was_reported(
    began: int, over: int, outcome: Outcome
) -> None:
    """`began` is when the hold was seen, after the task went to sleep, and `over` when it was let go, after the report.
    It is seen from outside, and so a little late."""
    b, invoke = begun()
    held = b.records[-1]
    hangs(b, 400, BEHIND)
    reported = next(r.t for r in b.records if "blocked for more" in getattr(r, "text", ""))
    b.records[held.seq] = msgspec.structs.replace(held, t=reported - 6 * NS + began)
    released = b.release("here")
    b.records[released.seq] = msgspec.structs.replace(released, t=reported + over)
    answered(b, invoke)
    assert p12(b).outcome is outcome


def test_a_hold_that_was_let_go_and_is_reached_again_holds() -> None:
    b, invoke = begun()
    b.release("here")
    b.hold_at(invoke, command="GUEST_STATUS")
    hangs(b, 400, BEHIND)
    answered(b, invoke)
    assert p12(b).outcome is Outcome.KEPT


def test_what_is_left_on_the_stack_of_an_earlier_call_explains_nothing() -> None:
    b, invoke = begun()
    hangs(b, 400, (*STRANGER, "? sev_wait_cmd_ioc"))
    answered(b, invoke)
    assert p12(b).outcome is Outcome.BROKEN


def test_without_a_hold_it_is_a_report() -> None:
    b = Builder()
    hangs(b, TID, STALLED)
    assert p12(b).signature == "hung-task"


def test_the_stack_of_another_task_is_not_its_own() -> None:
    b, invoke = begun()
    hangs(b, 400, STRANGER)
    hangs(b, TID, STALLED)
    answered(b, invoke)
    verdict = p12(b)
    assert verdict.outcome is Outcome.BROKEN
    assert "vcpu:400" in verdict.reason and "is put down" in verdict.reason
    reports = {record.seq for record in b.records if "blocked for more" in getattr(record, "text", "")}
    assert len(reports) == 2 and reports <= {*verdict.records}


@pytest.mark.parametrize("who", ["", "[   T36]"])
@pytest.mark.parametrize(
    ("stack", "outcome"),
    [(STALLED, Outcome.KEPT), (STALLED[-1:], Outcome.KEPT), (STRANGER, Outcome.BROKEN), ((), Outcome.BROKEN)],
)
def test_what_the_console_alone_has_is_read_there(stack: tuple[str, ...], outcome: Outcome, who: str) -> None:
    b, invoke = begun()
    hangs_on_console(b, 400, stack, who=who)
    b.kernel(f" {STALLED[-1]}+0x2b2/0x800 [ccp]")  # the log has another one's
    answered(b, invoke)
    assert p12(b).outcome is outcome


def test_what_is_printed_long_after_a_report_is_not_its_stack() -> None:
    b, invoke = begun()
    hangs(b, 400, STRANGER)
    for number in range(60):
        b.kernel(f"kvm [402]: ignored rdmsr: {number:#x} data 0x0")
    b.kernel(f" {STALLED[-1]}+0x2b2/0x800 [ccp]")
    answered(b, invoke)
    assert p12(b).outcome is Outcome.BROKEN


def test_a_hold_that_is_never_let_go_lasts_to_the_end() -> None:
    b, _ = begun()
    hangs(b, 400, BEHIND)
    assert p12(b).outcome is Outcome.KEPT


@pytest.mark.parametrize("other", ["hold", "operation", "process"])
def test_a_hold_lasts_while_others_come_to_an_end(other: str) -> None:
    b, invoke = begun(beside="destination")
    if other == "hold":
        b.release("another")
    elif other == "operation":
        b.do("run", "destination", vm="new")
    else:
        b.exit("destination")
    hangs(b, 400, BEHIND)
    answered(b, invoke)
    assert p12(b).outcome is Outcome.KEPT


@pytest.mark.parametrize("over", ["operation", "process"])
def test_a_hold_is_over_with_its_operation_and_its_process(over: str) -> None:
    b, invoke = begun(beside="destination")
    if over == "operation":
        answered(b, invoke)
    else:
        b.exited("source", -9)
    hangs(b, 400, BEHIND)
    assert p12(b).outcome is Outcome.BROKEN


@pytest.mark.parametrize(
    ("fault", "began", "following", "outcome"),
    [
        ("stall", 0, 1, Outcome.KEPT),
        ("stall", 0, None, Outcome.KEPT),
        ("stall", 0, 0, Outcome.KEPT),
        ("stall", 0, -1, Outcome.BROKEN),  # by then it had been answered
        ("stall", SEEN_WITHIN, 1, Outcome.KEPT),
        ("stall", SEEN_WITHIN + 1, 1, Outcome.BROKEN),  # the task had been asleep for too long
        ("delay:8s", 0, 1, Outcome.KEPT),
        ("delay:4s", 0, 1, Outcome.KEPT),  # the report comes 6 s after it was sent, and 2 s are nothing
        ("delay:3s", 0, 1, Outcome.BROKEN),
        ("delay:4000ms", 0, 1, Outcome.KEPT),
        ("delay:3999ms", 0, 1, Outcome.BROKEN),
        ("", 0, 1, Outcome.BROKEN),
    ],
)
def test_a_command_that_the_firmware_was_told_to_answer_late(
    fault: str, began: int, following: int | None, outcome: Outcome
) -> None:
    """`began` is when the command is sent, after the task went to sleep; `following` when the next one is, after the
    report."""
    b = Builder()
    b.spawn("source")
    invoke = b.invoke("guest_status", "source", vm="old")
    hangs(b, TID, STALLED)
    reported = next(r.t for r in b.records if "blocked for more" in getattr(r, "text", ""))
    sent = reported - 6 * NS + began
    b.add(Done(t=b.tick(), op=invoke.op, outcome="ok", tid=TID))
    b.add(Firmware(t=sent, order=0, command="GUEST_STATUS", status=0, began=sent, fault=fault))
    if following is not None:
        b.add(Firmware(t=b.t, order=1, command="DECOMMISSION", status=0, began=reported + following))
    verdict = p12(b)
    assert verdict.outcome is outcome
    if outcome is Outcome.KEPT:
        assert f"GUEST_STATUS, which the firmware was told to answer late ({fault})" in verdict.reason


def test_a_command_of_which_nobody_knows_when_it_was_sent_excuses_nobody() -> None:
    """A witness with another clock leaves `began` at 0, which is before every sleep."""
    b = Builder()
    b.add(Firmware(t=b.tick(), order=0, command="GUEST_STATUS", status=-1, fault="stall"))
    hangs(b, TID, STALLED)
    verdict = p12(b)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "When the firmware was sent" in verdict.reason
    hangs(b, 400, STRANGER)
    assert p12(b).outcome is Outcome.BROKEN


def test_where_the_word_of_the_firmware_was_lost_nobody_can_say() -> None:
    """It comes when a run is over, and a run that was cut off has none."""
    b = Builder()
    b.spawn("source")
    b.invoke("guest_status", "source", vm="old")
    hangs(b, TID, STALLED)
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.UNKNOWN
    b.note("the trace of the firmware could not be read", "firmware")
    verdict = p12(b)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "nobody can say what kept it asleep" in verdict.reason
    assert any("blocked for more" in getattr(b.records[number], "text", "") for number in verdict.records)
    b = Builder()
    hangs(b, TID, STRANGER)
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.BROKEN


def test_on_a_real_host_nobody_tells_the_firmware_anything() -> None:
    """So nothing of that was lost, once the run is over."""
    b = Builder()
    b.records[0] = msgspec.structs.replace(b.records[0], host="local")
    hangs(b, TID, STALLED)
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.UNKNOWN
    assert CHECKERS["P12"](shipped(MOVE), b.end()).signature == "hung-task"


def test_a_task_that_is_reported_again_and_again_is_told_once() -> None:
    b = Builder()
    for _ in range(3):
        hangs(b, TID, STRANGER)
    verdict = p12(b)
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.reason.count("blocked for more than") == 1
    hangs(b, 400, STRANGER)
    b.records = [record for record in b.records if not isinstance(record, End)]
    b.records = [msgspec.structs.replace(record, seq=seq) for seq, record in enumerate(b.records)]
    assert p12(b).reason.count("blocked for more than") == 2


def test_a_task_that_is_kept_asleep_is_told_of_once_however_long_it_sleeps() -> None:
    b, invoke = begun()
    hangs(b, 400, BEHIND)
    hangs(b, 400, BEHIND, for_seconds=12)
    answered(b, invoke)
    verdict = p12(b)
    assert verdict.outcome is Outcome.KEPT
    assert verdict.reason.count("put down to the hold") == 1
