# SPDX-License-Identifier: Apache-2.0
"""P5 looks at every answer and every pause after a move, until the context moves on."""

from __future__ import annotations

from errno import EBADF, EBUSY, EFAULT, EINVAL, ENODEV, ENOTTY, EPERM, ETIMEDOUT

import pytest

from chaos.history.records import Value
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import ALL, Builder, changed, guest_moved
from tests.unit.core.doctored import MOVE, answered, failed, verdict_of, without_operation

HANDLE_2: dict[str, Value] = {"handle": 2, "policy": 0, "state": 3}


def moved(*, status_error: int = 0) -> Builder:
    """A guest that was moved, counted and asked for its status."""
    b = guest_moved()
    b.count("new", "destination", 203)
    b.status("new", "destination", error=status_error)
    return b


def pause(b: Builder, vm: str, agent: str, **said: Value) -> None:
    b.done(b.invoke("pause", agent, vm=vm), value={"last_ticks": [7], **said})


# -- T7: a refusal by another errno says nothing of who owns, and is a refusal ------------------------------


@pytest.mark.parametrize("error", [EPERM, EFAULT, EINVAL, ETIMEDOUT, ENODEV, EBUSY])
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_destination_that_refuses_every_command_breaks_p5_and_says_nothing_to_p4(
    error: int, asked_before: bool
) -> None:
    def verdict(promise: str) -> Verdict:
        refusing = answered("guest_status", "new", outcome="fail", errno=error, value={})
        history = changed(ALL[MOVE](), refusing)
        unasked = changed(history, without_operation("guest_status", "old"))
        return verdict_of(promise, history if asked_before else unasked)

    p4, p5 = verdict("P4"), verdict("P5")
    assert p4.outcome is Outcome.UNKNOWN and "no GUEST_STATUS after the move says which" in p4.reason, p4.reason
    assert p5.outcome is Outcome.BROKEN and p5.signature.startswith("guest_status-after-move:E"), p5.reason


def test_ebadf_of_a_context_that_was_never_moved_says_nothing_of_who_owns_it() -> None:
    b = failed(status_error=EBADF)
    b.status("new", "destination", error=25)
    verdict = verdict_of("P4", b.finish())
    assert verdict.outcome is Outcome.UNKNOWN and "(old: EBADF)" in verdict.reason


def test_ebadf_of_a_process_that_lost_its_dev_sev_is_not_the_findings() -> None:
    b = moved()
    b.records = b.records[:-2]
    b.do("lose_fd", "destination", vm="new", fd="sev")
    b.status("new", "destination", error=EBADF)
    assert verdict_of("P4", b.finish()).outcome is Outcome.UNKNOWN


# -- T8: every GUEST_STATUS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, EBADF])
@pytest.mark.parametrize(
    ("error", "value", "signature"),
    [
        (EPERM, {}, "guest_status-later-after-move:EPERM"),
        (0, HANDLE_2, "guest_status-later-after-move:handle"),
        (0, {"handle": 1, "policy": 0, "state": 1}, "guest_status-later-after-move:state"),
    ],
)
def test_a_later_status_that_differs_is_broken_by_itself(
    first: int, error: int, value: dict[str, Value], signature: str
) -> None:
    b = moved(status_error=first)
    before = ["guest_status-after-move:EBADF"] if first else []
    assert verdict_of("P5", b.history()).signature == "".join(before)
    b.done(b.invoke("guest_status", "destination", vm="new"), "fail" if error else "ok", error=error, value=value)
    verdict = verdict_of("P5", b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "+".join([*before, signature]))


def test_a_later_ebadf_is_not_that_of_the_finding() -> None:
    b = moved()
    b.status("new", "destination", error=EBADF)
    assert verdict_of("P5", b.finish()).signature == "guest_status-later-after-move:EBADF"
    b = moved(status_error=EBADF)
    b.status("new", "destination", error=EBADF)
    assert verdict_of("P5", b.finish()).signature == "guest_status-after-move:EBADF"


def test_a_later_status_after_a_failed_move() -> None:
    b = failed()
    b.done(b.invoke("guest_status", "source", vm="old"), value=HANDLE_2)
    assert verdict_of("P5", b.history()).signature == "guest_status-later-after-failed-move:handle"
    b = failed()
    b.status("old", "source", error=EINVAL)
    assert "guest_status-after-failed-move:EINVAL" in verdict_of("P6", b.finish()).signature.split("+")


def test_a_launch_that_goes_on_after_the_move_changes_the_state_and_nothing_else() -> None:
    b = moved()
    b.do("launch_finish", "destination", vm="new")
    b.done(b.invoke("guest_status", "destination", vm="new"), value={"handle": 1, "policy": 0, "state": 4})
    assert verdict_of("P5", b.history()).outcome is Outcome.KEPT
    b.done(b.invoke("guest_status", "destination", vm="new"), value={"handle": 2, "policy": 0, "state": 4})
    assert verdict_of("P5", b.finish()).signature == "guest_status-later-after-move:handle"


# -- T5: what the vCPUs say when they are taken out ---------------------------------------------------------

DAMAGE = [
    ({"astray": [0]}, "astray"),
    ({"torn": [0]}, "torn"),
    ({"ended": "KVM_EXIT_SHUTDOWN"}, "stopped"),
]


def signed(how: str, when: str) -> str:
    return f"{how}-{when}{':KVM_EXIT_SHUTDOWN' * (how == 'stopped')}"


@pytest.mark.parametrize(("said", "how"), DAMAGE)
def test_a_guest_found_broken_when_it_is_taken_out_after_the_move(said: dict[str, Value], how: str) -> None:
    b = moved()
    pause(b, "new", "destination")
    assert verdict_of("P5", b.history()).outcome is Outcome.KEPT
    pause(b, "new", "destination", **said)
    verdict = verdict_of("P5", b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signed(how, "after-move"))


@pytest.mark.parametrize(("said", "how"), DAMAGE)
def test_a_guest_found_broken_after_a_failed_move(said: dict[str, Value], how: str) -> None:
    b = failed()
    pause(b, "old", "source", **said)
    assert verdict_of("P5", b.finish()).signature == signed(how, "after-failed-move")


def test_the_damage_of_the_first_move_is_not_the_seconds() -> None:
    """Seen at the pause before the second: broken for the first, and unknown for the second."""
    b = moved()
    b.launch("last", "source")
    pause(b, "new", "destination", astray=[0])
    b.move("new", "last", "source")
    b.give_state("last", "source")
    b.status("last", "source")
    b.count("last", "source", 300)
    verdict = verdict_of("P5", b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "astray-after-move+astray-before-move")


def test_a_guest_that_was_not_given_its_registers_is_no_witness_at_its_pause() -> None:
    b = guest_moved(registers=False)
    b.status("new", "destination")
    pause(b, "new", "destination", torn=[0])
    assert verdict_of("P5", b.finish()).outcome is Outcome.UNKNOWN


# -- VMs get the names of those that were closed: every round of a sweep is a guest of its own ---------------------


def round_of(b: Builder, handle: int, *, ticks: tuple[int, int] | None, told: int = 0) -> None:
    """A guest is launched, moved and closed. `told` is the handle that the destination tells, if another."""
    said: dict[str, Value] = {"handle": handle, "policy": 0, "state": 3}
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.status("new", "destination", error=ENOTTY)
    if ticks is not None:
        b.count("old", "source", ticks[0])
    b.done(b.invoke("guest_status", "source", vm="old"), value=said)
    b.move("old", "new", "destination")
    b.give_state("new", "destination")
    if ticks is not None:
        b.count("new", "destination", ticks[1])
    b.done(b.invoke("guest_status", "destination", vm="new"), value={**said, "handle": told or handle})
    b.do("close", "source", vm="old")
    b.do("close", "destination", vm="new")


def test_a_guest_is_not_compared_with_one_whose_vms_had_the_same_names() -> None:
    b = Builder()
    b.begin()
    round_of(b, 1, ticks=(100, 200))
    round_of(b, 2, ticks=(5, 9))
    verdict = verdict_of("P5", b.finish())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


@pytest.mark.parametrize("uncounted", [0, 1])
def test_what_another_guest_of_that_name_counted_is_no_answer(uncounted: int) -> None:
    b = Builder()
    b.begin()
    for turn in (0, 1):
        round_of(b, turn + 1, ticks=None if turn == uncounted else (5 + turn, 10 + turn))
    verdict = verdict_of("P5", b.finish())
    assert verdict.outcome is Outcome.UNKNOWN and "was not seen to count" in verdict.reason, verdict.reason


@pytest.mark.parametrize("wrong", [0, 1])
def test_each_of_them_is_compared_with_itself(wrong: int) -> None:
    b = Builder()
    b.begin()
    for turn in (0, 1):
        round_of(b, turn + 1, ticks=(5, 9), told=2 - turn if turn == wrong else 0)
    verdict = verdict_of("P5", b.finish())
    assert verdict.outcome is Outcome.BROKEN and verdict.signature == "guest_status-after-move:handle", verdict.reason


def test_a_guest_that_comes_back_to_a_name_is_the_same_guest() -> None:
    b = moved()
    b.do("close", "source", vm="old")
    b.launch("old", "source")
    b.move("new", "old", "source")
    b.give_state("old", "source")
    b.count("old", "source", 150)
    b.status("old", "source")
    verdict = verdict_of("P5", b.finish())
    assert verdict.outcome is Outcome.BROKEN and verdict.signature == "counter-stopped-after-move", verdict.reason
