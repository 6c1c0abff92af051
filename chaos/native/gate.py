# SPDX-License-Identifier: Apache-2.0
"""A moment at which threads of several processes begin.

It is not known beforehand: everybody has to be ready first, which takes as long as it takes. So it stands in a memory
file that all of them map, as a CLOCK_MONOTONIC time in ns, and 0 until then. Threads that are ready look there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time

from chaos.kvm.fd import OwnedFd

# Until then every thread has looked again, and has had time to get a CPU of its own.
AHEAD = 20_000_000


def new() -> OwnedFd:
    """A gate that is shut. Raises OSError."""
    file = OwnedFd(os.memfd_create("gate", os.MFD_CLOEXEC))
    os.truncate(file.number, mmap.PAGESIZE)
    return file


def open_at(gate: int, when: int | None = None) -> int:
    """Open it at the moment `when`, or in a little while; returns the moment. Raises OSError."""
    when = time.monotonic_ns() + AHEAD if when is None else when
    memory = mmap.mmap(gate, mmap.PAGESIZE)
    ctypes.c_uint64.from_buffer(memory).value = when  # at once: nobody may see half of it
    return when
