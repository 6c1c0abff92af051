# SPDX-License-Identifier: Apache-2.0
"""Places at which an operation can be stopped inside the kernel, and how to see that it is.

Each kind of hold is a class here or beside: it arms a place, sees whether a thread is stopped there, and lets it go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from chaos.experiment.steps import VCPU_RUNNING
from chaos.kvm.numbers import Ioctl
from chaos.linux.kallsyms import base_name
from chaos.linux.kfault import Happening, Kfault, Slot
from chaos.linux.task import Sleeper

PlaceKind = Literal["vcpu", "lock", "kernel", "page", "firmware"]


class Place(Protocol):
    """`kind`, `function` and `command` are what `chaos.history.records.Held` says of it."""

    @property
    def kind(self) -> PlaceKind: ...

    @property
    def function(self) -> str: ...

    @property
    def command(self) -> str: ...

    def stops(self, sleeper: Sleeper, tid: int) -> bool:
        """Whether this thread, as it is now, is stopped here."""

    def release(self) -> None:
        """Let go whatever is stopped here, and stop nothing any more. Once."""


@dataclass(slots=True)
class Unarmed:
    """What a move comes to by itself: `at` is one of `chaos.experiment.steps.UNARMED`."""

    at: str
    function: str = ""
    command: str = ""

    @property
    def kind(self) -> PlaceKind:
        return "vcpu" if self.at == VCPU_RUNNING else "lock"

    def stops(self, sleeper: Sleeper, tid: int) -> bool:
        return waits(sleeper, self.at)

    def release(self) -> None:
        """Whoever keeps the move waiting lets go of it."""


@dataclass(slots=True)
class KernelEntry:
    """The entry of a kernel function, held by kfault."""

    kfault: Kfault
    slot: Slot
    _reached: set[int]
    kind: PlaceKind = "kernel"
    command: str = ""

    @classmethod
    def arm(cls, kfault: Kfault, function: str, *, nth: int, pid: int | None) -> KernelEntry:
        """Raises `Refused`."""
        return cls(kfault, kfault.hold(function, nth=nth, pid=pid), set())

    @property
    def function(self) -> str:
        return base_name(self.slot.function)

    def stops(self, sleeper: Sleeper, tid: int) -> bool:
        """The module says that the thread came here, and the kernel that it sleeps in the module."""
        while (event := self.kfault.wait(self.slot, Happening.REACHED, within=0)) is not None:
            self._reached.add(event.tid)
        return tid in self._reached and sleeper.state == "D"

    def release(self) -> None:
        self.kfault.clear(self.slot)


@dataclass(slots=True)
class MissingPageHold:
    """The page from which a SEV command reads its arguments. `place` puts it there, which only its process can do; one
    that has died needs it no more."""

    place: Callable[[], None]
    kind: PlaceKind = "page"
    function: str = ""
    command: str = ""

    def stops(self, sleeper: Sleeper, tid: int) -> bool:
        return waits_for_page(sleeper)

    def release(self) -> None:
        self.place()


# The functions in which a move waits. For the vCPUs of either VM, once it has charged its cgroup: up to 6.15, from
# 6.16, and where a compiler has put the former into its caller. For the lock of either VM, before it has done anything.
PLACES: dict[str, frozenset[str]] = {
    "vcpu-running": frozenset({"sev_lock_vcpus_for_migration", "kvm_lock_all_vcpus", "sev_vm_move_enc_context_from"}),
    "vm-locked": frozenset({"sev_lock_two_vms"}),
}
# Where a thread waits for a page that is userfaultfd's to bring.
AT_PAGE = "handle_userfault"


def waits(sleeper: Sleeper, place: str) -> bool:
    """Whether the thread is a move that is stopped at `place`."""
    return sleeper.state == "D" and sleeper.in_ioctl(Ioctl.KVM_ENABLE_CAP) and sleeper.sleeping in PLACES[place]


def waits_for_page(sleeper: Sleeper) -> bool:
    """Whether the thread is a SEV command that waits for a page of its arguments.

    A fault of the kernel's own sleeps in state S, and yet no signal ends it but a fatal one: the others only make it
    fault again (`fault_signal_pending`).
    """
    there = sleeper.state in ("S", "D") and sleeper.sleeping == AT_PAGE
    return there and sleeper.in_ioctl(Ioctl.KVM_MEMORY_ENCRYPT_OP)
