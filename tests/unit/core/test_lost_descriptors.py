# SPDX-License-Identifier: Apache-2.0
"""Descriptors that were closed behind a VMM's back: what they answer says nothing of the VM, and what is left of it
must keep every promise."""

from __future__ import annotations

from errno import EBADF, EIO, ENODEV

from chaos.history.questions import ANYBODY, THE_DEAD, kind_of
from chaos.history.reading import said_dead
from chaos.history.records import Answer, Asked, History
from tests.unit.core.build import Builder
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, verdict_of


def answers(b: Builder, *, vm: int, vcpu: int) -> Asked:
    """What the dead are asked, of the VM's descriptor and of the vCPU's, answered so. This kernel has no device."""
    said = {"vm": vm, "vcpu 0": vcpu}
    told = tuple(
        Answer(fd=fd, ioctl=ioctl, errno=said[fd], control=0)
        for questions in (ANYBODY, THE_DEAD)
        for fd in said
        for ioctl in questions[kind_of(fd)]
    )
    return b.add(Asked(t=b.tick(), agent="source", vm="old", step=-1, answers=told, device=ENODEV))


def lost(
    *, vcpu: int, vm: int = EBADF, charges: dict[str, int] | None = None, error: int = 0, fd: str = "vm"
) -> History:
    """The source loses its VM's descriptor after it has sent it, and the move goes on."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="old", to="destination")
    b.do("lose_fd", "source", vm="old", fd=fd)
    b.status("old", "source", error=EBADF)
    b.observe("lost", charges or {"source": 1})
    b.move("old", "new", "destination", error=error)
    b.observe("after", {"source" if error else "destination": 1})
    answers(b, vm=vm, vcpu=vcpu)
    b.status("new", "destination")
    b.do("close", "source", vm="old")
    b.do("close", "destination", vm="new")
    b.observe("closed", {})
    return b.finish()


def test_what_is_left_of_the_source_must_be_dead() -> None:
    assert verdict_of("P3", lost(vcpu=EIO)).outcome is HELD
    assert verdict_of("P3", lost(vcpu=0)).signature == "source-after-move:answered"
    verdict = verdict_of("P3", lost(vcpu=EBADF))
    assert verdict.outcome is UNKNOWN and "was asked nothing" in verdict.reason


def test_a_descriptor_that_nobody_closed_was_not_asked() -> None:
    verdict = verdict_of("P3", lost(vcpu=EIO, fd="vcpu 0"))
    assert verdict.outcome is UNKNOWN and "vm of old answered EBADF only" in verdict.reason


def test_only_a_descriptor_that_answers_ebadf_to_everything_is_closed() -> None:
    b = Builder()
    one = answers(b, vm=0, vcpu=EIO)
    mixed = Asked(t=0, agent="source", vm="old", step=-1, answers=(
        Answer(fd="vm", ioctl="KVM_GET_CLOCK", errno=EIO, control=0),
        Answer(fd="vm", ioctl="KVM_MEMORY_ENCRYPT_OP GUEST_STATUS", errno=EBADF, control=0),
    ))  # fmt: skip
    assert said_dead(one) is None and said_dead(mixed) is None
    assert said_dead(answers(Builder(), vm=EBADF, vcpu=EIO)) is True
    assert said_dead(answers(Builder(), vm=EBADF, vcpu=0)) is False


def test_the_vcpus_keep_the_vm_and_its_charge() -> None:
    assert verdict_of("P1", lost(vcpu=EIO)).outcome is HELD
    wrong = verdict_of("P1", lost(vcpu=EIO, charges={"source": 0}))
    assert (wrong.outcome, wrong.signature) == (DEVIATED, "undercharged-before-move:sev")


def test_a_status_through_a_lost_descriptor_says_nothing_of_the_owner() -> None:
    b = Builder()
    b.begin()
    b.launch("new", "destination")
    b.do("lose_fd", "destination", vm="new", fd="vm")
    b.status("new", "destination", error=EBADF)  # EBADF of a VM that has no context: from the table of files
    assert "two-own" not in verdict_of("P4", b.finish()).signature


def test_who_has_lost_a_descriptor_is_refused_for_that() -> None:
    def refused(fd: str, f: str, error: int) -> str:
        b = Builder()
        b.begin()
        b.launch("old", "source", "sev")
        b.do("lose_fd", "source", vm="old", fd=fd)
        b.do(f, "source", vm="old", error=error)
        return verdict_of("P7", b.finish()).signature

    for fd in ("vm", "sev"):
        assert refused(fd, "launch_measure", EBADF) == ""
        assert refused(fd, "launch_measure", 0).startswith("launch_measure:ok-for-EBADF")
    assert refused("vcpu 0", "launch_measure", 0) == ""


def test_a_destination_without_the_firmwares_descriptor_cannot_be_told_from_one_that_works() -> None:
    """EBADF is then what it has to be answered, and no sign that the context has lost anything."""
    for fd, outcome in (("sev", UNKNOWN), ("vcpu 0", DEVIATED)):
        b = Builder()
        b.begin()
        b.launch("old", "source", "sev")
        b.launch("new", "destination")
        b.status("old", "source")
        b.move("old", "new", "destination")
        b.do("lose_fd", "destination", vm="new", fd=fd)
        b.status("new", "destination", error=EBADF)
        assert verdict_of("P5", b.finish()).outcome is outcome
