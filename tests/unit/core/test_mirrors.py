# SPDX-License-Identifier: Apache-2.0
"""Mirrors in the ledger: a mirror pays nothing, keeps its owner's context alive, and moves like any other VM."""

from __future__ import annotations

import errno

from chaos.judge.ledger.replay import replay
from chaos.judge.ledger.world import LedgerMirror, World
from tests.unit.core.build import Builder


def mirrored(key: str = "sev") -> Builder:
    """An owner in the source's cgroup, a mirror of it in the destination's."""
    b = Builder()
    b.begin()
    b.launch("owner", "source", key)
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=2, memory="other")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", vm="mirror", source="owner")
    return b


def only(b: Builder) -> World:
    """The one world in which nothing that was sent is open any more, but by whoever must have it open."""
    ledger = replay(b.history())
    assert ledger.lost == ""
    assert ledger.mismatches("charge", "guests", "owner", "answer") == ()
    return min(ledger.worlds, key=lambda world: len(world.references))


def test_a_mirror_pays_nothing_and_answers() -> None:
    b = mirrored()
    b.observe("mirrored", {"source": 1}, guests=1)
    b.status("mirror", "destination")
    world = only(b)
    assert world.mirrors == {LedgerMirror("mirror", "owner")}
    assert world.holders == {"owner", "mirror"}
    vm = world.vm("mirror")
    assert vm is not None and (vm.agent, vm.created) == ("destination", 2)


def test_a_mirror_that_is_charged_does_not_fit() -> None:
    b = mirrored()
    b.observe("mirrored", {"source": 1, "destination": 1}, guests=1)
    found = replay(b.history()).mismatches("charge")
    assert {(m.where, m.key, m.seen) for m in found} == {(".", "sev", 2), ("destination", "sev", 1)}


def test_the_owner_closed_first_lives_on_in_its_mirror() -> None:
    b = mirrored()
    b.do("close", "source", vm="owner")
    b.exit("source")
    b.observe("owner-gone", {"source": 1}, guests=1)
    assert only(b).context("owner") is not None
    b.do("close", "destination", vm="mirror")
    b.exit("destination")
    b.observe("all-gone", {}, guests=0)
    world = only(b)
    assert (world.contexts, world.mirrors) == (frozenset(), frozenset())


def test_the_mirror_closed_first_leaves_the_owner_alone() -> None:
    b = mirrored()
    b.do("close", "destination", vm="mirror")
    b.status("owner", "source")
    b.observe("mirror-gone", {"source": 1}, guests=1)
    assert only(b).holders == {"owner"}


def test_a_moved_owner_takes_its_mirrors_along() -> None:
    b = mirrored()
    b.launch("new", "destination")
    b.move("owner", "new", "destination")
    b.observe("moved", {"destination": 1}, guests=1)
    assert only(b).mirrors == {LedgerMirror("mirror", "new")}
    b.exit("source")
    b.do("close", "destination", vm="new")
    b.observe("closed", {"destination": 1}, guests=1)
    b.do("close", "destination", vm="mirror")
    b.observe("all-gone", {}, guests=0)
    assert only(b).mirrors == frozenset()


def test_a_moved_mirror_still_pays_nothing() -> None:
    b = mirrored()
    b.launch("new", "source")
    b.do("send_fd", "destination", vm="mirror", to="source")
    b.move("mirror", "new", "source")
    b.observe("moved", {"source": 1}, guests=1)
    b.status("new", "source")
    b.ask("mirror", "destination", dead=True)
    world = only(b)
    assert world.mirrors == {LedgerMirror("new", "owner")}
    assert world.dead == {"mirror"}


def test_a_mirror_under_way_keeps_its_owner() -> None:
    b = Builder()
    b.begin()
    b.launch("owner", "source", "sev")
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="other")
    b.do("send_fd", "source", vm="owner", to="destination")
    invoke = b.invoke("mirror", "destination", vm="mirror", source="owner")
    b.do("close", "source", vm="owner")
    b.done(invoke)
    b.observe("mirrored", {"source": 1}, guests=1)
    assert only(b).holders == {"owner", "mirror"}


def test_a_mirror_that_failed_over_its_vcpus_is_one() -> None:
    b = mirrored()
    b.do("create", "destination", vm="second", kind="mirror", vcpus=1, memory="other")
    invoke = b.invoke("mirror", "destination", vm="second", source="owner")
    b.done(invoke, "fail", error=errno.EEXIST, value={"call": "KVM_CREATE_VCPU"})
    b.status("second", "destination")
    assert "second" in only(b).holders
    invoke = b.invoke("mirror", "destination", vm="second", source="owner")
    b.done(invoke, "fail", error=errno.EINVAL, value={"call": "KVM_ENABLE_CAP VM_COPY_ENC_CONTEXT_FROM"})
    assert len(only(b).mirrors) == 2


def test_a_mirror_of_a_mirror_cannot_be() -> None:
    b = mirrored()
    b.do("create", "destination", vm="second", kind="mirror", vcpus=1, memory="other")
    b.do("mirror", "destination", vm="second", source="mirror")
    assert replay(b.history()).lost.startswith("mirror of second succeeded")


def test_registers_are_sealed_where_they_are() -> None:
    b = mirrored("sev_es")
    b.do("launch_update_vmsa", "source", vm="owner")
    world = only(b)
    context, mirror = world.context("owner"), world.mirror("mirror")
    assert context is not None and mirror is not None
    assert (context.sealed, mirror.sealed) == (True, False)
    b.do("launch_update_vmsa", "destination", vm="mirror")
    mirror = only(b).mirror("mirror")
    assert mirror is not None and mirror.sealed
    b.do("create", "source", vm="bare", kind="plain", vcpus=1, memory="guest")
    b.do("launch_update_vmsa", "source", vm="bare")
    assert "launch_update_vmsa of bare" in replay(b.history()).lost


def test_a_task_that_moves_leaves_its_charges_behind() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    b.observe("entered", {"source": 1, "elsewhere": 0}, guests=1)
    b.launch("second", "source", "sev")
    b.observe("second", {"source": 1, "elsewhere": 1}, guests=2)
    assert only(b).home("source") == "elsewhere"
