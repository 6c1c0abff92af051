# SPDX-License-Identifier: Apache-2.0
"""Pages that a CPU has not put away yet."""

from __future__ import annotations

import contextlib
import mmap
import os


def drain_page_batches() -> None:
    """Have every CPU that this thread may run on put away the pages in its batches (`struct folio_batch`, mm/swap.c).

    A page that was brought in on a CPU is referred to by that CPU's batch until the batch is full or drained. Meanwhile
    it is charged to its memory cgroup, and that stays when it is removed, although whoever had the page is gone. Taking
    a mapping away drains the batch of the CPU on which that is done: `lru_add_drain()` in `unmap_region()` (6.1,
    mm/mmap.c), in `vms_clear_ptes()` (6.12 on, mm/vma.c).
    """
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in sorted(allowed):
            with contextlib.suppress(OSError):  # gone offline meanwhile, and then it has no batch any more
                os.sched_setaffinity(0, {cpu})
                mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    finally:
        os.sched_setaffinity(0, allowed)
