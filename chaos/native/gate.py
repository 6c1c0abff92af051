# SPDX-License-Identifier: Apache-2.0
"""A moment at which threads of several processes begin.

It is not known beforehand: everybody has to be ready first, which takes as long as it takes. So it stands in a memory
file that all of them map (`struct gate` of native.h), as a CLOCK_MONOTONIC time in ns, and 0 until then. Threads that
are ready look there. Then all wait for each other once more, because one may have lost its CPU: who makes a single call
before it, a loop after its first, each for a second at most.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time

from chaos.linux.fd import OwnedFd

# Until then every thread has looked again, and has had time to get a CPU of its own.
AHEAD = 20_000_000
PARTIES = 8  # where their number stands


def new(parties: int) -> OwnedFd:
    """A gate that is shut, for so many threads. Raises OSError."""
    file = OwnedFd(os.memfd_create("gate", os.MFD_CLOEXEC))
    os.truncate(file.number, mmap.PAGESIZE)
    os.pwrite(file.number, parties.to_bytes(4, sys.byteorder), PARTIES)
    return file


def open_at(gate: int, when: int | None = None) -> int:
    """Open it at the moment `when`, or in a little while; returns the moment. Raises OSError."""
    when = time.monotonic_ns() + AHEAD if when is None else when
    memory = mmap.mmap(gate, mmap.PAGESIZE)
    ctypes.c_uint64.from_buffer(memory).value = when  # at once: nobody may see half of it
    return when
