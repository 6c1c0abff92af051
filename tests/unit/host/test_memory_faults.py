# SPDX-License-Identifier: Apache-2.0
"""Faults of memory and of what a cgroup may have, without a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import EINVAL, EIO
from types import SimpleNamespace
from typing import Any

import pytest

from chaos import fault
from chaos.errors import UsageError
from chaos.fault import Evidence
from chaos.history.records import Done
from faults.cpu import CpuThrottle
from faults.memory import PAGE, HolePunch, Memlock, MemoryPressure, MemslotGone, is_hole

MEMORY = 64 * PAGE


@pytest.fixture
def file() -> Iterator[int]:
    number = os.memfd_create("memory")
    os.truncate(number, MEMORY)
    yield number
    os.close(number)


def test_a_hole_is_where_there_were_pages(file: int) -> None:
    os.pwrite(file, b"\1" * MEMORY, 0)
    ctx, punched = SimpleNamespace(vms=SimpleNamespace(memory=lambda vm: file)), HolePunch(page=48, pages=16)
    assert punched.evidence(ctx, "old").struck is False, "withheld"
    punched.apply(ctx, "old")
    assert punched.evidence(ctx, "old").struck is True
    assert os.pread(file, PAGE, 48 * PAGE) == bytes(PAGE) and os.pread(file, PAGE, 47 * PAGE) == b"\1" * PAGE
    assert os.fstat(file).st_size == MEMORY
    os.pwrite(file, b"\2", 50 * PAGE)
    assert punched.evidence(ctx, "old").struck is False, "it was filled again"


def test_where_there_was_no_page_nothing_is_taken(file: int) -> None:
    ctx, punched = SimpleNamespace(vms=SimpleNamespace(memory=lambda vm: file)), HolePunch()
    assert is_hole(file, 48 * PAGE, 16 * PAGE)
    punched.apply(ctx, "old")
    assert punched.evidence(ctx, "old").struck is False


def test_a_limit_to_what_is_locked_is_read_from_the_process() -> None:
    told: list[int | None] = []
    victim = SimpleNamespace(pid=os.getpid(), status=None, limit_memlock=told.append)
    ctx: Any = SimpleNamespace(vmms={"source": victim})
    limited = Memlock(kibibytes=4)
    limited.apply(ctx, "source")
    evidence = limited.evidence(ctx, "source")
    assert evidence.struck is False, "this process has its own limit"
    assert "may lock" in evidence.detail
    assert limited.undo(ctx, "source").endswith("what it could before")
    assert told == [4096, None]
    assert Memlock().undo(ctx, "source") == "there was no limit"


@dataclass
class Slot:
    """A VM whose memory slot is there or not; `errno` is what KVM answers."""

    there: bool = True
    errno: int = 0
    status: int | None = None
    dead: bool = False

    def is_dead(self, vm: str) -> bool:
        return self.dead

    def set_memory(self, vm: str, there: bool) -> Done:
        self.there = self.there if self.errno else there
        return Done(t=0, op=0, outcome="fail" if self.errno else "ok", errno=self.errno)

    def ctx(self) -> Any:
        return SimpleNamespace(vms=self)

    def vmm_of(self, vm: str) -> Any:
        return SimpleNamespace(status=self.status, ask=lambda question: {"there": self.there})


def test_a_slot_goes_and_comes_back() -> None:
    vm, gone = Slot(), MemslotGone()
    assert gone.evidence(vm.ctx(), "old").struck is False
    gone.apply(vm.ctx(), "old")
    assert gone.evidence(vm.ctx(), "old").struck is True
    assert gone.undo(vm.ctx(), "old") == "the slot is there again" and vm.there
    assert MemslotGone().undo(vm.ctx(), "old") == "not applied"


def test_a_slot_that_kvm_keeps_is_not_gone_and_one_of_a_dead_vm_stays_away() -> None:
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        MemslotGone().apply(Slot(errno=5).ctx(), "old")
    vm, gone = Slot(), MemslotGone()
    gone.apply(vm.ctx(), "old")
    vm.errno = 5
    assert gone.undo(vm.ctx(), "old").startswith("the slot stays away")


def test_a_dead_vm_that_keeps_its_slot_was_struck_if_it_said_eio_and_only_then() -> None:
    vm, gone = Slot(errno=EIO, dead=True), MemslotGone()
    assert gone.evidence(vm.ctx(), "old") == Evidence(False, "old is dead and was not asked")
    gone.apply(vm.ctx(), "old")
    assert gone.evidence(vm.ctx(), "old") == Evidence(True, "old is dead and answered EIO")
    assert gone.undo(vm.ctx(), "old") == "nothing to undo: the slot stays"
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION"):
        MemslotGone().apply(Slot(errno=EINVAL, dead=True).ctx(), "old")
    vm, gone = Slot(dead=True), MemslotGone()  # a dead VM that lets go of its slot: P3 is broken, and the fault struck
    gone.apply(vm.ctx(), "old")
    assert gone.evidence(vm.ctx(), "old").struck is True


@dataclass
class Group:
    """A cgroup whose counters are set by hand."""

    high: int = 0
    periods: int = 0
    exists: bool = True
    set: list[object] = field(default_factory=list)

    def home(self, vmm: object) -> str:
        return "source"

    def __getitem__(self, path: str) -> Group:
        return self

    def has(self, controller: str) -> bool:
        return True

    def memory_used(self) -> int:
        return 1 << 20

    def memory_events(self, name: str) -> int:
        return self.high

    def slow_memory(self, above: int | None) -> None:
        self.set.append(above)

    def throttled(self) -> tuple[int, int]:
        return self.periods, 1000 * self.periods

    def limit_cpu(self, quota: int | None, period: int = 100_000) -> None:
        self.set.append((quota, period))

    def ctx(self, asked: list[object]) -> Any:
        return SimpleNamespace(
            cgroups=self, enable_controller=lambda path, which: asked.append(which),
            vmms={"source": SimpleNamespace(ask=lambda question: asked.append(question.mebibytes))},
            wait=lambda happened, within, what: happened(),
        )  # fmt: skip


def test_pressure_is_seen_in_the_events_and_taken_away_before_the_memory_is_given_back() -> None:
    group, pressed, asked = Group(), MemoryPressure(mebibytes=32), list[object]()
    ctx = group.ctx(asked)
    assert pressed.evidence(ctx, "source").struck is False
    assert pressed.undo(ctx, "source") == "there was no limit"
    pressed.apply(ctx, "source")
    assert group.set == [32 << 20] and asked == ["memory", 32]
    assert pressed.evidence(ctx, "source").struck is False, "nobody was over it"
    group.high = 7
    assert pressed.evidence(ctx, "source").struck is True
    pressed.undo(ctx, "source")
    assert group.set[-1] is None and asked[-1] == 0


def test_standing_still_is_counted_from_the_beginning() -> None:
    group, slowed, asked = Group(periods=40), CpuThrottle(percent=20, milliseconds=10), list[object]()
    ctx = group.ctx(asked)
    slowed.apply(ctx, "source")
    assert group.set == [(2000, 10_000)] and asked == ["cpu"]
    assert slowed.evidence(ctx, "source").struck is None
    assert slowed.evidence(ctx, "source").struck is False
    group.periods = 42
    evidence = slowed.evidence(ctx, "source")
    assert evidence.struck is True and "in 2 periods, 2 ms in all" in evidence.detail
    slowed.undo(ctx, "source")
    assert group.set[-1] == (None, 100_000)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("memlock", {"kibibytes": -1}),
        ("hole-punch", {"page": 64}),
        ("hole-punch", {"page": 60, "pages": 5}),
        ("hole-punch", {"way": "forget"}),
        ("memory-pressure", {"mebibytes": 1}),
        ("memslot-gone", {"slot": 0}),
        ("cpu-throttle", {"percent": 100}),
        ("cpu-throttle", {"percent": 1, "milliseconds": 10}),
    ],
)
def test_options_are_checked(name: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        fault.find(name, options)
