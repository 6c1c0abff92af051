# SPDX-License-Identifier: Apache-2.0
"""A vCPU on a native thread.

The thread sits in KVM_RUN and takes note of what the guest says of itself by writing to two ports: its counter (a
tick), and that it found memory stale. The time of a tick is read right after KVM_RUN has returned with it, so from the
last tick at a source to the first at the destination is how long the guest stood still, to an interrupt's precision.
"""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field

from chaos.kvm.numbers import exit_name
from chaos.linux.fd import OwnedFd
from chaos.native.board import Why, boards, copy_memory, new_memory
from chaos.native.crew import Crew
from chaos.native.layout import Report


@dataclass(frozen=True, slots=True)
class Seen:
    """What the guest has said since the start: its counter, how often memory was stale, when the first and the last
    tick came (CLOCK_MONOTONIC ns, 0: none came), how many came before memory was stale (`sound`), and how often it left
    to the VMM for that or anything else. A signal that was to stop nobody has `interrupted` KVM_RUN so often, `early`
    of these before the guest had left by itself for the first time."""

    ticks: int
    stale: int
    first_tick: int
    last_tick: int
    sound: int
    exits: int
    interrupted: int = 0
    early: int = 0


@dataclass(frozen=True, slots=True)
class Left:
    """A vCPU that is out of the guest. If `why` is STOPPED its registers are whole. `detail` is the errno, the exit's
    number, or the port."""

    seen: Seen
    why: Why
    detail: int

    @property
    def reason(self) -> str:
        """Why it ended by itself; "" if it was stopped."""
        match self.why:
            case Why.FAILED:
                return f"KVM_RUN: {errno.errorcode.get(self.detail, self.detail)}"
            case Why.EXITED:
                return exit_name(self.detail)
            case Why.PORT:
                return f"an access to port {self.detail:#x}, which the guest does not make"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuThread:
    """A vCPU by its descriptor and the address of its shared area, both kept until the join. `ticks` is where the
    guest's counter stands: a tick tells its low half only. After each tick it stays out of the guest for `rest` ns."""

    fd: int
    area: int
    tick_port: int
    stale_port: int
    ticks: int = 0
    rest: int = 0

    @staticmethod
    def memory() -> OwnedFd:
        """A memory file for one start, which another process can read with `read_vcpu` if this one is killed."""
        return new_memory((0,))

    def start(self, *, memory: int | None = None, at: int | None = None, lead: int = 0) -> RunningVcpu:
        """Enter the guest: at once, or at the moment `at`, or `lead` ns after the thread is ready.

        Raises OSError, `HostLacks`.
        """

        def set_up(library: ctypes.CDLL, crew: int, file: int, offsets: tuple[int, ...]) -> int:
            vcpu = self.fd, self.area, self.ticks, self.tick_port, self.stale_port
            return int(library.crew_set_vcpu(crew, 0, *vcpu, file, offsets[0], self.rest))

        return RunningVcpu(Crew((0,), set_up, memory=memory, at=at or 0, lead=max(lead, 1)))


@dataclass(frozen=True, slots=True)
class RunningVcpu:
    _crew: Crew = field(repr=False)

    @property
    def tid(self) -> int:
        return int(self._report().tid)

    def fileno(self) -> int:
        """Readable when the vCPU has left for good. Closed by `join`."""
        return self._crew.fileno()

    def seen(self) -> Seen:
        """So far. Each number is one that was true; they may be of two ticks that follow each other."""
        return _seen(self._report())

    def stop(self) -> None:
        """Take the vCPU out of the guest; `join` waits until it is."""
        self._crew.stop()

    def wait(self, within: float) -> bool:
        """Whether the vCPU has left for good, after at most `within` seconds."""
        return self._crew.wait(within)

    def join(self, within: float) -> Left:
        """Wait at most `within` seconds for the vCPU to leave. Raises TimeoutError; it may be joined again then."""
        self._crew.join(within, lambda: f"thread {self.tid} is in KVM_RUN")
        return self._left()

    def left(self) -> Left | None:
        """How it left, None while it has not."""
        return self._left() if self.wait(0) else None

    def _left(self) -> Left:
        report = self._report()
        return Left(_seen(report), Why(report.why), report.detail)

    def _report(self) -> Report:
        return self._crew.boards[0].report()


def read_vcpu(memory: int) -> Seen:
    """What a guest had said when its VMM was killed, from the memory file of its thread. Raises OSError."""
    return _seen(boards(copy_memory(memory))[0].report())


def _seen(report: Report) -> Seen:
    return Seen(
        ticks=report.ticks,
        stale=report.stale,
        first_tick=report.first_tick,
        last_tick=report.last_tick,
        sound=report.sound,
        exits=report.calls,
        interrupted=report.interrupted,
        early=report.early,
    )
