# SPDX-License-Identifier: Apache-2.0
"""The one place from which ioctls are made.

A verdict compares the times of operations in different processes, so the clock is read right before and right after
the system call and nowhere else; `timed` collects those readings for an operation that makes several calls.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chaos.kvm.numbers import Ioctl

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int


class KernelError(OSError):
    """The kernel refused. `call` names the ioctl (with its command, for SEV), `firmware` is the PSP's status, 0 if
    the PSP was not asked or did not answer."""

    def __init__(self, number: int, call: str, *, firmware: int = 0) -> None:
        name = errnos.errorcode.get(number, str(number))
        status = f", firmware status {firmware}" if firmware else ""
        super().__init__(number, f"{call}: {name}: {os.strerror(number)}{status}")
        self.number = number
        self.call = call
        self.firmware = firmware


@dataclass(slots=True)
class Watch:
    """CLOCK_MONOTONIC ns before the first and after the last call; 0 if there was none."""

    began: int = 0
    ended: int = 0


_watches = threading.local()


@contextmanager
def timed() -> Iterator[Watch]:
    """Measure the calls that this thread makes inside."""
    before = getattr(_watches, "watch", None)
    _watches.watch = watch = Watch()
    try:
        yield watch
    finally:
        _watches.watch = before


def mark(began: int, ended: int) -> None:
    """Count a system call that is no ioctl towards the operation being measured."""
    watch: Watch | None = getattr(_watches, "watch", None)
    if watch is not None:
        watch.began = watch.began or began
        watch.ended = ended


def attempt(fd: int, number: int, argument: Any = None) -> tuple[int, int]:
    """Make the call: its result and 0, or -1 and the errno. `argument` is a number, None or `ctypes.byref`."""
    began = time.monotonic_ns()
    result = _libc.ioctl(fd, number, argument)
    ended = time.monotonic_ns()
    mark(began, ended)
    return result, ctypes.get_errno() if result < 0 else 0


def ioctl(fd: int, number: Ioctl, argument: Any = None, *, call: str = "") -> int:
    """Make the call and return its result. Raises `KernelError`."""
    result, error = attempt(fd, number, argument)
    if error:
        raise KernelError(error, call or number.name)
    return result
