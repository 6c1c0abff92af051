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

# One that neither the C library nor Python nor our native threads use. Realtime signals queue: each one is handled.
STORM_SIGNAL = signal.SIGRTMIN + 5
_SYS_EXIT = 60  # x86-64; of this thread alone
_PAGE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long

_pipes: list[int] = []


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


def handled() -> int:
    """How many signals of storms were handled since this was asked last. Who asks first has them handled from then on,
    and must be the process's first thread."""
    if not _pipes:
        _listen()
    found = 0
    with suppress(BlockingIOError):
        while True:
            found += os.read(_pipes[0], 1 << 16).count(STORM_SIGNAL)
    return found


def _listen() -> None:
    """The C handler writes a byte into a pipe each time, in whatever thread it runs; Python's runs now and then."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(STORM_SIGNAL, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _pipes.append(reader)
