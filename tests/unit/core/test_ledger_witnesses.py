# SPDX-License-Identifier: Apache-2.0
"""The ledger and its witnesses: counters, the firmware's count, GUEST_STATUS, and what the source answers."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.reading import owns, said_dead
from chaos.history.records import Done, Observation
from tests.unit.core.build import Builder
from tests.unit.core.on_ledger import held, ledger, payers, two


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
        ("fail", errno.EIO, 3, True),
        ("fail", errno.EIO, 0, False),
        ("fail", errno.ENOTTY, 0, False),
        *(
            ("fail", getattr(errno, name), 0, None)
            for name in ["EBADF", "EBUSY", "EFAULT", "EINVAL", "ENODEV", "ENOMEM", "EPERM", "ETIMEDOUT"]
        ),
        ("info", 0, 0, None),
    ],
)
def test_owns(outcome: str, error: int, firmware: int, expected: bool | None) -> None:
    done = Done(t=0, op=1, outcome=outcome, errno=error, firmware=firmware)  # type: ignore[arg-type]
    assert owns(done) is expected
    assert owns(done, numberless=True) is (True if error == errno.EBADF else expected)


def test_said_dead() -> None:
    b = Builder()
    assert said_dead(b.ask("old", "source", dead=True)) is True
    assert said_dead(b.ask("old", "source", dead=False)) is False
    assert said_dead(b.ask("old", "source", dead=True, control=errno.EIO)) is None


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
    assert {world.guests for world in entry.worlds} == {0, 1}
    assert entry.fits == entry.worlds


def test_a_key_that_is_not_listed_reads_zero() -> None:
    b = two()
    seen = b.observe("unlisted", {"source": 1})
    b.records[-1] = msgspec.structs.replace(seen, misc={**seen.misc, "source": {"current": {}}})
    assert [(m.where, m.key, m.seen) for m in ledger(b).mismatches("charge")] == [("source", "sev", 0)]
