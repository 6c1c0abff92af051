# SPDX-License-Identifier: Apache-2.0
"""What an agent does to itself when a fault wants it: things that go wrong inside a VMM, and cannot from outside."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# One that neither the C library nor Python uses, and that the native threads of vCPUs let in (chaos/native/crew.c).
# Realtime signals queue: each one is handled.
STORM_SIGNAL = signal.SIGRTMIN + 5
_SYS_EXIT = 60  # x86-64; of this thread alone
_PAGE = 4096
_MEBIBYTE = 1 << 20
_CAP_VERSION_3 = 0x20080522
CAP_IPC_LOCK = 14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long

_handled: dict[int, int] = {}
"""By process, where the signals of storms that it has handled are read: a process that was forked has its own."""


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def lose(fd: int) -> None:
    """Close a descriptor behind its owner's back. Its number stays taken, by something that answers every use of it as
    a closed one does: else the next file that is opened would get it, and be taken for the old one."""
    nothing = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.dup2(nothing, fd, inheritable=False)
    finally:
        os.close(nothing)


def is_lost(fd: int) -> bool:
    # Not by /proc/self, which has nothing left once the first thread has ended.
    return Path(f"/proc/thread-self/fd/{fd}").readlink() == Path("/")


def end_first_thread(successor: Callable[[], None]) -> NoReturn:
    """End the process's first thread, and go on in another. The process lives as long as that one does."""
    threading.Thread(target=successor, name="successor").start()
    _libc.syscall(_SYS_EXIT, 0)
    raise AssertionError("a thread that has ended went on")


def eat(mebibytes: int) -> None:
    """Use so much memory, every page of it, and give it back."""
    memory = bytearray(mebibytes << 20)
    for at in range(0, len(memory), _PAGE):
        memory[at] = 1


def may_lock(allowed: bool) -> None:
    """Have CAP_IPC_LOCK in force in this thread, or keep it back. Raises OSError: EPERM if it never was to be had."""
    header, data = _CapHeader(_CAP_VERSION_3, 0), (_CapData * 2)()
    _caps("capget", header, data)
    bit = 1 << CAP_IPC_LOCK
    data[0].effective = data[0].effective | bit if allowed else data[0].effective & ~bit
    _caps("capset", header, data)


def _caps(name: str, header: _CapHeader, data: ctypes.Array[_CapData]) -> None:
    if getattr(_libc, name)(ctypes.byref(header), data):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


class MemoryPress:
    """Memory that is used until this is ended. Whoever asks for it may be made to wait, so that is a thread."""

    def __init__(self, mebibytes: int) -> None:
        self._kept: list[ctypes.Array[ctypes.c_char]] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._use, args=(mebibytes,), name="press", daemon=True)
        self._thread.start()

    def _use(self, mebibytes: int) -> None:
        for _ in range(mebibytes):
            if self._enough.is_set():
                return
            self._kept.append(ctypes.create_string_buffer(_MEBIBYTE))
            ctypes.memset(self._kept[-1], 1, _MEBIBYTE)  # a foreign function: others may run while it waits

    def end(self) -> None:
        """The mebibyte that is being asked for is the last; it comes, however late."""
        self._enough.set()
        self._thread.join()
        self._kept.clear()


def press(mebibytes: int, before: MemoryPress | None) -> MemoryPress | None:
    """Give back what was used before, and use so much."""
    if before is not None:
        before.end()
    return MemoryPress(mebibytes) if mebibytes else None


def handled() -> int:
    """How many signals of storms were handled since this was asked last. Who asks first has them handled from then on,
    and must be the process's first thread."""
    reader = _handled.get(os.getpid())
    if reader is None:
        reader = _handled[os.getpid()] = _listen()
    found = 0
    with suppress(BlockingIOError):
        while True:
            found += os.read(reader, 1 << 16).count(STORM_SIGNAL)
    return found


def _listen() -> int:
    """The C handler writes a byte into a pipe each time, in whatever thread it runs; Python's runs now and then."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(STORM_SIGNAL, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader
