# SPDX-License-Identifier: Apache-2.0
"""P8: what never ends, and what a signal does not end."""

from __future__ import annotations

import msgspec
import pytest

from chaos.history.records import Done, Exited, Fault, Firmware, History, Invoke, Overdue
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, moved, shipped, source_killed
from tests.unit.core.doctored import DEVIATED, HELD, KILL_DESTINATION, UNKNOWN, begun, verdict_of


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
    verdict = verdict_of("P8", hung(fault=True, exits=True))
    assert verdict.outcome is HELD and "0.00 s after kill" in verdict.reason
    verdict = verdict_of("P8", hung(complete=False))
    assert verdict.outcome is UNKNOWN and "cut short" in verdict.reason
    assert verdict_of("P8", begun().finish()).outcome is UNKNOWN


def test_p8_a_process_that_ended_by_itself_shows_nothing() -> None:
    verdict = verdict_of("P8", hung(exits=True, status=1))
    assert verdict.outcome is UNKNOWN
    assert "by itself, with status 1" in verdict.reason


def outlived(
    *, kept: float = 30.0, release: float | None = None, kind: str = "pause", fault: str = "kill", guest_of: str = ""
) -> Builder:
    """What the runner writes of a move whose process was killed and went `kept` seconds later: it asks for the kill's
    evidence, gives the step up, takes the vCPU out or undoes what it has to (`release` seconds after the kill), and
    then the old signal is delivered. The process `guest_of` has another guest."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    if guest_of:
        b.launch("own", guest_of, "sev")
    b.do("run", "source", vm="old", every=0)
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold(move)
    struck = b.add(Fault(t=b.tick(), fault=fault, event="apply", step=8, target="destination", ends=("destination",)))
    if release is not None:
        b.t = struck.t + int(release * 1e9)
        if kind in ("pause", "close"):
            b.do(kind, "source", vm="old")
        elif kind == "pause-another":
            b.do("pause", "source", vm="another")
        elif kind == "released":
            b.release("here")
        elif kind.startswith("undo"):
            b.add(Fault(t=b.t, fault="something", event="undo", step=7, target="old", lets_go=kind == "undo"))
        else:
            b.exited("source", -9)
    b.t = max(b.t, struck.t + int(kept * 1e9))
    b.exited("destination", -9)
    b.done(move, "info")
    return b


def test_p8_a_signal_that_did_not_end_a_move_as_the_runner_writes_it() -> None:
    """SIGKILL is sent, nobody dies, the runner clears up, and then everything is gone."""
    b = outlived(release=29.9)
    struck = next(r for r in b.records if isinstance(r, Fault))
    evidence = msgspec.structs.replace(struck, event="evidence", struck=False, ends=(), detail="it still runs")
    b.add(msgspec.structs.replace(evidence, t=b.tick()))
    verdict = verdict_of("P8", b.end(complete=False, reason="step 9 (join): waited 30 s for move to end"))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "signal-did-not-end:move")
    assert "ended 30.0 s after kill struck destination" in verdict.reason
    assert "may have been let go before, after 29.9 s" in verdict.reason
    assert (verdict.expected, verdict.seen) == ("an answer, or the end of its process", "neither in time")
    kinds = [type(b.records[number]) for number in verdict.records]
    assert kinds == [Invoke, Fault, Invoke, Exited, Done]  # the second is what may have let it go


@pytest.mark.parametrize("kind", ["pause", "close", "released", "undo", "exited"])
@pytest.mark.parametrize(("release", "outcome"), [(0.01, UNKNOWN), (2.0, DEVIATED)])
def test_p8_what_was_let_go_first(kind: str, release: float, outcome: Outcome) -> None:
    verdict = verdict_of("P8", outlived(kept=release + 0.1, release=release, kind=kind).end())
    assert verdict.outcome is outcome
    if outcome is UNKNOWN:
        assert "nobody can say which of the two ended it" in verdict.reason


@pytest.mark.parametrize("kind", ["pause-another", "undo-that-lets-nothing-go"])
def test_p8_what_holds_no_move_was_not_let_go_before_it_ended(kind: str) -> None:
    assert verdict_of("P8", outlived(kept=0.4, release=0.2, kind=kind).end()).outcome is HELD


@pytest.mark.parametrize(("kept", "outcome"), [(0.2, HELD), (9.0, HELD), (11.0, DEVIATED)])
def test_p8_how_long_it_took(kept: float, outcome: Outcome) -> None:
    verdict = verdict_of("P8", outlived(kept=kept).end())
    assert verdict.outcome is outcome
    assert f"{kept:.1f}" in verdict.reason


@pytest.mark.parametrize(
    ("fault", "fatal", "outcome"),
    [("kill", None, DEVIATED), ("shoot", True, DEVIATED), ("shoot", None, HELD), ("kill", False, HELD)],
)
def test_p8_whether_a_fault_sends_a_fatal_signal_is_what_it_says_of_itself(
    fault: str, fatal: bool | None, outcome: Outcome
) -> None:
    """Of runs that do not say it, the name tells."""
    b = outlived(kept=11.0, fault=fault)
    b.records = [msgspec.structs.replace(r, fatal=fatal) if isinstance(r, Fault) else r for r in b.records]
    assert verdict_of("P8", b.end()).outcome is outcome


def test_p8_what_comes_after_the_end_of_the_process_let_nothing_go() -> None:
    b = outlived(kept=0.2)
    b.do("pause", "source", vm="old")
    assert verdict_of("P8", b.end()).outcome is HELD


def test_p8_a_process_that_had_more_to_wait_for() -> None:
    b = outlived(kept=20.0)
    invoke = next(r for r in b.records if isinstance(r, Invoke) and r.f == "move")
    other = Invoke(t=invoke.t, op=900, f="guest_status", agent="destination", pid=0, step=-1, args={"vm": "new"})
    b.records.insert(invoke.seq, other)
    b.records = [msgspec.structs.replace(record, seq=seq) for seq, record in enumerate(b.records)]
    verdict = verdict_of("P8", b.end())
    assert verdict.outcome is UNKNOWN
    assert "also had guest_status of new under way" in verdict.reason


@pytest.mark.parametrize(
    ("guest_of", "fault", "outcome"),
    [
        ("destination", "delay:12s", UNKNOWN),
        ("destination", "", DEVIATED),
        ("source", "delay:12s", DEVIATED),
        ("", "delay:12s", DEVIATED),
    ],
)
def test_p8_a_process_that_had_a_guest_to_give_up_may_have_waited_for_a_slow_firmware(
    guest_of: str, fault: str, outcome: Outcome
) -> None:
    b = outlived(kept=20.0, guest_of=guest_of)
    b.add(Firmware(t=b.tick(), order=0, command="DECOMMISSION", status=0, handle=1, fault=fault))
    verdict = verdict_of("P8", b.end())
    assert verdict.outcome is outcome
    assert ("also had a guest of its own to give up" in verdict.reason) == (outcome is UNKNOWN)


@pytest.mark.parametrize(
    ("seconds", "complete", "outcome"), [(11, False, DEVIATED), (9, False, UNKNOWN), (9, True, DEVIATED)]
)
def test_p8_a_process_that_never_went_has_outlived_its_signal_once_it_had_the_time(
    seconds: int, complete: bool, outcome: Outcome
) -> None:
    """Where the run ended before that, somebody may have stopped looking too early."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.invoke("move", "destination", vm="new", source="old")
    b.kill_begins("destination")
    b.t += seconds * 1_000_000_000
    verdict = verdict_of("P8", b.end(complete=complete))
    assert verdict.outcome is outcome
    assert verdict.signature == ("signal-did-not-end:move" if outcome is DEVIATED else "")


@pytest.mark.parametrize(("ends", "outcome"), [(("destination",), UNKNOWN), (("source", "destination"), HELD)])
def test_p8_a_process_that_the_same_fault_ends_is_nothing_that_was_let_go(
    ends: tuple[str, ...], outcome: Outcome
) -> None:
    b = outlived(kept=0.4, release=0.2, kind="exited")
    b.records = [msgspec.structs.replace(r, ends=ends) if isinstance(r, Fault) else r for r in b.records]
    assert verdict_of("P8", b.end()).outcome is outcome


@pytest.mark.parametrize("event", ["apply", "withheld"])
def test_p8_a_fault_that_is_told_of_is_no_excuse_for_a_process_that_it_did_not_strike(event: str) -> None:
    """Only one of which nobody knows whom it struck may have ended the process."""
    b = begun()
    b.launch("old", "source", "sev")
    move = b.invoke("mirror", "source", vm="another", source="old")
    b.kill_begins("destination", step=8)
    b.records[-1] = msgspec.structs.replace(b.records[-1], event=event)
    b.exited("source", -9)
    b.done(move, "info")
    verdict = CHECKERS["P8"](shipped(KILL_DESTINATION), b.end())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "never-ended:mirror")


@pytest.mark.parametrize(("struck", "signature"), [(False, "never-ended:move"), (True, "signal-did-not-end:move")])
def test_p8_an_oom_killer_may_find_nobody(struck: bool, signature: str) -> None:
    """Only its evidence says that somebody was sent a signal."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.invoke("move", "destination", vm="new", source="old")
    fault = b.add(Fault(t=b.tick(), fault="oom", event="apply", step=8, target="destination", ends=("destination",)))
    b.add(msgspec.structs.replace(fault, t=b.tick(), event="evidence", struck=struck, ends=()))
    assert verdict_of("P8", b.end()).signature == signature


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


HEADLESS = "kill-cgroup-after-first-thread"
SURVIVED = "kill-cgroup-did-not-end:process-without-its-first-thread"


def survived(
    *, seconds: float = 31.0, first: bool = True, exits: bool = False, f: str = "close", complete: bool = True
) -> Builder:
    """kill-cgroup-after-first-thread where the kernel passes over the process: the move goes on when the vCPU is out,
    and `seconds` after the signal the process does what it is told."""
    b = Builder(HEADLESS)
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.add(Fault(t=b.tick(), fault="thread-exit", event="evidence", step=4, target="new", struck=first))
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold(move)
    killed = Fault(t=b.tick(), fault="kill-cgroup", event="apply", step=9, target="tenant", ends=("destination",))
    killed = b.add(msgspec.structs.replace(killed, fatal=True))
    if exits:
        b.exited("destination", -9)
        b.done(move, "info")
        b.spawn("destination")  # another process of that name
    b.t = killed.t + int(seconds * 1e9)
    b.add(msgspec.structs.replace(killed, t=b.tick(), event="evidence", struck=False, ends=()))
    b.do("pause", "source", vm="old")
    if not exits:
        b.done(move)
    if f:
        b.do(f, "destination", vm="new")
    b.end(complete=complete, reason="" if complete else "step 9 (fault): it could not be applied")
    return b


def test_p8_a_process_that_lives_on_was_not_ended_by_its_signal() -> None:
    verdict = CHECKERS["P8"](shipped(HEADLESS), survived().history())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, SURVIVED)
    assert "kill-cgroup struck destination, and 31.0 s later it began close of new" in verdict.reason
    assert (verdict.expected, verdict.seen) == ("the end of its process", "it lives")


def test_p8_one_whose_first_thread_lives_is_another_matter() -> None:
    """No finding about the one may excuse the other."""
    verdict = CHECKERS["P8"](shipped(HEADLESS), survived(first=False).history())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "kill-cgroup-did-not-end:process")


@pytest.mark.parametrize(
    "told",
    [
        survived(seconds=9.0),  # it may have been on its way out
        survived(exits=True),
        survived(f=""),  # nobody has seen it do anything any more
        survived(f="memlock"),  # which is done to it
        survived(complete=False),
    ],
    ids=["soon", "ended", "silent", "passive", "cut-short"],
)
def test_p8_only_a_process_that_is_seen_to_live_does(told: Builder) -> None:
    assert CHECKERS["P8"](shipped(HEADLESS), told.history()).outcome is not DEVIATED
