# SPDX-License-Identifier: Apache-2.0
"""Waiting for several things at once, in one thread, each time with a deadline and a word for what is waited for."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

# Where the kernel offers no event to wait for, a condition is looked at again after this many seconds.
LOOK_AGAIN = 0.005


class TimedOut(Exception):
    """`what` did not happen within the time it was given."""

    def __init__(self, what: str, within: float) -> None:
        super().__init__(f"waited {within:g} s for {what}")
        self.what = what
        self.within = within


class Loop:
    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}

    def watch(self, fd: int, handler: Callable[[], object]) -> None:
        """Call `handler` whenever `fd` can be read or has reached its end."""
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def turn(self, within: float) -> None:
        """Handle what is there, waiting at most `within` seconds for something to come."""
        for fd, _ in self._poll.poll(max(0.0, within) * 1000):
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier handler of this turn may have taken it off
                handler()

    def wait(self, done: Callable[[], bool], within: float, what: str, *, look: float | None = None) -> None:
        """Turn until `done`. With `look` it is asked at least every so many seconds, else after each event only.

        Raises `TimedOut`.
        """
        deadline = time.monotonic() + within
        self.turn(0)
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut(what, within)
            self.turn(left if look is None else min(left, look))
