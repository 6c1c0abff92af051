# SPDX-License-Identifier: Apache-2.0
"""A network namespace without a name, and the threads in which one is made and looked into.

unshare(2) and setns(2) with CLONE_NEWNET change the namespace of the calling thread alone. So what has to be done in
another namespace is done in a thread that is started for it and ends with it. The caller's own thread never leaves its
namespace: there is no way back to forget, and no signal that could come in between. A forked child would do as well,
but forking is what a process with a warm runner in it should do least.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from chaos.errors import HostLacks, InternalError

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h

# What a call into the kernel may take. All of them are short, but they queue up behind whoever holds the rtnl lock,
# and a namespace that is being taken down holds it for long.
WITHIN = 10.0

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)


def enter(fd: int) -> None:
    """Move the calling thread into the network namespace that `fd` refers to, for good.

    Meant for a process with one thread that is about to become a VMM. Raises `HostLacks` or OSError: EINVAL if `fd` is
    no network namespace.
    """
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        raise refused(ctypes.get_errno(), "enter a network namespace")


def refused(number: int, doing: str, said: str = "") -> OSError | HostLacks:
    """The error for a call that the kernel refused: `doing` is what was wanted, `said` the kernel's own words."""
    if number in (errno.EPERM, errno.EACCES):
        return HostLacks(f"it is not permitted to {doing}", remedy="become root: CAP_SYS_ADMIN and CAP_NET_ADMIN")
    return OSError(number, f"cannot {doing}: {said or os.strerror(number)}")


def aside(work: Callable[[], T], *, what: str, within: float, discard: Callable[[T], object] | None = None) -> T:
    """Do `work` in a thread of its own, and return what it returns or raise what it raises.

    After `within` seconds this is a TimeoutError that says `what` was waited for. The thread is then left to itself,
    since nothing can stop a call into the kernel; what it returns all the same goes to `discard`.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                outcome.set_exception(error)
            return
        try:
            outcome.set_result(result)
        except concurrent.futures.InvalidStateError:  # nobody waits any more
            if discard is not None:
                discard(result)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    try:
        concurrent.futures.wait([outcome], within)
    except BaseException:  # a signal ended the wait
        if not outcome.cancel() and discard is not None and outcome.exception() is None:
            discard(outcome.result())
        raise
    if outcome.cancel():
        raise TimeoutError(errno.ETIMEDOUT, f"waited {within:g} s to {what}")
    thread.join()  # the caller may be about to fork, and means to be alone then
    return outcome.result()


class Namespace:
    """A network namespace that lives as long as this object holds it, or a process or a socket is in it.

    It does not close itself when it is forgotten. `inode` is the number that /proc/PID/ns/net shows.
    """

    __slots__ = ("_fd", "inode")

    def __init__(self, fd: int) -> None:
        """`fd` refers to a network namespace, and is this object's from now on."""
        self._fd: int | None = fd
        self.inode = os.fstat(fd).st_ino

    @classmethod
    def create(cls, *, within: float = WITHIN) -> Namespace:
        """A new one, with nothing in it but a loopback device that is down. Raises `HostLacks` or OSError."""
        return cls(aside(_unshare, what="make a network namespace", within=within, discard=os.close))

    @property
    def fd(self) -> int:
        """For `enter`. It stays this object's, and is closed on exec; a forked child has a copy."""
        if self._fd is None:
            raise InternalError("a network namespace was used after it was given up")
        return self._fd

    def residents(self) -> tuple[int, ...]:
        """The processes in it that this one may look at. A descriptor or a socket elsewhere also keeps it."""
        return residents(self.inode)

    def close(self) -> None:
        """Let go of it, if that has not happened yet. When it goes is up to its processes and to the kernel."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def residents(inode: int) -> tuple[int, ...]:
    """The processes in the network namespace of that inode number, as far as this process may look."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it is gone, or not ours to look at
                if (process / "ns/net").stat().st_ino == inode:
                    found.append(int(process.name))
    return tuple(sorted(found))


def _unshare() -> int:
    if _libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        if number == errno.ENOSPC:
            raise HostLacks(
                "there are as many network namespaces as this user may have",
                remedy="raise the sysctl user.max_net_namespaces",
            )
        if number == errno.EINVAL:
            raise HostLacks("the kernel has no network namespaces", remedy="a kernel with CONFIG_NET_NS")
        raise refused(number, "make a network namespace")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
