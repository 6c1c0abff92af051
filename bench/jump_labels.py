# SPDX-License-Identifier: Apache-2.0
"""Does the lab's kernel live through the patching of its jump labels? `docs/lab.md` says what it could die of.

    sevchaos lab run --copy bench/jump_labels.py -- python3 jump_labels.py [SECONDS]

Switches the scheduler's statistics on and off, whose jump labels every context switch comes by, while two processes
do nothing but switch. Without the handler in `sevshim.ko` Linux 6.12 panicked after 7 s.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

STATISTICS = Path("/proc/sys/kernel/sched_schedstats")
GONE = Path("/sys/module/sevshim/parameters/gone")
DEFAULT_SECONDS = 60.0


def main() -> None:
    seconds = float(sys.argv[1]) if sys.argv[1:] else DEFAULT_SECONDS
    there, back = os.pipe(), os.pipe()
    players = [_forever(lambda: _pass_on(back[0], there[1])), _forever(lambda: _pass_on(there[0], back[1]))]
    os.write(there[1], b".")
    end, toggles = time.monotonic() + seconds, 0
    try:
        for toggles in itertools.count():
            STATISTICS.write_text(str(toggles % 2))
            if time.monotonic() > end:
                break
    finally:
        for player in players:
            os.kill(player, 9)
            os.waitpid(player, 0)
        STATISTICS.write_text("0")
    print(f"{toggles} times in {seconds:.0f} s; {GONE.read_text().strip()} breakpoints were met when they were gone")


def _pass_on(source: int, destination: int) -> None:
    os.write(destination, os.read(source, 1))


def _forever(step: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    while True:
        step()


if __name__ == "__main__":
    main()
