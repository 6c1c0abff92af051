# SPDX-License-Identifier: Apache-2.0
"""Loops of ioctls on native threads."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.errors import InternalError
from chaos.linux.fd import OwnedFd
from chaos.native import layout
from chaos.native.board import NativeCall, Ran, boards, copy_memory, new_memory, ran
from chaos.native.crew import LEAD, Crew

_CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
RING = 1 << 16  # records: 1.5 MB a thread
_LONGEST_RING = 1 << 24
_MOST_CPUS = 1024  # of glibc's cpu_set_t
_NICEST = 19
_END_WITHIN = 20.0  # of a loop that is left with `with`; a call takes no longer unless something holds it


@dataclass(frozen=True, slots=True)
class LoopStep:
    """One ioctl. `argument` is a number, or the bytes of a structure: the thread passes the address of a copy.

    The kernel may write into that copy, and what it wrote is passed again in the next round unless `reset`. A number in
    the bytes that is an address is not followed: what lies there is the caller's to keep until the join.
    """

    fd: int
    request: int
    argument: int | bytes = 0
    reset: bool = False

    def __post_init__(self) -> None:
        if self.argument == b"" or (self.reset and isinstance(self.argument, int)):
            raise InternalError(f"{self} has no bytes")


@dataclass(frozen=True, slots=True)
class LoopProgram:
    """What one thread does: the steps in order, for so many `rounds`, or until stopped if that is None.

    `offset` is ns after the common beginning. `ends_at` are errnos that end the thread, 0 among them for a success,
    `more` calls after the first of them. With `ends_all` they end every other thread too, each after the call it is in.
    `cpu` pins the thread; `nice` says how gladly it gives way to others, from 0 to 19.
    """

    steps: tuple[LoopStep, ...]
    rounds: int | None = 1
    offset: int = 0
    cpu: int | None = None
    ends_at: frozenset[int] = frozenset()
    more: int = 0
    ends_all: bool = False
    nice: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise InternalError("a program without steps")
        if (self.rounds is not None and self.rounds < 1) or self.offset < 0 or self.more < 0:
            raise InternalError(
                f"a program of {self.rounds} rounds, {self.offset} ns after the beginning, {self.more} more"
            )
        if self.cpu is not None and not 0 <= self.cpu < _MOST_CPUS:
            raise InternalError(f"a program for CPU {self.cpu}")
        if not 0 <= self.nice <= _NICEST:
            raise InternalError(f"a program as nice as {self.nice}")
        if not all(0 <= number < layout.ERRNOS for number in self.ends_at):
            raise InternalError(f"a program that ends at errnos {sorted(self.ends_at)}")


@dataclass(frozen=True, slots=True)
class LoopOutcome:
    """What all threads did. `begin` is the common beginning."""

    begin: int
    threads: tuple[Ran, ...]

    def calls(self) -> Iterator[NativeCall]:
        """All recorded calls of all threads by the time they began."""
        return heapq.merge(*self.threads, key=attrgetter("began"))

    @property
    def rate(self) -> float:
        """Calls per second, from the first thread's beginning to the last one's end; 0 if there was none."""
        began = [thread.began for thread in self.threads if thread.calls]
        if not began:
            return 0.0
        return sum(thread.calls for thread in self.threads) * 1e9 / (self.ended - min(began))

    @property
    def ended(self) -> int:
        return max(thread.ended for thread in self.threads)


@dataclass(frozen=True, slots=True)
class NativeLoop:
    """Programs to be run by as many threads, which begin together. `ring` is how many calls each keeps a record of, a
    power of two: the latest ones. With 0 they are counted only."""

    programs: tuple[LoopProgram, ...]
    ring: int = RING

    def __post_init__(self) -> None:
        if not self.programs:
            raise InternalError("a loop without programs")
        if self.ring & (self.ring - 1) or not 0 <= self.ring <= _LONGEST_RING:
            raise InternalError(f"a ring of {self.ring} records: it is to be a power of two, at most {_LONGEST_RING}")

    @property
    def _rings(self) -> tuple[int, ...]:
        return (self.ring,) * len(self.programs)

    def memory(self) -> OwnedFd:
        """A memory file for one start of this loop. Give it to another process and it can `read` what was done even
        if this one is killed. Raises OSError."""
        return new_memory(self._rings)

    def start(
        self, *, memory: int | None = None, at: int | None = None, lead: int = LEAD, gate: int | None = None
    ) -> RunningLoop:
        """Create the threads and let them begin at the moment `at`, or `lead` ns after all of them are ready. With a
        `gate` (`chaos.native.gate`) they are ready when this returns, and begin when it is opened.

        The file descriptors must stay open until the join. Raises OSError (EINVAL: a CPU that is not there),
        `HostLacks`.
        """

        def set_up(library: ctypes.CDLL, crew: int, file: int, offsets: tuple[int, ...]) -> int:
            counter = _counter_is_clock()
            for index, (program, offset) in enumerate(zip(self.programs, offsets, strict=True)):
                steps, kept = _native_steps(program.steps)
                plan = _native_plan(program, steps, self.ring, counter)
                error = int(library.crew_set_loop(crew, index, ctypes.byref(plan), file, offset))
                del kept  # until here: the library has copied the arguments
                if error:
                    return error
            return 0

        return RunningLoop(Crew(self._rings, set_up, memory=memory, at=at or 0, lead=lead, gate=gate))


def _native_steps(
    steps: Sequence[LoopStep],
) -> tuple[ctypes.Array[layout.StepLayout], list[ctypes.Array[ctypes.c_char]]]:
    """The steps, and the buffers they point to."""
    native = (layout.StepLayout * len(steps))()
    kept = []
    for place, step in zip(native, steps, strict=True):
        place.fd, place.request, place.reset = step.fd, step.request, step.reset
        if isinstance(step.argument, bytes):
            buffer = ctypes.create_string_buffer(step.argument, len(step.argument))
            place.argument, place.size = ctypes.addressof(buffer), len(step.argument)
            kept.append(buffer)
        else:
            place.argument = step.argument
    return native, kept


def _native_plan(
    program: LoopProgram, steps: ctypes.Array[layout.StepLayout], ring: int, counter: bool
) -> layout.LoopPlan:
    plan = layout.LoopPlan(
        steps=steps,
        count=len(steps),
        rounds=program.rounds or 0,
        ring=ring,
        offset=program.offset,
        cpu=-1 if program.cpu is None else program.cpu,
        more=program.more,
        ends_all=program.ends_all,
        nice=program.nice,
        counter=counter,
    )
    for number in program.ends_at:
        plan.meets[number // 64] |= 1 << number % 64
    return plan


def _counter_is_clock() -> bool:
    """Whether the kernel takes the time stamp counter for its clock, so that all CPUs have the same."""
    try:
        return _CLOCK_SOURCE.read_text().strip() == "tsc"
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class RunningLoop:
    """Started threads. Leaving it with `with` stops and joins them."""

    _crew: Crew = field(repr=False)

    @property
    def begin(self) -> int:
        """The common beginning, which may be ahead; without a meaning where there is a gate."""
        return self._crew.begin

    @property
    def tids(self) -> tuple[int, ...]:
        return tuple(int(board.report().tid) for board in self._crew.boards)

    def fileno(self) -> int:
        """Readable when all threads have ended. Closed by `join`."""
        return self._crew.fileno()

    @property
    def begun(self) -> bool:
        """Whether every thread is at its calls, or was."""
        return all(board.report().began for board in self._crew.boards)

    def calls(self) -> tuple[int, ...]:
        """How many calls each thread has finished so far."""
        return tuple(int(board.report().calls) for board in self._crew.boards)

    def stop(self) -> None:
        """Let each thread end after the call it is in."""
        self._crew.stop()

    def interrupt(self) -> None:
        """Send each thread a signal that ends a call which can be interrupted, with EINTR. A thread that is just about
        to make its call is missed."""
        self._crew.interrupt()

    def wait(self, within: float) -> bool:
        """Whether all threads have ended, after at most `within` seconds."""
        return self._crew.wait(within)

    def join(self, within: float) -> LoopOutcome:
        """Wait at most `within` seconds for the threads to end by themselves, and free what was theirs.

        Raises TimeoutError, which says what they are at. They go on then, and may be joined again.
        """
        self._crew.join(within, self._doing)
        return LoopOutcome(self.begin, tuple(ran(index, board) for index, board in enumerate(self._crew.boards)))

    def _doing(self) -> str:
        reports = (board.report() for board in self._crew.boards)
        return ", ".join(
            f"thread {report.tid} is in step {report.call} after {report.calls} calls"
            for report in reports
            if not report.ended
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._crew.join(_END_WITHIN, self._doing)


def read(memory: int) -> tuple[Ran, ...]:
    """What the threads did whose memory file this is, after their process has ended. Raises OSError.

    A thread that was killed has `why` UNDER_WAY, and if calls were recorded says which one had not ended.
    """
    return tuple(ran(index, board) for index, board in enumerate(boards(copy_memory(memory))))
