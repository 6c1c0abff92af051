# SPDX-License-Identifier: Apache-2.0
"""P4: two owners, none, and a firmware that counts otherwise."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Header, Observation, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.ledger.firmware_contexts import GONE
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped, two_owners
from tests.unit.core.doctored import (
    KILL_SOURCE,
    MOVE,
    answered,
    chain,
    check,
    failed,
    move_unanswered,
    replaced,
)


def test_p4_in_a_chain() -> None:
    b = chain()
    b.status("a", "source", error=errno.EIO)
    b.status("b", "destination", error=errno.EIO)
    verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_p4_an_answer_that_was_held_past_the_move_tells_of_the_time_before() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    early = b.invoke("guest_status", "source", vm="old")
    move = b.invoke("move", "destination", vm="new", source="old")
    answered_at = b.tick()
    b.done(move)
    b.records[-1] = msgspec.structs.replace(b.done(early), ended=answered_at)
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    b.ask("old", "source", dead=True)
    verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.KEPT, verdict.reason


def test_p4_nobody_owns_the_context() -> None:
    verdict = check("P4", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.ENOTTY))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "none-owns")


def test_p4_two_own_the_context() -> None:
    verdict = CHECKERS["P4"](shipped(MOVE), two_owners())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "two-own")


@pytest.mark.parametrize(("guests", "signature"), [(0, "firmware-counts-fewer"), (2, "firmware-counts-more")])
def test_p4_the_firmware_disagrees(guests: int, signature: str) -> None:
    verdict = check("P4", MOVE, replaced(Observation, {"label": "after"}, guests=guests))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)


def test_p4_ebadf_means_owning() -> None:
    verdict = check("P4", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.EBADF))
    assert verdict.outcome is Outcome.KEPT


def test_p4_a_destination_that_lives_is_asked_after_a_failed_move() -> None:
    b = failed()
    assert "new was not asked" in CHECKERS["P4"](shipped(MOVE), b.history()).reason
    b.status("new", "destination", error=errno.ENOTTY)
    assert CHECKERS["P4"](shipped(MOVE), b.history()).outcome is Outcome.KEPT


def test_p4_a_move_that_never_ended() -> None:
    verdict = check("P4", MOVE, move_unanswered())
    assert "who owns the context after it cannot be asked" in verdict.reason


def between_two_guests(*, handle: int, asked: bool = True) -> Verdict:
    """A move into a VM that has a context of its own, refused; then that VM tells which one it has."""
    b = Builder()
    b.begin()
    for vm, agent, own in (("old", "source", 1), ("full", "destination", 2)):
        b.launch(vm, agent, "sev")
        b.done(b.invoke("guest_status", agent, vm=vm), value={"handle": own, "policy": 0, "state": 3})
    b.observe("before", {"source": 1, "destination": 1})
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "full", "destination", error=errno.EINVAL)
    b.observe("after", {"source": 1, "destination": 1})
    b.done(b.invoke("guest_status", "source", vm="old"), value={"handle": 1, "policy": 0, "state": 3})
    b.do("launch_measure", "destination", vm="full")  # which says nothing of which context it is
    if asked:
        b.done(b.invoke("guest_status", "destination", vm="full"), value={"handle": handle, "policy": 0, "state": 3})
    return CHECKERS["P4"](shipped(MOVE), b.finish())


def test_p4_a_destination_that_had_a_context_keeps_that_one() -> None:
    verdict = between_two_guests(handle=2)
    assert verdict.outcome is Outcome.KEPT, verdict.reason
    assert "full owns its own (handle 2), as before" in verdict.reason
    verdict = between_two_guests(handle=1)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "another-context")
    verdict = between_two_guests(handle=2, asked=False)
    assert verdict.outcome is Outcome.UNKNOWN and "full was not asked for its own context after it" in verdict.reason


def replayed(*then: int) -> Builder:
    """A move, and the same again, refused; GUEST_STATUS of the destination answers so before and after the second."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination")
    b.status("new", "destination", error=then[0])
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination", error=errno.EINVAL)
    b.observe("after", {"destination": 1})
    b.status("new", "destination", error=then[1])
    b.ask("old", "source", dead=True)
    return b


def test_replayed_moves() -> None:
    """The source is dead from the first on, and the destination owns what it owned; P3 and P6 know that too."""
    for promise in ("P3", "P4", "P6"):
        b = replayed(0, 0)
        b.launch("other", "destination")
        b.do("mirror", "destination", error=errno.EINVAL, vm="other", source="new")
        assert CHECKERS[promise](shipped(MOVE), b.finish()).outcome is Outcome.KEPT
    verdict = CHECKERS["P4"](shipped(MOVE), replayed(errno.EBADF, errno.EBADF).finish())
    assert verdict.outcome is Outcome.KEPT and "new owns its own (GUEST_STATUS: EBADF)" in verdict.reason
    verdict = CHECKERS["P4"](shipped(MOVE), replayed(0, errno.EBADF).finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "another-context")
    b = replayed(0, 0)
    b.do("launch_measure", "source", vm="old")
    assert CHECKERS["P3"](shipped(MOVE), b.finish()).outcome is Outcome.BROKEN


def test_p4_where_there_was_nothing_nobody_has_to_own_it() -> None:
    for error, outcome in ((errno.ENOTTY, Outcome.KEPT), (0, Outcome.BROKEN)):
        b = Builder()
        b.begin()
        b.launch("other", "source", "sev")
        b.launch("bare", "source")
        b.launch("new", "destination")
        b.do("send_fd", "source", vm="bare", to="destination")
        b.move("bare", "new", "destination", error=errno.EINVAL)
        b.observe("after", {"source": 1})
        b.status("new", "destination", error=error)
        verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
        assert verdict.outcome is outcome, verdict.reason


def killed_later(*, seen: bool) -> Builder:
    """A move, and then the source's process is killed, which nobody has asked anything since."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination", error=errno.EBADF)  # which does not reach the firmware
    b.kill("source")
    if seen:
        b.observe("later", {"destination": 1})
    return b


def test_p4_a_process_that_died_later_has_answered_nothing() -> None:
    verdict = CHECKERS["P4"](shipped(MOVE), killed_later(seen=False).finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, "other-process-dead"), verdict.reason
    verdict = CHECKERS["P4"](shipped(MOVE), killed_later(seen=True).finish())
    assert verdict.outcome is Outcome.KEPT and "took no context along" in verdict.reason
    b = killed_later(seen=False)
    b.observe("later", {"destination": 1}, guests=0)  # two had it, and the firmware was told that it is gone
    verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "firmware-counts-fewer")


def test_p4_that_a_process_died_in_the_move_does_not_say_what_it_owned() -> None:
    """A descriptor that it had sent keeps its VM; that the firmware counts the guest still, after that, says it."""
    blind = replaced(Observation, {}, guests=None)
    lost = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    verdict = check("P4", KILL_SOURCE, lambda record: lost(blind(record) or record))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "the process of old died, before it was asked whether it owns a context as well" in verdict.reason
    assert "the process of old died and took no context along" in check("P4", KILL_SOURCE, lost).reason


def test_p4_a_vm_that_has_lost_its_descriptor_cannot_be_asked() -> None:
    b = failed()
    b.do("lose_fd", "destination", vm="new", fd="vm")
    verdict = CHECKERS["P4"](shipped(MOVE), b.history())
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, "descriptor-lost")


def test_p4_a_context_that_is_moved_into_a_vm_that_was_dead_has_no_owner() -> None:
    """Not as in finding 0007, where it died while the move was under way."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.move("new", "old", "source")
    b.observe("after", {"source": 1})
    b.status("old", "source", error=errno.EIO)
    verdict = CHECKERS["P4"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.BROKEN
    assert "owner-was-dead" in verdict.signature.split("+"), verdict


def test_p4_a_shared_host_counts_guests_of_others() -> None:
    def change(record: Record) -> Record:
        return msgspec.structs.replace(record, shared=True) if isinstance(record, Header) else record

    assert check("P4", MOVE, change).signature == "skipped:guests-of-others"


@pytest.mark.parametrize(("lost", "signature"), [(True, GONE), (False, "")])
def test_p4_an_owner_that_did_not_say_is_excused_by_a_lost_firmware_alone(lost: bool, signature: str) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    b.observe("after", {"destination": 1})
    if lost:
        b.kernel("ccp 0000:00:05.0: sev command 0x1 timed out, disabling PSP")
    silent = b.status("new", "destination", error=errno.ENODEV if lost else errno.EBUSY)
    verdict = CHECKERS["P4"](shipped(MOVE), b.history())
    assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, signature)
    assert silent.seq in verdict.records and "says which of new and old owns the context" in verdict.reason


def test_p4_that_the_firmware_counts_the_guest_while_the_move_is_not_over_does_not_say_who_has_it() -> None:
    def told(*, late: bool) -> str:
        b = Builder()
        b.begin()
        b.launch("old", "source", "sev")
        b.launch("new", "destination")
        move = b.invoke("move", "destination", vm="new", source="old")
        b.hold(move)
        b.kill("source")
        if not late:
            b.observe("held", {"source": 1, "destination": 1}, guests=1)
        b.done(move)
        b.status("new", "destination", error=errno.EBADF)
        if late:
            b.observe("after", {"destination": 1})
        return CHECKERS["P4"](shipped(MOVE), b.history()).reason

    assert "the process of old died and took no context along" in told(late=True)
    assert "the process of old died, before it was asked" in told(late=False)


def test_p4_a_move_that_the_kernel_began_after_this_one_leaves_a_moment_between_them() -> None:
    """It may have been called for earlier; that the source owned nothing in between was then to be asked."""
    for overlaps in (False, True):
        b = Builder()
        b.begin()
        b.launch("old", "source", "sev")
        b.launch("third", "source", "sev")
        b.launch("new", "destination")
        first = b.invoke("move", "destination", vm="new", source="old")
        second = b.invoke("move", "source", vm="old", source="third")
        ended = b.done(first).ended
        given = b.done(second)
        assert second.t < ended < given.began
        if overlaps:
            b.records[-1] = msgspec.structs.replace(given, began=ended - 1)
        reason = CHECKERS["P4"](shipped(MOVE), b.history()).reason
        assert ("old was given a context meanwhile" in reason) is overlaps, reason
