# SPDX-License-Identifier: Apache-2.0
"""Which VMs own a context that goes by no number of their own."""

from __future__ import annotations

import errno

import pytest

from chaos.judge.ledger.owners import Owners
from tests.unit.core.build import Builder


def lost(b: Builder, vm: str) -> list[bool]:
    """Whether the number was lost, after each operation that says so."""
    return [said for _, said in Owners.of(b.history()).numbers.get(vm, [])]


def test_a_context_has_its_number_from_its_launch_until_it_is_moved() -> None:
    b = Builder()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    assert lost(b, "old") == [False, True, False]  # create, init, launch_start
    assert lost(b, "new") == [False, True]


def test_a_mirror_goes_by_what_its_owner_goes_by() -> None:
    b = Builder()
    b.launch("old", "source", "sev")
    for vm in ("before", "after", "new"):
        b.do("create", "destination", vm=vm, kind="mirror", vcpus=0, memory="guest")
    b.do("mirror", "destination", vm="before", source="old")
    b.move("old", "new", "destination")
    b.do("mirror", "destination", vm="after", source="new")
    assert (lost(b, "before"), lost(b, "after")) == ([False, False], [False, True])


def test_what_failed_changes_no_number_and_what_was_killed_may_have() -> None:
    b = Builder()
    b.launch("one", "source")
    b.do("init", "source", vm="one", key="sev", error=errno.EBUSY)
    assert lost(b, "one") == [False]
    b.done(b.invoke("init", "source", vm="one", key="sev"), "info")
    assert lost(b, "one") == [False, True]
    b.done(b.invoke("guest_status", "source", vm="one"), "info")
    assert lost(b, "one") == [False, True]
    b.invoke("moves", "source", vm="one", sources=["two"], rounds=2)
    assert lost(b, "one") == [False, True, True]
    b.done(b.invoke("moves", "source", vm="one", sources=["two"], rounds=2), "info")
    assert lost(b, "one") == [False, True, True, True]


def test_a_loop_of_moves_that_ended_is_told_by_its_moves() -> None:
    b = Builder()
    b.launch("one", "source")
    b.do("moves", "source", vm="one", sources=["two"], rounds=2)
    b.move("one", "one", "source")  # into itself
    assert lost(b, "one") == [False]


@pytest.mark.parametrize(
    ("agent", "fd", "owns"),
    [("destination", "sev", None), ("destination", "vcpu 0", True), ("source", "sev", True), ("", "", True)],
)
def test_an_ebadf_tells_the_owner_unless_its_process_had_lost_its_way_to_the_firmware(
    agent: str, fd: str, owns: bool | None
) -> None:
    b = Builder()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    if agent:
        b.do("lose_fd", agent, vm="new", fd=fd)
    asked = b.invoke("guest_status", "destination", vm="new")
    done = b.done(asked, "fail", error=errno.EBADF)
    b.do("lose_fd", "destination", vm="new", fd="sev")  # too late to tell anything
    assert Owners.of(b.history()).says(asked, done) is owns


def test_of_a_vm_that_nobody_was_seen_to_create_no_number_was_lost() -> None:
    b = Builder()
    asked = b.invoke("guest_status", "source", vm="old")
    assert Owners.of(b.history()).says(asked, b.done(asked, "fail", error=errno.EBADF)) is None
    b.do("mirror", "source", vm="mirror", source="old")
    assert lost(b, "mirror") == [False]
