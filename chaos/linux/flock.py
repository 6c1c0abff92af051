# SPDX-License-Identifier: Apache-2.0
"""Locks (flock) on directories of the kernel's file systems, where no file of ours can be.

They go with the process that holds them. Such a directory may be opened by others, who could keep a lock for ever, so
whoever waits for one waits with a deadline.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from errno import ETIMEDOUT
from pathlib import Path

from chaos.linux.fd import OwnedFd
from chaos.linux.loop import LOOK_AGAIN

# Under a lock a few files are written; this is for a machine in trouble.
WITHIN = 30.0


def lock(directory: Path) -> OwnedFd:
    """The lock, for as long as this is open. Raises BlockingIOError if somebody has it, and OSError."""
    fd = OwnedFd(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        fd.close()
        raise
    return fd


@contextlib.contextmanager
def locked(directory: Path, within: float = WITHIN) -> Iterator[None]:
    """While one process is inside, no other is. Raises OSError: TimeoutError after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        with contextlib.suppress(BlockingIOError):
            fd = lock(directory)
            break
        if time.monotonic() > deadline:
            raise TimeoutError(ETIMEDOUT, f"another process has kept it locked for {within:g} s", str(directory))
        time.sleep(LOOK_AGAIN)  # there is no event to wait for that has a deadline
    with fd:
        yield
