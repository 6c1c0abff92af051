# SPDX-License-Identifier: Apache-2.0
"""What an operation was allowed to answer where it came: by who shares the host, by what was read of limits and events,
and by what became of the firmware meanwhile."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINTR, EINVAL, ENOMEM, ENOTTY, ETIMEDOUT

import msgspec
import pytest

from chaos.history.records import History, Observation, Record
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, Change, begun, see, verdict_of
from tests.unit.core.removal import unread
from tests.unit.core.test_p10_limits import limited


@pytest.mark.parametrize(
    ("host", "shared", "outcome"),
    [("lab", True, HELD), ("elsewhere", False, HELD), ("lab", False, DEVIATED)],
)
def test_what_others_have_is_not_to_be_had(host: str, shared: bool, outcome: Outcome) -> None:
    """In a lab nobody else is there: what cannot be had is missing."""
    b = Builder()
    b.fill("start", sev=1)
    b.spawn("source")
    see(b, "before")
    b.launch("old", "source", "sev")
    b.do("create", "source", vm="next", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", error=EBUSY, vm="next", key="sev")
    b.fill("end")  # by when they have gone
    b.records[0] = msgspec.structs.replace(b.records[0], host=host, shared=shared, asids={"sev": 8})  # and no SEV-ES
    assert verdict_of("P7", b.end()).outcome is outcome


def only_what_counts(record: Record) -> Record:
    """misc.events without the lines that say 0."""
    if not isinstance(record, Observation):
        return record
    files = {c: dict(misc) for c, misc in record.misc.items()}
    for misc in files.values():
        if "events" in misc:
            misc["events"] = {key: number for key, number in misc["events"].items() if number}
    return msgspec.structs.replace(record, misc=files)


def test_a_key_that_is_not_listed_has_had_no_event() -> None:
    """A line is there only if the host has capacity, or the value is not 0 (part 4 of the contract)."""
    assert verdict_of("P10", changed(limited(), only_what_counts)).outcome is HELD
    missing = changed(limited(counted=0, above=0), only_what_counts)
    assert verdict_of("P10", missing).signature == "event-missing:sev"


def without_files(record: Record) -> Record:
    """The source's cgroup has no misc controller."""
    if not isinstance(record, Observation) or "source" not in record.misc:
        return record
    return msgspec.structs.replace(record, misc={**record.misc, "source": {}})


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (unread("", "destination", file="max"), UNKNOWN),
        (unread("", ".", file="max"), UNKNOWN),
        (without_files, HELD),
    ],
)
def test_limits_are_known_if_those_of_every_cgroup_that_has_one_were_read(change: Change, outcome: Outcome) -> None:
    verdict = verdict_of("P10", changed(limited(), change))
    assert verdict.outcome is outcome
    assert ("the limits were not read" in verdict.reason) == (outcome is UNKNOWN)


@pytest.mark.parametrize(("limit", "signature"), [(0, "over-limit:move:sev"), ("max", "")])
def test_of_limits_that_were_changed_again_and_again_the_last_counts(limit: int | str, signature: str) -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("limit", "", cgroup="destination", key="sev", max=3)
    see(b, "before", {"source": 1}, limits={"destination": 3})
    for number in (0, limit):
        b.do("limit", "", cgroup="destination", key="sev", max=number)
    b.move("old", "new", "destination")
    b.do("limit", "", cgroup="destination", key="sev", max=1)
    see(b, "after", {"destination": 1}, limits={"destination": 1})
    assert verdict_of("P10", b.end()).signature == signature


@pytest.mark.parametrize(("threads", "signature"), [(2, ""), (1, "move-of-sev_es:EBUSY-for-EINVAL")])
def test_threads_of_one_loop_are_in_each_other_s_way_and_one_thread_is_in_nobody_s(
    threads: int, signature: str
) -> None:
    """A move into a VM with too few vCPUs: whoever is first is told so, and others that it is busy."""
    b = begun()
    b.launch("old", "source", "sev_es")
    b.do("create", "destination", vm="new", kind="plain", vcpus=0, memory="guest")
    see(b, "before", {"source": 1}, key="sev_es")
    b.do("send_fd", "source", vm="old", to="destination")
    loop = b.invoke("moves", "destination", vm="new", sources=["old"], rounds=3, threads=threads)
    done = b.done(loop, value={"old EBUSY": 1, "old EINVAL": 2})
    b.records[-1] = msgspec.structs.replace(done, began=loop.t)
    see(b, "after", {"source": 1}, key="sev_es")
    assert verdict_of("P7", b.end()).signature == signature


def silent(answers: tuple[int, int]) -> History:
    """Two commands under way when the driver gives the firmware up, of which the first finds out."""
    b = Builder()
    b.begin()
    see(b, "before")
    for vm in ("old", "other"):
        b.do("create", "source", vm=vm, kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm=vm, key="sev")
    both = [b.invoke("launch_start", "source", vm=vm) for vm in ("old", "other")]
    b.kernel("ccp 0000:01:00.0: sev command 0x30 timed out, disabling PSP")
    for invoke, error in zip(both, answers, strict=True):
        b.done(invoke, "fail" if error else "ok", error=error)
    return b.finish()


@pytest.mark.parametrize(
    ("other", "signature"),
    [(EBUSY, ""), (0, ""), (ETIMEDOUT, "launch_start:ETIMEDOUT-for-EBUSY-or-ok")],
)
def test_what_was_under_way_when_the_firmware_was_given_up_may_have_come_before_or_after_that(
    other: int, signature: str
) -> None:
    assert verdict_of("P7", silent((ETIMEDOUT, other))).signature == signature


def test_what_finds_out_may_be_a_command_that_nobody_made() -> None:
    """Like the DEACTIVATE of a VM that was closed."""
    assert verdict_of("P7", silent((EBUSY, EBUSY))).outcome is HELD


def moving() -> Builder:
    """A guest at the source, and two VMs that it may be moved into."""
    b = begun()
    b.launch("old", "source", "sev")
    b.offer("old", "new", "other")
    see(b, "before", {"source": 1})
    return b


@pytest.mark.parametrize(
    ("hold", "signature"),
    [
        ({"function": "kvm_arch_vcpu_create"}, "move:ok-for-EBUSY"),
        ({"function": "sev_vm_destroy"}, ""),  # which says nothing of how far it is
    ],
)
def test_a_vcpu_that_is_seen_to_be_half_made_stops_every_move(hold: dict[str, str], signature: str) -> None:
    b = moving()
    creation = b.invoke("create_vcpu", "destination", vm="new", id=9)
    b.hold_at(creation, **hold)
    b.move("old", "new", "destination")
    b.done(creation)
    assert verdict_of("P7", b.end()).signature == signature


@pytest.mark.parametrize(
    ("function", "signature"),
    [("misc_cg_try_charge", "move:EINVAL-for-EBUSY"), ("sev_lock_two_vms", "move:EINVAL-for-EBUSY-or-ok")],
)
def test_a_move_that_is_seen_to_be_past_the_flags_stops_every_other(function: str, signature: str) -> None:
    b = moving()
    first = b.invoke("move", "destination", vm="new", source="old")
    b.hold_at(first, function=function)
    b.move("old", "other", "destination", error=EINVAL)
    b.done(first, "fail", error=EINTR)
    verdict = verdict_of("P7", b.end())
    assert signature in verdict.signature.split("+")


@pytest.mark.parametrize(
    ("given", "error", "outcome"),
    [
        ([("source", 0)], ENOMEM, HELD),
        ([("source", 0)], 0, DEVIATED),
        ([("source", 4096)], ENOMEM, HELD),
        ([("source", 4096)], 0, UNKNOWN),
        ([("source", 4096), ("source", 0)], 0, DEVIATED),  # the last counts
        ([("source", 0), ("source", "max")], ENOMEM, DEVIATED),
        ([("destination", 0)], ENOMEM, DEVIATED),
    ],
)
def test_what_a_process_may_pin_goes_by_what_it_was_given_last(
    given: list[tuple[str, int | str]], error: int, outcome: Outcome
) -> None:
    b = begun()
    b.launch("old", "source", "sev")
    for agent, size in given:
        b.do("memlock", agent, bytes=size)
    b.launch("another", "source")
    b.do("register_region", "source", vm="old", address=0x1000, error=error)
    assert verdict_of("P7", b.end()).outcome is outcome


def test_an_init_that_was_refused_its_vcpus_is_one_that_succeeded() -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    see(b, "before")
    init = b.invoke("init", "source", vm="old", key="sev")
    b.done(init, "fail", error=EEXIST, value={"call": "KVM_CREATE_VCPU"})
    assert verdict_of("P7", b.end()).outcome is UNKNOWN  # nothing was refused that the contract speaks of


def test_of_a_process_that_never_lived_nobody_can_say_what_it_was_answered_for() -> None:
    b = begun()
    b.do("init", "nobody", vm="old", key="sev", error=EBUSY)
    verdict = verdict_of("P7", b.end())
    assert verdict.outcome is UNKNOWN
    assert "nobody can say in what state init found its VMs" in verdict.reason


@pytest.mark.parametrize(("told", "signature"), [("old ok", ""), ("old 524", "move:errno-524-for-EINVAL-or-ok")])
def test_an_answer_of_a_loop_may_have_no_name(told: str, signature: str) -> None:
    b = moving()
    b.done(b.invoke("moves", "destination", vm="new", sources=["old"], rounds=1, threads=1), value={told: 1})
    assert verdict_of("P7", b.end()).signature == signature


def test_a_mirror_is_not_made_of_a_vm_that_dies_meanwhile() -> None:
    """Its ioctl is not let in, however far the move is: there is no saying that it came before."""
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=0, memory="guest")
    for f in ("init", "launch_start"):
        b.do(f, "source", vm="old", key="sev")
    b.launch("owner", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 2})
    move = b.invoke("move", "destination", vm="new", source="old")
    b.do("mirror", "source", vm="old", source="owner")
    b.done(move)
    assert verdict_of("P7", b.end()).signature == "mirror:ok-for-EBUSY-or-EINVAL-or-EIO"


@pytest.mark.parametrize(
    ("error", "signature"), [(ENOTTY, ""), (EINVAL, "guest_status:EINVAL-for-EIO-or-ENOTTY-or-ok")]
)
def test_a_move_whose_process_was_killed_is_under_way_until_that_is_gone(error: int, signature: str) -> None:
    """Its source may have lost the context and not be dead yet."""
    b = moving()
    move = b.invoke("move", "destination", vm="new", source="old")
    b.kill_begins("destination")
    b.done(move, "info")
    b.status("old", "source", error=error)
    b.exited("destination", -9)
    assert verdict_of("P7", b.end()).signature == signature


def test_where_limits_were_not_read_a_flag_may_have_been_free_that_a_move_was_told_is_busy() -> None:
    b = moving()
    for vm in ("new", "other"):
        b.move("old", vm, "destination", error=EBUSY)
    see(b, "after", {"source": 1})
    read, not_read = b.end(), changed(b.history(), unread("", "destination", file="max"))
    assert verdict_of("P6", read).outcome is DEVIATED
    assert verdict_of("P6", not_read).outcome is UNKNOWN
