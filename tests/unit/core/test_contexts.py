# SPDX-License-Identifier: Apache-2.0
"""What is owed to a firmware that was broken on purpose, and what is the kernel's own all the same."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Firmware, History
from chaos.judge.ledger.firmware_contexts import TIMED_OUT, Contexts
from tests.unit.core.build import STATUS, Builder
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, verdict_of

HWERROR, ACTIVE, INVALID_GUEST = 19, 18, 16


class Told(Builder):
    """With somebody who watches the firmware."""

    def sent(self, command: str, handle: int | None = None, *, status: int = 0, fault: str = "") -> Firmware:
        order = sum(isinstance(record, Firmware) for record in self.records)
        return self.add(
            Firmware(t=self.tick(), order=order, command=command, status=status, handle=handle, fault=fault)
        )

    def limits(self, label: str) -> None:
        """An observation that has read that nothing is limited."""
        seen = self.observe(label)
        misc = {cgroup: files | {"max": {}} for cgroup, files in seen.misc.items()}
        self.records[-1] = msgspec.structs.replace(seen, misc=misc)

    def ended(self, *, deactivate: str = "", decommission: str = "", status: int = 0) -> None:
        """What the kernel sends of context 1 when its VM goes."""
        self.sent("DEACTIVATE", 1, fault=deactivate, status=HWERROR if deactivate.startswith("fail") else 0)
        self.sent("DECOMMISSION", 1, fault=decommission, status=status)


def closed(deactivate: str = "", decommission: str = "", *, status: int = 0, guests: int = 0) -> History:
    """A VM is launched and closed; the firmware counts `guests` at the end."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    b.observe("launched", {"source": 1})
    b.do("close", "source", vm="old")
    b.ended(deactivate=deactivate, decommission=decommission, status=status)
    b.observe("closed", {}, guests=guests)
    for agent in ("source", "destination"):
        b.exit(agent)
    b.sent("PLATFORM_STATUS")
    b.observe("end", guests=guests)
    b.fill("end")
    return b.end()


@pytest.mark.parametrize(
    ("faults", "status"),
    [
        (("", "fail:HWERROR_PLATFORM"), HWERROR),
        (("", "skip"), 0),
        (("fail:HWERROR_PLATFORM", ""), ACTIVE),
        (("skip", ""), ACTIVE),
    ],
)
def test_a_context_that_a_fault_keeps_is_no_leak(faults: tuple[str, str], status: int) -> None:
    """The count is put right by exactly that one: one more or less is the kernel's."""
    told = closed(*faults, status=status, guests=1)
    assert len(Contexts.of(told).owed) == 1
    for promise in ("P9", "P13"):
        verdict = verdict_of(promise, told)
        if promise == "P9":
            assert verdict.outcome is HELD
        assert "context 1 was not decommissioned" in verdict.reason
    assert verdict_of("P4", told).outcome is UNKNOWN, "no move was tried; and no deviation"
    assert verdict_of("P9", closed(*faults, status=status, guests=2)).signature == "firmware-counts-more"
    assert verdict_of("P9", closed(*faults, status=status, guests=0)).signature == "firmware-counts-fewer"


@pytest.mark.parametrize("fault", ["", "delay:50ms", "stall", "withhold"])
def test_an_honest_refusal_is_the_kernels_affair(fault: str) -> None:
    """Late, but its own word: then the kernel has lost count, and a context that stays has leaked."""
    told = closed(fault, fault, status=INVALID_GUEST, guests=1)
    assert verdict_of("P9", told).signature == "firmware-counts-more"
    assert verdict_of("P13", told).signature == "decommissioned-twice+never-decommissioned+part-unknown"


@pytest.mark.parametrize(
    ("deactivate", "decommission"), [("fail:HWERROR_PLATFORM", ""), ("skip", ""), ("", "fail:HWERROR_PLATFORM")]
)
def test_a_context_that_a_fault_has_kept_is_decommissioned_once_too(deactivate: str, decommission: str) -> None:
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    b.ended(deactivate=deactivate, decommission=decommission, status=HWERROR if decommission else ACTIVE)
    assert Contexts.of(b.history()).refused == []
    b.sent("DECOMMISSION", 1, status=ACTIVE if deactivate else 0)
    contexts = Contexts.of(b.history())
    assert (len(contexts.owed), len(contexts.refused)) == (1, 1)
    assert "decommissioned-twice" in verdict_of("P13", b.history()).signature


@pytest.mark.parametrize("fault", ["lie:HWERROR_PLATFORM", "garbage", "delay:50ms", "stall"])
def test_what_was_carried_out_leaves_nothing(fault: str) -> None:
    status = HWERROR if fault.startswith("lie") else 0
    assert Contexts.of(closed("", fault, status=status)).owed == []
    assert verdict_of("P9", closed("", fault, status=status)).outcome is HELD
    assert verdict_of("P9", closed("", fault, status=status, guests=1)).signature == "firmware-counts-more"


@pytest.mark.parametrize(
    ("fault", "owed"), [("lie:RESOURCE_LIMIT", 1), ("garbage", 1), ("fail:ACTIVE", 0), ("skip", 0)]
)
def test_a_start_that_the_kernel_never_learns_of(fault: str, owed: int) -> None:
    """It cannot decommission what it does not know; what it sends about a garbled handle is no mistake of its own."""
    b = Told()
    b.begin()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="old", key="sev")
    b.do("launch_start", "source", vm="old", error=errno.EIO, firmware=HWERROR)
    b.sent("LAUNCH_START", 1 if owed else 0, fault=fault, status=0 if fault in ("garbage", "skip") else HWERROR)
    if fault == "garbage":
        b.sent("ACTIVATE", 4711, status=INVALID_GUEST)
        b.sent("DECOMMISSION", 4711, status=INVALID_GUEST)
    b.observe("after", {"source": 1}, guests=owed)
    for agent in ("source", "destination"):
        b.exit(agent)
    b.sent("PLATFORM_STATUS")
    b.observe("end", guests=owed)
    b.fill("end")
    told = b.end()
    contexts = Contexts.of(told)
    assert (len(contexts.owed), contexts.refused, contexts.live) == (owed, [], {})
    assert verdict_of("P9", told).outcome is HELD
    if fault == "garbage":
        records = tuple(r for r in told.records if not (isinstance(r, Firmware) and r.fault))
        assert len(Contexts.of(History(records)).refused) == 1, "without the fault it is"


def test_an_activation_that_lied_leaves_the_context_bound() -> None:
    """The kernel takes back what it thinks has failed, and the firmware refuses: the context has an ASID."""
    b = Told()
    b.sent("LAUNCH_START", 1)
    b.sent("ACTIVATE", 1, fault="lie:INVALID_ASID", status=13)
    b.sent("DECOMMISSION", 1, status=ACTIVE)
    assert len(Contexts.of(b.history()).owed) == 1
    b.sent("LAUNCH_START", 2)
    b.sent("DECOMMISSION", 2, status=ACTIVE)
    assert len(Contexts.of(b.history()).refused) == 1, "the other one is as it should be"


def dead(*, kernel: bool, left: int = 5) -> History:
    """The firmware dies in the middle; `left` contexts can be had after that."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    if kernel:
        b.kernel(f"ccp 0000:00:02.0: sev command 0x23 {TIMED_OUT}")
    else:
        b.sent("GUEST_STATUS", 1, status=-1, fault="dead")
    b.do("guest_status", "source", vm="old", error=errno.ETIMEDOUT)
    for agent in ("source", "destination"):
        b.exit(agent)
    b.records[-1] = msgspec.structs.replace(b.observe("end"), guests=None)
    b.fill("end", sev=left)
    return b.end()


@pytest.mark.parametrize("kernel", [True, False])
def test_the_dead_cannot_be_asked(kernel: bool) -> None:
    verdict = verdict_of("P9", dead(kernel=kernel))
    assert verdict.outcome is UNKNOWN and "the firmware cannot be asked" in verdict.reason
    assert "5 sev ASIDs could be allocated after the run, 8 before it" in verdict.reason
    assert verdict_of("P13", dead(kernel=kernel)).outcome is UNKNOWN
    assert verdict_of("P9", dead(kernel=kernel, left=9)).outcome is DEVIATED, "more than before is no fault's doing"


@pytest.mark.parametrize(("error", "signature"), [(errno.EBUSY, "firmware-gone"), (errno.EBADF, "")])
def test_a_move_under_a_dead_firmware_has_its_own_unknowns(error: int, signature: str) -> None:
    """What it would have said of the guest; a kernel that does not get as far as asking it is another matter."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    b.launch("new", "destination")
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.sent("PLATFORM_STATUS", status=-1, fault="dead")
    b.move("old", "new", "destination")
    b.records[-1] = msgspec.structs.replace(b.observe("after", {"destination": 1}), guests=None)
    b.status("new", "destination", error=error)
    b.ask("old", "source", dead=True)
    told = b.end()
    p4, p5, p13 = (verdict_of(promise, told) for promise in ("P4", "P5", "P13"))
    assert (p4.outcome, p4.signature) == (UNKNOWN, "firmware-gone")
    assert (p13.outcome, p13.signature) == (UNKNOWN, "firmware-gone")
    assert "cannot be asked: it is dead" in p5.reason if signature else p5.outcome is DEVIATED


@pytest.mark.parametrize(("fault", "outcome"), [("garbage", UNKNOWN), ("skip", UNKNOWN), ("delay:1ms", DEVIATED)])
def test_a_count_that_was_tampered_with_says_nothing(fault: str, outcome: object) -> None:
    b = Told()
    b.begin()
    b.exit("source")
    b.exit("destination")
    b.sent("PLATFORM_STATUS", fault=fault)
    b.observe("end", guests=4711)
    b.fill("end")
    verdict = verdict_of("P9", b.end())
    assert verdict.outcome is outcome
    assert verdict.signature == ("" if outcome is UNKNOWN else "firmware-counts-more")  # it is not gone


def test_nothing_is_put_right_where_records_are_missing() -> None:
    told = closed("", "skip", guests=1)
    records = tuple(r for r in told.records if not (isinstance(r, Firmware) and r.command == "DEACTIVATE"))
    assert Contexts.of(History(records)).gaps
    verdict = verdict_of("P9", History(records))
    assert verdict.outcome is UNKNOWN and "not every command was recorded" in verdict.reason


def failed_move(fault: str) -> History:
    """A move is refused, and GUEST_STATUS after it is another than before."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.sent("LAUNCH_START", 1)
    b.status("old", "source")
    b.sent("GUEST_STATUS", 1)
    b.observe("before", {"source": 1})
    b.count("old", "source", 100)
    b.move("old", "new", "destination", error=errno.EBUSY)
    invoke = b.invoke("guest_status", "source", vm="old")
    b.sent("GUEST_STATUS", 1, fault=fault, status=HWERROR if fault.startswith("fail") else 0)
    if fault.startswith("fail"):
        b.done(invoke, "fail", error=errno.EIO, firmware=HWERROR)
    else:
        b.done(invoke, value=STATUS | {"handle": 4711})
    b.observe("after", {"source": 1})
    b.count("old", "source", 200)
    b.ask("old", "source", dead=False)
    return b.finish()


def test_an_answer_that_was_made_up_shows_nothing() -> None:
    for fault in ("fail:HWERROR_PLATFORM", "garbage"):
        told = failed_move(fault)
        for promise in ("P5", "P6"):
            verdict = verdict_of(promise, told)
            assert verdict.outcome is UNKNOWN and "was not asked for its status afterwards" in verdict.reason
        assert verdict_of("P3", told).outcome is HELD, "EIO with a status of the firmware's is no death"
        assert verdict_of("P4", told).outcome is not DEVIATED, "and whoever reaches the firmware owns a context"
    assert verdict_of("P5", failed_move("delay:1ms")).signature == "guest_status-after-failed-move:handle"


def test_what_the_kernel_answers_without_asking_is_its_own_word() -> None:
    """A descriptor that is lost is lost, whatever became of the firmware behind it."""
    b = Told()
    b.sent("GUEST_STATUS", 1, status=-1, fault="dead")
    contexts = Contexts.of(b.history())
    invoke = b.invoke("guest_status", "destination", vm="new")
    for error, honest in ((errno.EBADF, True), (errno.EIO, True), (errno.EBUSY, False), (errno.ETIMEDOUT, False)):
        assert contexts.honest(invoke, b.done(invoke, "fail", error=error)) is honest
    assert not contexts.honest(invoke, b.done(invoke, "fail", error=errno.EIO, firmware=HWERROR))
    assert not contexts.honest(invoke, b.done(invoke))


def flushed(fault: str, *, sent: bool = True) -> History:
    """INIT finds no clean ASID, since the firmware does not flush."""
    b = Told()
    b.begin()
    b.limits("before")
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    invoke = b.invoke("init", "source", vm="old", key="sev")
    if sent:
        b.sent("DF_FLUSH", fault=fault, status=HWERROR)
    b.done(invoke, "fail", error=errno.EBUSY)
    b.limits("after")
    return b.finish()


def test_an_init_that_finds_no_clean_asid() -> None:
    assert verdict_of("P7", flushed("fail:HWERROR_PLATFORM")).outcome is HELD
    assert verdict_of("P7", flushed("fail:HWERROR_PLATFORM", sent=False)).outcome is DEVIATED
    assert verdict_of("P7", flushed("delay:1ms")).outcome is DEVIATED


def init_refused(*, firmware: int, fault: str = "") -> History:
    b = Told()
    b.begin()
    b.limits("before")
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    if fault:
        b.sent("INIT", status=HWERROR, fault=fault)
    b.do("init", "source", vm="old", key="sev", error=errno.EIO, firmware=firmware)
    b.limits("after")
    return b.finish()


def test_an_init_that_the_firmware_refuses_carries_its_status() -> None:
    assert verdict_of("P7", init_refused(firmware=HWERROR, fault="fail:HWERROR_PLATFORM")).outcome is HELD
    assert verdict_of("P7", init_refused(firmware=HWERROR)).outcome is UNKNOWN  # whether it did, nobody saw
    assert verdict_of("P7", init_refused(firmware=0)).signature.startswith("init:EIO-for-")


def statuses_close_together(*, gap: int = 1_000_000, lost: bool = False) -> list[bool]:
    """Which answers to GUEST_STATUS are honest: the first was tampered with, and so short a time before the second."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    b.sent("LAUNCH_FINISH", 1)
    for fault in ("garbage", ""):
        b.status("old", "source")
        b.add(Firmware(t=b.t, order=4 if lost and not fault else 2 + (not fault), command="GUEST_STATUS", status=0,
                       handle=1, fault=fault))  # fmt: skip
        b.t += gap
    told = b.end()
    contexts = Contexts.of(told)
    asked = [(i, done) for i, done in told.operations() if i.f == "guest_status" and done is not None]
    return [contexts.honest(invoke, done) for invoke, done in asked]


def test_answers_are_told_apart_by_their_number_and_not_by_the_clock() -> None:
    assert statuses_close_together() == [False, True]
    assert statuses_close_together(lost=True) == [False, False], "without all numbers there is only the clock"
    assert statuses_close_together(lost=True, gap=20_000_000) == [False, True]


@pytest.mark.parametrize("before", [True, False])
def test_a_command_that_is_matched_with_one_question_was_not_what_another_was_answered(before: bool) -> None:
    """Of two questions a millisecond apart one got an answer that was tampered with, and one came to no firmware."""
    b = Told()
    b.begin()
    b.launch("old", "source", "sev")
    b.sent("LAUNCH_START", 1)
    b.sent("LAUNCH_FINISH", 1)
    for asked in (before, not before):
        invoke = b.invoke("guest_status", "source", vm="old")
        if asked:
            b.done(invoke, value=STATUS)
            b.sent("GUEST_STATUS", 1, fault="garbage")
        else:
            busy = (invoke, b.done(invoke, "fail", error=errno.EBUSY))
    contexts = Contexts.of(b.history())
    assert contexts.matched.orders, "the other one is matched"
    assert contexts.honest(*busy)


def test_a_flush_is_bounded_by_the_commands_that_are_matched() -> None:
    """A DF_FLUSH was failed before the status was answered, and so before the INIT that came a millisecond later."""
    for order, during in ((0, False), (2, True)):
        b = Told()
        b.begin()
        b.launch("old", "source", "sev")
        sent = [("LAUNCH_START", 0, ""), ("LAUNCH_FINISH", 0, "")]
        sent.insert(order, ("DF_FLUSH", HWERROR, "fail:HWERROR"))
        for command, status, fault in sent:
            b.sent(command, 1 if command != "DF_FLUSH" else None, status=status, fault=fault)
        b.do("create", "source", vm="second", kind="sev", vcpus=1, memory="guest")
        invoke = b.invoke("init", "source", vm="second", key="sev")
        done = b.done(invoke, "fail", error=errno.EBUSY)
        assert Contexts.of(b.history()).flush_failed(invoke, done) is during
