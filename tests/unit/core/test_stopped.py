# SPDX-License-Identifier: Apache-2.0
"""What must be read while an operation is stopped, by the place at which it is."""

from __future__ import annotations

import errno
from typing import Literal

import msgspec
import pytest

from chaos.history.records import Held, Invoke
from chaos.judge.ledger.reach import ANY, COMMANDS, FUNCTIONS, reaches
from chaos.judge.ledger.world import Reach
from tests.unit.core.build import Builder
from tests.unit.core.on_ledger import ledger, payers, two

Charges = tuple[int, int]  # of source and destination
BOTH, SOURCE, DESTINATION = (1, 1), (1, 0), (0, 1)


def seen(b: Builder) -> set[Charges]:
    return {(world.charges["source", "sev"], world.charges["destination", "sev"]) for world in ledger(b).worlds}


def moving() -> tuple[Builder, Invoke]:
    b = two()
    return b, b.invoke("move", "destination", vm="new", source="old")


MOVE: dict[str, tuple[Charges, set[str]]] = {
    "sev_vm_move_enc_context_from": (SOURCE, {"old"}),
    "sev_lock_two_vms": (SOURCE, {"old"}),
    "misc_cg_try_charge": (SOURCE, {"old"}),
    "sev_lock_vcpus_for_migration": (BOTH, {"old"}),
    "sev_init_vmcb": (BOTH, {"new"}),
    "sev_unlock_vcpus_for_migration": (BOTH, {"old", "new"}),
    "misc_cg_uncharge": (BOTH, {"old", "new"}),
}


@pytest.mark.parametrize("function", MOVE)
def test_at_its_entry_a_move_has_come_so_far(function: str) -> None:
    b, invoke = moving()
    b.hold_at(invoke, function=function)
    charges, owners = MOVE[function]
    assert seen(b) == {charges}
    assert {context.owner for world in ledger(b).worlds for context in world.contexts} == owners


@pytest.mark.parametrize("function", MOVE)
@pytest.mark.parametrize("wrong", [SOURCE, BOTH, DESTINATION, (0, 0), (2, 1), (1, 2)])
def test_any_other_charge_deviates(function: str, wrong: Charges) -> None:
    b, invoke = moving()
    b.hold_at(invoke, function=function)
    b.observe("held", {"source": wrong[0], "destination": wrong[1]}, guests=1)
    due = MOVE[function][0]
    differing = {name for name, now, then in zip(("source", "destination"), wrong, due, strict=True) if now != then}
    mismatches = ledger(b).mismatches("charge")
    assert {m.where for m in mismatches} - {"."} == differing
    for mismatch in mismatches:
        if mismatch.where != ".":
            assert mismatch.key == "sev"
            assert mismatch.expected == {due[mismatch.where == "destination"]}
            assert mismatch.seen == wrong[mismatch.where == "destination"]


def test_where_it_cannot_be_told_anything_of_the_move_may_be_read() -> None:
    b, invoke = moving()
    b.hold_at(invoke, function="kvm_vm_release")
    assert seen(b) == {SOURCE, BOTH, DESTINATION}
    b.observe("held", {"destination": 1})
    assert ledger(b).mismatches("charge") == ()
    assert seen(b) == {DESTINATION}  # it is stopped, so what was read stays so


def test_stopped_twice_in_one_move() -> None:
    b, invoke = moving()
    b.hold_at(invoke, function="misc_cg_try_charge")
    b.observe("first", {"source": 1})
    b.hold_at(invoke, function="sev_init_vmcb")
    assert seen(b) == {BOTH}, "it is there, so it has gone on"
    b.release("here")
    assert seen(b) == {BOTH, DESTINATION}
    b.hold_at(invoke, function="misc_cg_uncharge")
    b.observe("last", {"source": 1, "destination": 1}, guests=1)
    b.done(invoke)
    b.observe("after", {"destination": 1})
    assert ledger(b).mismatches("charge", "guests", "answer", "owner") == ()
    assert payers(ledger(b)) == {("destination",)}


@pytest.mark.parametrize("place", ["vcpu", "lock", "kernel", "page"])
def test_what_another_operation_lets_go(place: Literal["vcpu", "lock", "kernel", "page"]) -> None:
    """A vCPU may leave the guest, a lock be given up. The others hold."""
    b, invoke = moving()
    held = b.hold_at(invoke, function="sev_lock_vcpus_for_migration")
    b.records[-1] = msgspec.structs.replace(held, place=place)
    before = seen(b)
    b.do("pause", "source", vm="old")
    assert (seen(b) == before) == (place in ("kernel", "page"))
    b.release("another")
    assert (seen(b) == before) == (place in ("kernel", "page"))
    b.release("here")
    assert seen(b) == {SOURCE, BOTH, DESTINATION}


def test_a_kill_lets_go_what_the_process_does_and_not_what_another_does() -> None:
    b, invoke = moving()
    b.do("send_fd", "source", vm="old", to="destination")
    b.hold_at(invoke, function="sev_init_vmcb")
    b.kill("source")
    assert seen(b) == {BOTH}
    b.kill_begins("destination")
    assert seen(b) == {BOTH, DESTINATION, (0, 0)}


def test_a_move_that_fails_gives_its_charge_back_after_the_hold() -> None:
    b, invoke = moving()
    b.hold_at(invoke, function="misc_cg_uncharge")
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    b.done(invoke, "fail", error=errno.EINVAL)
    assert ledger(b).mismatches("charge", "answer") == ()
    assert payers(ledger(b)) == {("source",)}


@pytest.mark.parametrize("function", ["sev_migrate_from", "sev_init_vmcb", "misc_cg_uncharge"])
def test_within_a_cgroup_a_move_has_nothing_to_take_and_nothing_to_give_back(function: str) -> None:
    b = Builder()
    b.spawn("source", "shared")
    b.spawn("destination", "shared")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.hold_at(b.invoke("move", "destination", vm="new", source="old"), function=function)
    assert {world.charges["shared", "sev"] for world in ledger(b).worlds} == {1}


@pytest.mark.parametrize("function", ["sev_lock_vcpus_for_migration", "sev_init_vmcb", "misc_cg_uncharge"])
def test_a_mover_that_is_killed_in_a_hold_leaves_no_charge(function: str) -> None:
    b, invoke = moving()
    b.hold_at(invoke, function=function)
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    b.kill("destination")
    b.done(invoke, "info")
    assert payers(ledger(b)) <= {("source",), ()}
    b.observe("after", {"source": 1, "destination": 1}, guests=1)
    assert {m.where for m in ledger(b).mismatches("charge")} >= {"destination"}


INIT = {"misc_cg_try_charge": 0, "sev_platform_init": 1, "kvm_arch_vcpu_create": 1, "sev_pin_memory": None}


@pytest.mark.parametrize(("function", "charge"), INIT.items())
def test_an_init_is_charged_from_the_charge_on(function: str, charge: int | None) -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    invoke = b.invoke("init", "source", vm="old", key="sev")
    b.hold_at(invoke, function=function)
    assert {world.charges["source", "sev"] for world in ledger(b).worlds} == ({0, 1} if charge is None else {charge})


def test_an_init_that_fails_after_its_charge_was_seen() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    invoke = b.invoke("init", "source", vm="old", key="sev")
    b.hold_at(invoke, function="sev_platform_init")
    b.observe("held", {"source": 1}, guests=0)
    b.done(invoke, "fail", error=errno.EIO, firmware=1)
    b.observe("after", guests=0)
    assert ledger(b).mismatches("charge", "answer") == ()
    assert payers(ledger(b)) == {()}


def test_a_launch_that_fails_after_the_firmware_knew_it() -> None:
    b = Builder()
    b.spawn("source")
    b.do("create", "source", vm="old")
    b.do("init", "source", vm="old", key="sev")
    b.observe("start", {"source": 1}, guests=0)
    invoke = b.invoke("launch_start", "source", vm="old")
    b.hold_at(invoke, function="sev_guest_activate")
    b.observe("held", {"source": 1}, guests=1)
    b.done(invoke, "fail", error=errno.EIO, firmware=1)
    assert ledger(b).mismatches("charge", "answer", "guests") == ()
    b.observe("after", {"source": 1}, guests=1)
    assert [m.seen for m in ledger(b).mismatches("guests")] == [1], "and it forgot to decommission"


CLOSE: dict[str, tuple[int, int]] = {
    "sev_vm_destroy": (1, 1),
    "sev_guest_decommission": (1, 1),
    "sev_asid_free": (1, 0),
    "misc_cg_uncharge": (1, 0),
}


@pytest.mark.parametrize(("function", "read"), CLOSE.items())
def test_a_close_takes_the_guest_before_its_charge(function: str, read: tuple[int, int]) -> None:
    b = two()
    b.observe("before", {"source": 1})
    invoke = b.invoke("close", "source", vm="old")
    b.hold_at(invoke, function=function)
    charge, guests = read
    assert {(world.charges["source", "sev"], world.guests) for world in ledger(b).worlds} == {read}
    b.observe("held", {"source": charge}, guests=1 - guests)
    assert [m.kind for m in ledger(b).mismatches("guests")] == ["guests"]
    b.done(invoke)
    assert payers(ledger(b)) == {()}


def test_a_close_that_is_not_the_last_takes_nothing() -> None:
    b = two()
    b.do("create", "destination", vm="copy", kind="mirror")
    b.do("mirror", "destination", vm="copy", source="old")
    b.hold_at(b.invoke("close", "source", vm="old"), function="misc_cg_uncharge")
    assert {world.charges["source", "sev"] for world in ledger(b).worlds} == {1}


@pytest.mark.parametrize(
    ("command", "read"),
    [("DEACTIVATE", {(1, 1)}), ("DECOMMISSION", {(1, 1), (1, 0)}), ("PLATFORM_STATUS", {(1, 1), (1, 0), (0, 0)})],
)
def test_a_command_that_is_not_answered(command: str, read: set[tuple[int, int]]) -> None:
    """Whether it was carried out, nobody inside can tell."""
    b = two()
    b.hold_at(b.invoke("close", "source", vm="old"), command=command)
    assert {(world.charges["source", "sev"], world.guests) for world in ledger(b).worlds} == read


def test_what_was_not_written_down_says_nothing() -> None:
    held = Held(t=0, op=1, step=0, hold="old-history", reached=True, state="D", sleeping="")
    assert reaches("move", held) == ANY
    places: tuple[Literal["lock", "page"], ...] = ("lock", "page")
    for place in places:
        assert reaches("move", msgspec.structs.replace(held, place=place)) == {Reach.BEFORE}


@pytest.mark.parametrize("at", [{"function": "sev_launch_measure"}, {"command": "LAUNCH_MEASURE"}])
def test_of_an_operation_that_changes_no_charge_no_place_is_known(at: dict[str, str]) -> None:
    b = two()
    invoke = b.invoke("launch_measure", "source", vm="old")
    held = b.hold_at(invoke, **at)
    assert reaches(invoke.f, held) == ANY
    assert seen(b) == {SOURCE}


def test_every_stage_that_is_named_can_be() -> None:
    for table in (FUNCTIONS, COMMANDS):
        for places in table.values():
            assert all(stages and stages <= ANY for stages in places.values())
