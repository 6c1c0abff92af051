# SPDX-License-Identifier: Apache-2.0
"""A crew of native threads, from its start to its join: what `loops` and `vcpus` have in common."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import threading
from collections.abc import Callable

from chaos.errors import HostLacks, InternalError
from chaos.linux.fd import OwnedFd
from chaos.native.board import boards, map_memory, new_memory, size_of
from chaos.native.layout import Report
from chaos.native.library import load

# The library, a crew, the memory file and the offsets of the boards in it; returns an errno.
SetUp = Callable[[ctypes.CDLL, int, int, tuple[int, ...]], int]

LEAD = 2_000_000  # ns from the moment when all threads are ready until they begin


class Crew:
    """Started threads. What is said on `stop` and `join` of those who have one holds for all of them."""

    def __init__(
        self, rings: tuple[int, ...], set_up: SetUp, *, memory: int | None, at: int, lead: int, gate: int | None = None
    ) -> None:
        """`memory` and `gate` stay their owner's. Raises OSError, `HostLacks`."""
        self._library = load()
        self._lock = threading.Lock()
        self._done = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))
        self._crew: int | None = None
        self._mapped: mmap.mmap | None = None
        try:
            with _memory(rings, memory) as file:
                self._crew = self._library.crew_new(len(rings), self._done.number)
                if self._crew is None:
                    raise MemoryError(f"a crew of {len(rings)}")
                offsets = tuple(sum(map(size_of, rings[:index])) for index in range(len(rings)))
                _check(set_up(self._library, self._crew, file.number, offsets), "preparing native threads")
                self._mapped = map_memory(file.number)
                self.boards = boards(self._mapped)
            begin = ctypes.c_uint64()
            through = -1 if gate is None else gate
            error = self._library.crew_start(self._crew, at, lead, through, ctypes.byref(begin))
            _check(error, "starting native threads")
            self.begin = begin.value
        except BaseException:
            self._free()
            raise

    def fileno(self) -> int:
        """Readable when all threads have ended. Closed by `join`."""
        return self._done.number

    def stop(self) -> None:
        with self._lock:
            if self._crew is not None:
                self._library.crew_stop(self._crew)

    def interrupt(self) -> None:
        with self._lock:
            if self._crew is not None:
                self._library.crew_interrupt(self._crew)

    def wait(self, within: float) -> bool:
        """Whether all threads have ended, after at most `within` seconds."""
        if not self._done.is_open:
            return True
        poll = select.poll()
        poll.register(self._done.number, select.POLLIN)
        return bool(poll.poll(max(0.0, within) * 1000))

    def join(self, within: float, doing: Callable[[], str]) -> None:
        """Wait for the end, and let go of everything but the boards. Raises TimeoutError, which says `doing`."""
        if not self.wait(within):
            raise TimeoutError(f"native threads did not end within {within:g} s: {doing()}")
        with self._lock:
            if self._crew is not None:
                _check(self._library.crew_join(self._crew), "joining native threads")
                self._free()

    def _free(self) -> None:
        """Of a crew that does not run. Of its memory a copy stays."""
        if self._crew is not None:
            error = self._library.crew_free(self._crew)
            if error:
                raise InternalError(f"native threads were to be freed while they ran: {os.strerror(error)}")
            self._crew = None
        if self._mapped is not None:
            self.boards = boards(bytes(self._mapped))
            self._mapped.close()
            self._mapped = None
        self._done.close()


def _memory(rings: tuple[int, ...], memory: int | None) -> OwnedFd:
    """A descriptor of our own for the memory file."""
    if memory is None:
        return new_memory(rings)
    needed, size = sum(map(size_of, rings)), os.fstat(memory).st_size
    if size != needed:
        raise InternalError(f"the memory file has {size} bytes, these threads want {needed}")
    if any(os.pread(memory, ctypes.sizeof(Report), 0)):
        raise InternalError("the memory file has been used before")
    return OwnedFd(os.dup(memory))


def _check(error: int, what: str) -> None:
    if error == errno.EAGAIN:
        raise HostLacks(f"{what}: no more threads are allowed", remedy="raise `ulimit -u` or the cgroup's pids.max")
    if error:
        raise OSError(error, f"{what}: {os.strerror(error)}")
