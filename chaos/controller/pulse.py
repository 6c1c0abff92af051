# SPDX-License-Identifier: Apache-2.0
"""Whether the machine under a lab stood still: a virtual machine that its own host paused, or one that starved.

The lab's clock goes on meanwhile, so its kernel finds its CPUs stuck. Nobody inside can tell that from a lockup. Out
here two can: a thread that wakes up far too late, and the CPU time that QEMU has had, which shows that it was not this
process alone that slept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

BEAT: Final = 0.25
STILL: Final = 2.0  # seconds without a beat; the kernel's detectors wait for 5 at least
SHARE: Final = 0.2  # of that time, CPU time of QEMU's that shows that the lab went on
NS: Final = 1_000_000_000


class Pulse:
    """Between `with` and its end, `stalls` has from when to when the machine stood still, in ns of CLOCK_MONOTONIC.
    `ran` is how many seconds of CPU time the lab has had."""

    def __init__(self, ran: Callable[[], float]) -> None:
        self.stalls: list[tuple[int, int]] = []
        self._ran = ran
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _listen(self) -> None:
        before, had = time.monotonic_ns(), self._ran()
        while not self._over.wait(BEAT):
            now, has = time.monotonic_ns(), self._ran()
            self.beat(before, now, has - had)
            before, had = now, has

    def beat(self, before: int, now: int, ran: float) -> None:
        """It was heard last at `before`, and the lab had `ran` seconds of CPU time since."""
        slept = (now - before) / NS
        if slept >= STILL and ran < SHARE * slept:
            self.stalls.append((before, now))
