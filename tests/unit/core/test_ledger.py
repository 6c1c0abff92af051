# SPDX-License-Identifier: Apache-2.0
"""The ledger on histories made by hand: what it allows, what it concludes, what it finds wrong."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history import Done, Invoke, Observation
from chaos.ledger import Ledger, deaths_begin, owns, replay, said_dead
from chaos.world import Context, Reference, World, argument, levels
from tests.unit.core.build import Builder, destination_killed, moved, moved_es, source_killed


def two() -> Builder:
    """Source and destination, with a guest at the source."""
    b = Builder()
    b.spawn("source")
    b.spawn("destination")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    return b


def ledger(b: Builder) -> Ledger:
    return replay(b.history())


def payers(replayed: Ledger) -> set[tuple[str, ...]]:
    """Who may pay at the end: the payers of each possible world."""
    return {tuple(sorted(context.payer for context in world.contexts)) for world in replayed.worlds}


@pytest.mark.parametrize("run", [moved, moved_es, destination_killed, source_killed])
def test_a_kernel_that_keeps_its_promises_fits(run: object) -> None:
    replayed = replay(run())  # type: ignore[operator]
    assert replayed.lost == ""
    assert replayed.mismatches("charge", "guests", "owner", "answer") == ()
    assert all(not world.contexts for world in replayed.worlds)


def test_levels_name_the_cgroup_and_its_ancestors() -> None:
    assert levels(".") == (".",)
    assert levels("a") == (".", "a")
    assert levels("a/b/c") == (".", "a", "a/b", "a/b/c")


def test_a_charge_counts_at_every_level() -> None:
    world = World(
        homes=frozenset({("one", "a/b")}),
        references=frozenset({Reference("vm", "one")}),
        contexts=frozenset({Context("vm", "sev", "a/b")}),
    )
    assert world.charges == {(".", "sev"): 1, ("a", "sev"): 1, ("a/b", "sev"): 1}
    assert world.charges["elsewhere", "sev"] == 0


def test_a_guest_is_charged_at_init_and_counted_by_the_firmware_at_launch() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    b.observe("created")
    b.do("init", "source", vm="old", key="sev")
    b.observe("charged", {"source": 1}, guests=0)
    b.do("launch_start", "source", vm="old")
    b.observe("launched", {"source": 1}, guests=1)
    assert ledger(b).mismatches("charge", "guests") == ()


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


def test_a_move_under_way_may_have_happened_or_not() -> None:
    b = two()
    b.invoke("move", "destination", vm="new", source="old")
    seen = {(w.charges["source", "sev"], w.charges["destination", "sev"]) for w in ledger(b).worlds}
    assert seen == {(1, 0), (1, 1), (0, 1)}


def test_a_move_that_is_held_has_not_happened() -> None:
    b = two()
    b.hold(b.invoke("move", "destination", vm="new", source="old"))
    seen = {(w.charges["source", "sev"], w.charges["destination", "sev"]) for w in ledger(b).worlds}
    assert seen == {(1, 0), (1, 1)}
    b.observe("held", {"destination": 1})
    assert {m.where for m in ledger(b).mismatches("charge")} == {"source"}


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


def test_an_observation_during_which_a_move_ends_fits_both() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    start = b.t
    b.done(invoke)
    observation = b.observe("across", {"source": 1, "destination": 1, ".": 1}, guests=1)
    b.records[-1] = Observation(
        seq=observation.seq, t=start, until=observation.until, label="across", step=-1, misc=observation.misc,
        guests=1, dying=0,
    )  # fmt: skip
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


def test_a_descriptor_that_was_sent_keeps_the_context_until_it_is_closed() -> None:
    b = two()
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("close", "source", vm="old")
    assert payers(ledger(b)) == {("source",), ()}  # whoever received it may have closed it
    b.do("close", "destination", vm="old")
    assert payers(ledger(b)) == {()}


def test_a_descriptor_on_its_way_goes_with_the_last_process() -> None:
    b = two()
    b.do("send_fd", "source", vm="old")
    b.exit("source")
    assert payers(ledger(b)) == {("source",), ()}
    b.exit("destination")
    assert payers(ledger(b)) == {()}


def test_a_descriptor_of_a_dead_vm_keeps_nothing() -> None:
    b = two()
    b.move("old", "new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("close", "destination", vm="new")
    assert payers(ledger(b)) == {()}


def test_close_takes_the_charge_away() -> None:
    b = two()
    b.do("close", "source", vm="old")
    b.observe("closed")
    assert ledger(b).mismatches("charge", "guests") == ()


def test_an_init_that_was_killed_may_have_charged() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    invoke = b.invoke("init", "source", vm="old", key="sev_es")
    assert {w.charges["source", "sev_es"] for w in ledger(b).worlds} == {0, 1}
    b.kill("source")
    b.done(invoke, "info")
    assert payers(ledger(b)) == {()}


def test_an_operation_that_never_answered_is_settled_when_its_process_is_reaped() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.done(invoke, "info")  # a deadline: the process lives, and so does the move
    assert len(payers(ledger(b))) > 1
    b.observe("late", {"source": 1})
    b.exited("destination", -9)
    b.observe("after", {"source": 1})
    assert payers(ledger(b)) == {("source",)}
    assert ledger(b).happened(invoke, None) is False


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


def test_a_success_that_cannot_be_loses_the_ledger() -> None:
    b = two()
    b.do("init", "source", vm="old", key="sev")  # it has a context already
    b.move("elsewhere", "new", "destination")
    replayed = ledger(b)
    assert replayed.lost.startswith("init of old succeeded at record")
    assert payers(replayed) == {("source",)}


@pytest.mark.parametrize("f", ["spawn", "launch_start", "create", "close", "init", "move"])
def test_impossible_successes(f: str) -> None:
    b = Builder()
    b.spawn("source")
    b.do(f, "source" if f in ("spawn", "launch_start") else "nobody", vm="old", source="old")
    assert ledger(b).lost


def test_operations_that_change_no_charge_change_no_world() -> None:
    b = two()
    before = ledger(b).worlds
    b.do("run", "source", vm="old", every=0)
    b.do("pause", "source", vm="old")
    assert ledger(b).worlds == before


def test_a_process_that_dies_unasked_may_have_been_dead_since_its_last_sign_of_life() -> None:
    b = two()
    b.observe("gone already")
    b.exited("source", -11)
    assert ledger(b).mismatches("charge") == ()


def test_a_process_that_was_told_to_exit_may_be_gone_from_then_on() -> None:
    b = two()
    b.observe("alive", {"source": 1})
    b.do("exit", "source")
    b.observe("gone already")
    b.exited("source")
    assert ledger(b).mismatches("charge") == ()
    wrong = Builder()
    wrong.spawn("source")
    wrong.launch("old", "source", "sev")
    wrong.observe("too early")
    wrong.exit("source")
    assert ledger(wrong).mismatches("charge") != ()


def test_a_fault_that_leaves_its_process_alive_is_no_death() -> None:
    b = two()
    b.kill("nobody", struck=False)
    begun = b.invoke("pause", "source", vm="old")
    b.kill("destination")
    b.done(begun, "info")
    b.status("old", "source")
    deaths = list(deaths_begin(b.history()))
    assert [agent for _, _, agent in deaths] == ["destination"]


def test_a_suspicion_that_nothing_settles_lasts() -> None:
    b = two()
    b.done(b.invoke("pause", "source", vm="old"), "info")
    assert [agent for _, _, agent in deaths_begin(b.history())] == ["source"]
    assert payers(ledger(b)) == {("source",), ()}


def test_a_name_may_live_twice() -> None:
    b = two()
    b.exit("source")
    b.spawn("source")
    b.launch("old", "source", "sev")
    b.observe("again", {"source": 1})
    assert ledger(b).mismatches("charge", "guests") == ()
    assert ledger(b).lost == ""


def test_the_firmware_s_count_leaves_out_what_was_there_before() -> None:
    b = Builder()
    b.observe("start", guests=3)
    b.spawn("source")
    b.launch("old", "source", "sev")
    b.observe("more", {"source": 1}, guests=4)
    assert ledger(b).mismatches("guests") == ()
    b.observe("lost", {"source": 1}, guests=3)
    assert [(m.expected, m.seen) for m in ledger(b).mismatches("guests")] == [(frozenset({1}), 0)]


def test_the_firmware_s_count_says_nothing_before_it_can_be_told_from_others() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    b.do("init", "source", vm="old", key="sev")
    b.invoke("launch_start", "source", vm="old")
    b.observe("first", {"source": 1}, guests=5)
    assert ledger(b).mismatches("guests") == ()


def test_a_guest_count_that_cannot_be_read_says_nothing() -> None:
    b = two()
    observation = b.observe("unread", {"source": 1})
    b.records[-1] = Observation(
        seq=observation.seq, t=observation.t, until=observation.until, label="x", step=-1, misc=observation.misc,
        guests=None, dying=0,
    )  # fmt: skip
    assert ledger(b).mismatches("guests") == ()


def test_a_cgroup_whose_counter_was_not_read_says_nothing() -> None:
    b = two()
    observation = b.observe("partly", {"source": 1})
    misc = {cgroup: files for cgroup, files in observation.misc.items() if cgroup != "source"} | {"source": {}}
    b.records[-1] = Observation(
        seq=observation.seq, t=observation.t, until=observation.until, label="x", step=-1, misc=misc, guests=1, dying=0
    )
    assert ledger(b).mismatches("charge") == ()


def test_guest_status_tells_the_owner() -> None:
    b = two()
    b.status("new", "destination")
    wrong = ledger(b).mismatches("owner")
    assert [(m.where, m.seen, set(m.expected)) for m in wrong] == [("new", 1, {0})]
    b = two()
    b.status("old", "source", error=errno.ENOTTY)
    assert [(m.where, m.seen) for m in ledger(b).mismatches("owner")] == [("old", 0)]


def test_guest_status_settles_a_move_that_was_killed() -> None:
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.kill("destination")
    done = b.done(invoke, "info")
    b.status("old", "source")
    assert ledger(b).happened(invoke, done) is False


def test_answers_of_the_source_settle_a_move_that_was_killed() -> None:
    for dead in (False, True):
        b = two()
        invoke = b.invoke("move", "destination", vm="new", source="old")
        b.kill("destination")
        done = b.done(invoke, "info")
        b.ask("old", "source", dead=dead)
        assert ledger(b).happened(invoke, done) is dead


def test_answers_that_fit_no_world_conclude_nothing() -> None:
    b = two()
    b.ask("old", "source", dead=True)
    assert payers(ledger(b)) == {("source",)}


def test_an_unanswered_status_says_nothing() -> None:
    b = two()
    b.done(b.invoke("guest_status", "source", vm="old"), "info")
    b.exited("source", -9)
    assert ledger(b).mismatches("owner") == ()


@pytest.mark.parametrize(
    ("outcome", "error", "firmware", "expected"),
    [
        ("ok", 0, 0, True),
        ("fail", errno.EBADF, 0, True),
        ("fail", errno.EIO, 3, True),
        ("fail", errno.EIO, 0, False),
        ("fail", errno.ENOTTY, 0, False),
        ("info", 0, 0, None),
    ],
)
def test_owns(outcome: str, error: int, firmware: int, expected: bool | None) -> None:
    done = Done(t=0, op=1, outcome=outcome, errno=error, firmware=firmware)  # type: ignore[arg-type]
    assert owns(done) is expected


def test_said_dead() -> None:
    b = Builder()
    assert said_dead(b.ask("old", "source", dead=True)) is True
    assert said_dead(b.ask("old", "source", dead=False)) is False
    assert said_dead(b.ask("old", "source", dead=True, control=errno.EIO)) is None


def test_an_argument_that_is_no_name_is_no_name() -> None:
    invoke = Builder().invoke("close", "source", vm=3)
    assert argument(invoke, "vm") == "" == argument(invoke, "source")


def held() -> tuple[Builder, Invoke]:
    """A move that is seen to sleep after it has charged its cgroup."""
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    return b, invoke


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


def test_an_answer_counts_from_when_it_was_given() -> None:
    """The observation is written down before the answer, and made after the call had returned."""
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    ended = b.tick()
    b.observe("after", {"source": 1, "destination": 1}, guests=1)
    b.add(Done(t=b.tick(), op=invoke.op, outcome="ok", began=ended, ended=ended))
    assert {m.where for m in ledger(b).mismatches("charge")} == {".", "source"}


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


def test_an_observation_during_which_a_move_ends_may_miss_the_charge_on_both_sides() -> None:
    b, invoke = held()
    start = b.tick()
    b.done(invoke)
    seen = b.observe("across", {".": 1}, guests=1)  # the destination was read first, the source last
    b.records[-1] = msgspec.structs.replace(seen, t=start)
    assert {m.where for m in ledger(b).mismatches("charge")} == {"destination"}  # it had been charged before
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    start = b.tick()
    b.done(invoke)
    seen = b.observe("across", {".": 1}, guests=1)
    b.records[-1] = msgspec.structs.replace(seen, t=start)
    assert ledger(b).mismatches("charge") == ()


def test_a_status_during_which_a_move_ends_concludes_nothing() -> None:
    b = two()
    move = b.invoke("move", "destination", vm="new", source="old")
    status = b.invoke("guest_status", "source", vm="old")
    b.done(move)
    b.done(status, value={"handle": 1})
    b.observe("after", {"destination": 1})
    assert ledger(b).mismatches("charge", "owner") == ()


def test_an_observation_that_is_no_one_moment_concludes_nothing() -> None:
    b = Builder()
    b.observe("start")
    b.spawn("source")
    b.do("create", "source", vm="old")
    b.do("init", "source", vm="old", key="sev")
    b.invoke("launch_start", "source", vm="old")
    b.observe("meanwhile", {"source": 1}, guests=0)
    entry = ledger(b).entries[-1]
    assert len(entry.worlds) == 2
    assert entry.fits == entry.worlds


def test_a_key_that_is_not_listed_reads_zero() -> None:
    b = two()
    seen = b.observe("unlisted", {"source": 1})
    b.records[-1] = msgspec.structs.replace(seen, misc={**seen.misc, "source": {"current": {}}})
    assert [(m.where, m.key, m.seen) for m in ledger(b).mismatches("charge")] == [("source", "sev", 0)]


def test_a_process_that_exits_closes_before_it_says_so() -> None:
    b = two()
    invoke = b.invoke("exit", "source")
    b.observe("closed")
    b.done(invoke)
    b.exited("source")
    assert ledger(b).mismatches("charge", "guests") == ()


def test_an_init_that_failed_over_its_vcpus_has_charged() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    refused = {"call": "KVM_MEMORY_ENCRYPT_OP INIT"}
    b.done(b.invoke("init", "source", vm="old", key="sev"), "fail", error=errno.EBUSY, value=dict(refused))
    assert payers(ledger(b)) == {()}
    invoke = b.invoke("init", "source", vm="old", key="sev")
    done = b.done(invoke, "fail", error=errno.ENOMEM, value={"call": "KVM_CREATE_VCPU"})
    assert payers(ledger(b)) == {("source",)}
    assert ledger(b).happened(invoke, done) is True


def test_descriptors_that_were_sent_do_not_multiply_the_worlds() -> None:
    b = Builder()
    b.spawn("source")
    b.spawn("destination")
    for number in range(12):
        b.launch(f"old-{number}", "source", "sev")
        b.launch(f"new-{number}", "destination")
        b.do("send_fd", "source", vm=f"old-{number}", to="destination")
        b.move(f"old-{number}", f"new-{number}", "destination", error=errno.EBUSY)
    assert len(ledger(b).worlds) == 1


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


def test_a_process_that_may_be_dead_may_not_have_begun() -> None:
    b = two()
    b.do("send_fd", "source", vm="old", to="destination")
    b.kill_begins("destination")
    b.invoke("move", "destination", vm="new", source="old")
    b.do("close", "source", vm="old")
    b.observe("gone with the destination")
    assert ledger(b).mismatches("charge", "guests") == ()
