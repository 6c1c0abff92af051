# SPDX-License-Identifier: Apache-2.0
"""Deadlines of what a lab does. Seconds in which this machine had no CPU for QEMU do not count: what is slow because
others are at work here does not hang."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept_waiting(pid: int) -> float:
    """Seconds for which that thread of a process that had to wait longest for a CPU has waited in all; 0 if it has
    ended, or if nobody counts it (CONFIG_SCHED_INFO)."""
    delays = [0]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            delays.append(int((thread / "schedstat").read_text().split()[1]))
    return max(delays) / 1e9


async def first_of(waited: set[asyncio.Future[Any]], deadline: float | None, kept: Callable[[], float]) -> None:
    """Return when one of them is done, or `deadline` seconds and as many more as `kept` has grown by meanwhile are
    over. They go on then."""
    began, before = time.monotonic(), kept()
    left = deadline
    while left is None or left > 0:
        if (await asyncio.wait(waited, timeout=left, return_when=asyncio.FIRST_COMPLETED))[0]:
            return
        assert deadline is not None
        left = deadline + kept() - before - (time.monotonic() - began)
