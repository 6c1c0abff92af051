# SPDX-License-Identifier: Apache-2.0
"""The ledger on histories made by hand: who pays for what, and for how long."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.reading import argument, levels
from chaos.history.records import Done
from chaos.judge.ledger.replay import MANY, deaths_begin, replay
from chaos.judge.ledger.world import Context, Reference, World
from tests.unit.core.build import Builder, destination_killed, moved, moved_es, source_killed
from tests.unit.core.on_ledger import ledger, payers, two


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


def sent(*, connected: bool = True) -> Builder:
    """The source's VM is closed there, and its descriptor with the destination."""
    b = two()
    if connected:
        b.do("connect", "source", vm="old", peer="new")
        b.do("connect", "destination", vm="new", peer="old")
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("close", "source", vm="old")
    assert payers(ledger(b)) == {("source",)}
    return b


@pytest.mark.parametrize("f", ["disconnect", "connect", "listen", "commit", "close"])
def test_a_descriptor_that_was_sent_keeps_the_context_until_its_receiver_lets_go(f: str) -> None:
    b = sent()
    b.do("create", "destination", vm="other", kind="plain", vcpus=1, memory="guest")
    b.do(f, "destination", vm="other", peer="old")
    assert payers(ledger(b)) == {("source",)}  # it was sent to another VM
    letting_go = b.invoke(f, "destination", vm="new", peer="old")
    assert payers(ledger(b)) == {("source",), ()}
    b.done(letting_go)
    assert payers(ledger(b)) == {()}
    unrecorded = sent(connected=False)
    unrecorded.do(f, "destination", vm="new", peer="old")
    assert payers(ledger(unrecorded)) == {("source",), ()}  # it may have been sent to another


@pytest.mark.parametrize(("f", "left"), [("disconnect", "source"), ("close", "")])
def test_a_descriptor_that_was_taken_out_of_the_socket_goes_with_the_vm(f: str, left: str) -> None:
    b = sent()
    b.do("receive_fd", "destination", vm="new", source="old")
    b.do(f, "destination", vm="new")
    assert payers(ledger(b)) == {(left,) if left else ()}


def test_a_descriptor_that_was_sent_is_closed_by_the_move_that_it_is_for() -> None:
    b = sent()
    b.move("old", "new", "destination", error=errno.EBUSY)
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


def test_a_success_that_cannot_be_loses_the_ledger() -> None:
    b = two()
    b.do("init", "source", vm="old", key="sev")  # it has a context already
    b.move("elsewhere", "new", "destination")
    replayed = ledger(b)
    assert replayed.lost.startswith("init of old succeeded at record")
    assert payers(replayed) == {("source",)}


def test_a_history_in_which_nothing_is_answered_loses_the_ledger_and_not_the_memory() -> None:
    """As somebody may write one: each of thirty guests may have been charged, or not."""
    b = Builder()
    b.spawn("source")
    for number in range(30):
        b.do("create", "source", vm=f"old-{number}")
        b.invoke("init", "source", vm=f"old-{number}", key="sev")
    b.observe("after", {"source": 7})
    replayed = ledger(b)
    assert replayed.lost.endswith(f"more than {MANY} courses of events are possible")
    assert replayed.lost_at is not None and replayed.lost_at < replayed.entries[0].record.seq


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


@pytest.mark.parametrize("end", ["kill", "exit", "crash"])
@pytest.mark.parametrize(("left", "wrong"), [(3, True), (2, False), (1, False), (0, False), (-1, True)])
def test_a_process_that_dies_gives_up_one_guest_after_the_other(end: str, left: int, wrong: bool) -> None:
    b = two()
    b.launch("another", "source", "sev")
    b.observe("before", {"source": 2})
    if end == "kill":
        b.kill_begins("source")
    elif end == "exit":
        b.invoke("exit", "source")
    b.observe("dying", {"source": left})
    b.exited("source", -9)
    assert bool(ledger(b).mismatches("charge", "guests")) == wrong
    b.observe("gone", {})
    assert bool(ledger(b).mismatches("charge", "guests")) == wrong
    b.observe("one is left over", {"source": 1})
    assert ledger(b).mismatches("charge")[-1].expected == {0}


def test_an_observation_during_which_a_process_dies_may_have_seen_it_half_gone() -> None:
    b = two()
    b.launch("another", "source", "sev")
    start = b.tick()
    b.kill_begins("source")
    b.exited("source", -9)
    seen = b.observe("across", {"source": 1})
    b.records[seen.seq] = msgspec.structs.replace(seen, t=start)
    assert ledger(b).mismatches("charge", "guests") == ()


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


def test_an_argument_that_is_no_name_is_no_name() -> None:
    invoke = Builder().invoke("close", "source", vm=3)
    assert argument(invoke, "vm") == "" == argument(invoke, "source")


def test_an_answer_counts_from_when_it_was_given() -> None:
    """The observation is written down before the answer, and made after the call had returned."""
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    ended = b.tick()
    b.observe("after", {"source": 1, "destination": 1}, guests=1)
    b.add(Done(t=b.tick(), op=invoke.op, outcome="ok", began=ended, ended=ended))
    assert {m.where for m in ledger(b).mismatches("charge")} == {".", "source"}


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


def test_a_process_that_may_be_dead_may_not_have_begun() -> None:
    b = two()
    b.do("send_fd", "source", vm="old", to="destination")
    b.kill_begins("destination")
    b.invoke("move", "destination", vm="new", source="old")
    b.do("close", "source", vm="old")
    b.observe("gone with the destination")
    assert ledger(b).mismatches("charge", "guests") == ()
