# SPDX-License-Identifier: Apache-2.0
"""The ledger and moves: under way, held, killed, failed, and what cannot have been."""

from __future__ import annotations

import errno

import pytest

from chaos.history.records import Invoke
from chaos.judge.ledger.replay import replay
from tests.unit.core.build import Builder, destination_killed, moved
from tests.unit.core.on_ledger import held, ledger, payers, two


def test_a_move_takes_the_charge_along() -> None:
    b = two()
    b.move("old", "new", "destination")
    assert payers(ledger(b)) == {("destination",)}
    b.observe("after", {"source": 1, "destination": 1}, guests=1)
    wrong = ledger(b).mismatches("charge")
    assert [(m.where, m.key, set(m.expected), m.seen) for m in wrong] == [
        (".", "sev", {1}, 2),
        ("source", "sev", {0}, 1),
    ]


def test_a_move_that_failed_changes_nothing() -> None:
    b = two()
    b.move("old", "new", "destination", error=errno.EBUSY)
    assert payers(ledger(b)) == {("source",)}


def test_a_move_within_a_cgroup_charges_nothing_in_between() -> None:
    b = Builder()
    b.spawn("source", "shared")
    b.spawn("destination", "shared")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.invoke("move", "destination", vm="new", source="old")
    assert {world.charges["shared", "sev"] for world in ledger(b).worlds} == {1}


def test_a_move_within_a_cgroup_that_waits_has_chosen_who_pays() -> None:
    """Wherever its process goes meanwhile: the cgroup was asked for before the vCPUs were waited for."""
    b = Builder()
    b.spawn("source", "shared")
    b.spawn("destination", "shared")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold(move)
    b.do("enter", "destination", cgroup="destination")
    b.done(move)
    assert payers(ledger(b)) == {("shared",)}
    b.observe("after", {"shared": 1}, guests=1)
    assert not ledger(b).mismatches("charge")
    b.observe("elsewhere", {"shared": 0, "destination": 1}, guests=1)
    assert {m.where for m in ledger(b).mismatches("charge")} == {"shared", "destination"}


def test_a_move_under_way_may_have_happened_or_not() -> None:
    b = two()
    b.invoke("move", "destination", vm="new", source="old")
    seen = {(w.charges["source", "sev"], w.charges["destination", "sev"]) for w in ledger(b).worlds}
    assert seen == {(1, 0), (1, 1), (0, 1)}


def test_a_move_that_waits_for_a_vcpu_has_charged_and_has_not_happened() -> None:
    b = two()
    b.hold(b.invoke("move", "destination", vm="new", source="old"))
    seen = {(w.charges["source", "sev"], w.charges["destination", "sev"]) for w in ledger(b).worlds}
    assert seen == {(1, 1)}
    b.observe("held", {"destination": 1})
    assert {m.where for m in ledger(b).mismatches("charge")} == {".", "source"}


def test_counters_that_fit_one_by_one_and_not_together_are_noticed() -> None:
    b = two()
    b.hold(b.invoke("move", "destination", vm="new", source="old"))
    b.observe("held", {"source": 1, "destination": 1, ".": 1}, guests=1)
    wrong = ledger(b).mismatches("charge")
    assert [(m.where, m.expected, m.seen) for m in wrong] == [(".", frozenset({2}), 1)]


def test_without_a_hold_nothing_is_concluded_while_a_move_is_under_way() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.observe("meanwhile", {"source": 1, ".": 2}, guests=1)  # the destination was read before it was charged
    b.done(invoke)
    assert ledger(b).mismatches("charge") == ()
    b.observe("after", {"destination": 1})
    assert ledger(b).mismatches("charge") == ()


def test_a_destination_that_was_killed_gives_the_charge_back() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    b.kill("destination")
    done = b.done(invoke, "info")
    replayed = ledger(b)
    assert payers(replayed) == {("source",), ()}  # it may have happened at the last moment, and died with its owner
    assert replayed.happened(invoke, done) is None
    b.observe("after", {"source": 1})
    replayed = ledger(b)
    assert payers(replayed) == {("source",)}
    assert replayed.happened(invoke, done) is False


def test_a_charge_that_stays_with_a_killed_destination_is_noticed() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.kill("destination")
    b.done(invoke, "info")
    b.observe("after", {"source": 1, "destination": 1}, guests=1)
    assert {m.where for m in ledger(b).mismatches("charge")} == {".", "destination"}


def test_a_source_that_was_killed_leaves_the_context_to_the_move() -> None:
    b = two()
    b.do("send_fd", "source", vm="old", to="destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    b.kill("source")
    b.observe("meanwhile", {"source": 1, "destination": 1}, guests=1)
    assert ledger(b).mismatches("charge") == ()
    b.done(invoke)
    assert payers(ledger(b)) == {("destination",)}


def test_a_failure_after_a_charge_that_was_seen_to_move_is_a_contradiction() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    b.done(invoke, "fail", error=errno.EINTR)
    b.observe("after", {"destination": 1})
    wrong = ledger(b).mismatches("charge", "answer")
    assert {m.where for m in wrong} == {"source", "destination"}


def test_a_failure_that_cannot_be_is_named() -> None:
    """GUEST_STATUS shows that the context has moved; then the move says it failed."""
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.status("old", "source", error=errno.ENOTTY)
    b.done(invoke, "fail", error=errno.EBUSY)
    wrong = ledger(b).mismatches("charge", "owner", "answer")
    assert [(m.kind, m.where, m.key) for m in wrong] == [("answer", "new", "move")]


def test_a_move_keeps_its_source_open_however_it_got_the_descriptor() -> None:
    b, invoke = held()  # nothing was sent: it may have come by pidfd_getfd
    b.kill("source")
    b.observe("meanwhile", {"source": 1, "destination": 1}, guests=1)
    b.done(invoke)
    b.observe("after", {"destination": 1})
    assert ledger(b).mismatches("charge", "guests") == ()
    assert ledger(b).lost == ""


def test_a_descriptor_that_a_move_needs_is_not_closed_under_it() -> None:
    b = two()
    b.do("send_fd", "source", vm="old", to="destination")
    b.hold(b.invoke("move", "destination", vm="new", source="old"))
    b.kill("source")
    b.observe("meanwhile")
    assert {m.where for m in ledger(b).mismatches("charge")} == {"."}  # the context lives, here or there


def test_a_move_into_a_vm_that_owns_a_context_cannot_succeed() -> None:
    b = two()
    b.launch("other", "destination", "sev")
    b.move("old", "other", "destination")
    assert "move of other succeeded" in ledger(b).lost


@pytest.mark.parametrize("by", ["invoke", "ask", "count"])
def test_what_may_let_a_move_go_ends_the_hold(by: str) -> None:
    b, _ = held()
    if by == "invoke":
        b.invoke("pause", "source", vm="old")
    elif by == "ask":
        b.ask("old", "source", dead=False)
    else:
        b.count("old", "source", 5)
    b.observe("gone on", {"destination": 1})
    assert ledger(b).mismatches("charge") == ()


def test_a_move_gives_back_what_it_took_before_it_says_that_it_failed() -> None:
    b, _ = held()
    b.invoke("pause", "source", vm="old")
    b.observe("failing", {"source": 1})
    assert ledger(b).mismatches("charge") == ()


@pytest.mark.parametrize("vm", ["old", "new"])
def test_a_move_holds_both_files_whoever_closes_them(vm: str) -> None:
    """Both in one process, which closes one under the move."""
    b = Builder()
    b.spawn("source")
    b.launch("old", "source", "sev")
    b.launch("new", "source")
    invoke = b.invoke("move", "source", vm="new", source="old")
    b.do("close", "source", vm=vm)
    assert payers(ledger(b)) == {("source",)}
    b.done(invoke)
    assert payers(ledger(b)) == ({("source",)} if vm == "old" else {()})
    assert ledger(b).lost == ""


def test_in_what_world_a_killed_move_was_made_is_not_told() -> None:
    """Its process may have been gone before it came to it."""
    for history, told in ((destination_killed(), False), (moved(), True)):
        (move,) = [record for record in history.records if isinstance(record, Invoke) and record.f == "move"]
        assert (move.op in replay(history).during) is told


def test_a_loop_of_moves_may_have_moved_any_of_its_sources_until_it_is_over() -> None:
    """Those that succeeded are recorded by themselves, so by then it is known which did."""
    b = two()
    b.launch("other", "source", "sev_es")
    loop = b.invoke("moves", "destination", vm="new", sources=["new", "old", "other"], rounds=9)
    owned = {frozenset(context.owner for context in world.contexts) for world in ledger(b).worlds}
    assert owned == {frozenset(owners) for owners in (("old", "other"), ("new", "other"), ("old", "new"))}
    b.done(loop, value={"new EINVAL": 9, "old EBUSY": 9, "other EBUSY": 9})
    assert payers(ledger(b)) == {("source", "source")}


def test_a_loop_of_moves_that_was_killed_may_have_moved_its_source_for_good() -> None:
    b = two()
    loop = b.invoke("moves", "destination", vm="new", sources=["old"], rounds=9)
    b.kill("destination")
    b.done(loop, "info")
    assert payers(ledger(b)) == {("source",), ()}  # gone with its new owner
    b.observe("after", {"source": 1})
    assert payers(ledger(b)) == {("source",)}
