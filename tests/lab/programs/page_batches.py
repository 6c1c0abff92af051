# SPDX-License-Identifier: Apache-2.0
"""A cgroup that is removed while pages of it are in the batch of a CPU on which nothing goes on.

Prints how many removed cgroups there are a second after it was removed, and after the batches were drained. Now and
then something does go on there; then it is tried again.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

from chaos.linux.batches import drain_page_batches

ROOT = Path("/sys/fs/cgroup")
TIMES = 20
PAGES = 5  # fewer than a batch has room for: 15, and 31 from 6.10 on


def dying() -> int:
    words = dict(line.split() for line in (ROOT / "cgroup.stat").read_text().splitlines())
    return int(words["nr_dying_descendants"])


def settled(within: float) -> int:
    """What `dying` says when it says 0, or else after so many seconds."""
    deadline = time.monotonic() + within
    while dying() and time.monotonic() < deadline:
        time.sleep(0.01)
    return dying()


def main() -> None:
    (ROOT / "cgroup.subtree_control").write_text("+memory")
    for _ in range(TIMES):
        before, after = remove()
        if before:
            break
    print(before, after)


def remove() -> tuple[int, int]:
    here, *_, there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {here})
    group = ROOT / "removed"
    group.mkdir()
    child = os.fork()
    if child == 0:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        os.sched_setaffinity(0, {there})
        pages = mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(PAGES):
            pages[page * mmap.PAGESIZE] = 1
        os.sched_setaffinity(0, {here})
        os._exit(0)
    os.waitpid(child, 0)
    group.rmdir()
    before = settled(1.0)
    os.sched_setaffinity(0, {here, there})
    drain_page_batches()
    return before, settled(5.0)


if __name__ == "__main__":
    main()
