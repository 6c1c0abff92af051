# SPDX-License-Identifier: Apache-2.0
"""What a process of ours does to itself right after it was forked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from typing import NoReturn

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.prctl.restype = ctypes.c_int


def die_with(parent: int) -> None:
    """Be killed when the thread that forked this process ends. `parent` is its process, which may be gone already.

    It outlives an exec, and may be set in the child before one.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
        os._exit(1)


def be_told_of_parents_death(number: signal.Signals) -> None:
    """From now on this signal comes when the parent dies, instead of what `die_with` asked for. Raises OSError."""
    if _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def leave_streams() -> None:
    """Let go of standard input and output. The one is the orders, the other the history; neither is ours."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if null > 2:
        os.close(null)


def keep_only(fds: Collection[int]) -> None:
    """Close every other descriptor but the standard streams."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first = 3
    for fd in sorted(fd for fd in fds if fd > 2):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, limit)


def allow_many_files() -> None:
    """As many descriptors as may be had: one VM for each ASID of a large machine takes hundreds."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def be_mortal() -> None:
    """Die of SIGTERM, and of no signal with a core file: these deaths are wanted."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


_WANTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def fork(body: Callable[[], int]) -> int:
    """Fork a child that runs `body` and exits with what it returns. Its pid, to the parent.

    Signals that ask a program to end are held back meanwhile. One that arrived inside the fork would be lost in a
    library's at-fork hook, or would be raised in the child as if that were the parent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before = {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _WANTED)}
    try:
        pid = os.fork()
        if pid == 0:
            _become(body, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _become(body: Callable[[], int], mask: set[signal.Signals]) -> NoReturn:
    code = 70
    try:
        for number in _WANTED:
            signal.signal(number, signal.SIG_IGN)  # the terminal tells everybody; the runner decides what is done
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
