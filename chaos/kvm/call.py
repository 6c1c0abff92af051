# SPDX-License-Identifier: Apache-2.0
"""The one place from which ioctls are made, and in which the VMs and vCPUs of a VMM are closed.

A verdict compares the times of operations in different processes, so the clock is read right before and right after
the system call and nowhere else; `timed` collects those readings for an operation that makes several calls.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from chaos.history.records import Value
from chaos.kvm.numbers import Ioctl
from chaos.linux.fd import OwnedFd

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int
_libc.close.argtypes = (ctypes.c_int,)
_libc.close.restype = ctypes.c_int


class KernelError(OSError):
    """The kernel refused. `call` names the ioctl (with its command, for SEV), `firmware` is the PSP's status, 0 if
    the PSP was not asked or did not answer. `told` is what came back all the same, by name."""

    told: Mapping[str, Value] = {}

    def __init__(self, number: int, call: str, *, firmware: int = 0) -> None:
        name = errnos.errorcode.get(number, str(number))
        status = f", firmware status {firmware}" if firmware else ""
        super().__init__(number, f"{call}: {name}: {os.strerror(number)}{status}")
        self.number = number
        self.call = call
        self.firmware = firmware


# Given the thread that makes the call.
Around = Callable[[int], AbstractContextManager[None]]


@dataclass(slots=True)
class Watch:
    """CLOCK_MONOTONIC ns before the first and after the last call; 0 if there was none. Calls are made in `around`."""

    began: int = 0
    ended: int = 0
    around: Around | None = None


class Maker(Protocol):
    """Makes calls. Each answers with its result and 0, or -1 and the errno."""

    def ioctl(self, fd: int, number: int, argument: Any) -> tuple[int, int]: ...

    def close(self, fd: int) -> tuple[int, int]: ...


class _Libc:
    def ioctl(self, fd: int, number: int, argument: Any) -> tuple[int, int]:
        result = _libc.ioctl(fd, number, argument)
        return result, ctypes.get_errno() if result < 0 else 0

    def close(self, fd: int) -> tuple[int, int]:
        result = _libc.close(fd)
        return result, ctypes.get_errno() if result < 0 else 0


_MADE_BY_LIBC = _Libc()
_watches = threading.local()


@contextmanager
def timed(around: Around | None = None) -> Iterator[Watch]:
    """Measure the calls that this thread makes inside, and make each of them inside `around`."""
    before = getattr(_watches, "watch", None)
    _watches.watch = watch = Watch(around=around)
    try:
        yield watch
    finally:
        _watches.watch = before


@contextmanager
def made_by(maker: Maker) -> Iterator[None]:
    """Have `maker` make the calls of this thread. What it does around them counts as theirs where times are taken."""
    _watches.maker = maker
    try:
        yield
    finally:
        _watches.maker = None


def made_otherwise() -> bool:
    """Whether somebody else makes the calls of this thread (`made_by`)."""
    return getattr(_watches, "maker", None) is not None


def mark(began: int, ended: int) -> None:
    """Count a system call that is no ioctl towards the operation being measured."""
    watch: Watch | None = getattr(_watches, "watch", None)
    if watch is not None:
        watch.began = watch.began or began
        watch.ended = ended


@contextmanager
def outside(tid: int = 0) -> Iterator[None]:
    """For what waits in the kernel and is no ioctl of ours: made as those are, inside `timed`'s `around`. Thread `tid`
    makes the call, this one if it is 0."""
    watch: Watch | None = getattr(_watches, "watch", None)
    if watch is None or watch.around is None:
        yield
    else:
        with watch.around(tid or threading.get_native_id()):
            yield


def attempt(fd: int, number: int, argument: Any = None) -> tuple[int, int]:
    """Make the call: its result and 0, or -1 and the errno. `argument` is a number, None or `ctypes.byref`."""
    watch: Watch | None = getattr(_watches, "watch", None)
    if watch is None or watch.around is None:
        return _attempt(fd, number, argument)
    with watch.around(threading.get_native_id()):
        return _attempt(fd, number, argument)


def _attempt(fd: int, number: int, argument: Any) -> tuple[int, int]:
    maker = _maker()
    began = time.monotonic_ns()
    result, error = maker.ioctl(fd, number, argument)
    ended = time.monotonic_ns()
    mark(began, ended)
    return result, error


def close(fd: OwnedFd) -> None:
    """Close it, if it is still open: the last of a VM's is its end. Raises OSError, and closed it is all the same."""
    if not fd.is_open:
        return
    error = _maker().close(fd.steal())[1]
    if error:
        raise OSError(error, f"close: {os.strerror(error)}")


def _maker() -> Maker:
    return getattr(_watches, "maker", None) or _MADE_BY_LIBC


def ioctl(fd: int, number: Ioctl, argument: Any = None, *, call: str = "") -> int:
    """Make the call and return its result. Raises `KernelError`."""
    result, error = attempt(fd, number, argument)
    if error:
        raise KernelError(error, call or number.name)
    return result
