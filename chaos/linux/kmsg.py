# SPDX-License-Identifier: Apache-2.0
"""The kernel's log during a run.

/dev/kmsg gives a record a read: "priority,sequence,microseconds,flags;text", then continuation lines. The priority's
low three bits are the level, the rest is the facility: 0 is the kernel, anything else was written by a process. A
reader that falls behind gets EPIPE once and goes on with what is left.

The log has a clock of its own, which is milliseconds beside CLOCK_MONOTONIC from boot on and drifts slowly. How far, is
seen from a line that the reader writes itself.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos.linux.fd import OwnedFd

RECORD_LIMIT = 1 << 13
TAINT_WARN = 1 << 9
PATH = Path("/dev/kmsg")
SIGNATURE = "sevchaos: the reader of this log is at work"
_AS_USER_DEBUG = "<15>"  # which no console shows


@dataclass(frozen=True, slots=True)
class Line:
    """`t` in nanoseconds since boot, on the clock of the kernel's log."""

    level: int
    t: int
    text: str
    kernel: bool = True  # false for a line that a process wrote


class Lost(Exception):
    """Part of the log, or all that is to come, cannot be read."""


def parse(record: bytes) -> Line:
    """Raises ValueError if it is no record."""
    head, separator, body = record.decode(errors="replace").partition(";")
    fields = head.split(",")
    if not separator or len(fields) < 3:
        raise ValueError(f"not a record of /dev/kmsg: {record[:80]!r}")
    priority, microseconds = int(fields[0]), int(fields[2])
    text = body.split("\n", 1)[0]
    return Line(level=priority & 7, t=microseconds * 1000, text=text, kernel=priority >> 3 == 0)


class KernelLog:
    """Reads from the moment it is opened, and before that what the kernel has said since an earlier reader of the same
    boot, another run, closed it: else that would be nobody's. `ahead` is how many nanoseconds CLOCK_MONOTONIC is ahead
    of the log's clock, None until a signature was heard."""

    def __init__(self, path: Path = PATH) -> None:
        """Raises OSError."""
        self.signed = self.heard = 0
        self.ahead: int | None = None
        self._path = path
        self._written: tuple[int, int] = 0, 0  # CLOCK_MONOTONIC around the last signature
        self._doubt = 0
        self.fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        self._kept: list[Line] = self._since_another()

    def _since_another(self) -> list[Line]:
        """Read up to the end. None of it counts unless another reader has signed the log."""
        since: list[Line] | None = None
        while True:
            try:
                record = os.read(self.fd.number, RECORD_LIMIT)
                line = parse(record)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    continue
                break
            except ValueError:
                os.lseek(self.fd.number, 0, os.SEEK_END)
                break
            if not line.kernel and line.text.startswith(SIGNATURE):
                since = []
            elif line.kernel and since is not None:
                since.append(line)
        return since or []

    def sign(self) -> None:
        """Write a line into the log, to be read back: a quiet log and a dead reader look the same. Raises OSError."""
        line = f"{_AS_USER_DEBUG}{SIGNATURE} ({os.getpid()}.{self.signed})\n".encode()
        with OwnedFd(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)) as log:
            began = time.monotonic_ns()
            os.write(log.number, line)
            self._written = began, time.monotonic_ns()
        self.signed += 1

    def compare(self, lost: Callable[[str], None]) -> None:
        """See how far `ahead` is. What the kernel says meanwhile is kept for `lines`. Raises OSError and `Lost`."""
        for _ in range(2):  # the first goes through code that nobody has used for long
            self.sign()
            self._kept = list(self.lines(lost))  # what was kept before is among them

    def lines(self, lost: Callable[[str], None]) -> Iterator[Line]:
        """What the kernel has said until now. `lost` is told of what was overwritten before it could be read.

        Raises `Lost` if it cannot be read at all.
        """
        kept, self._kept = self._kept, []
        yield from kept
        while True:
            try:
                record = os.read(self.fd.number, RECORD_LIMIT)
                line = parse(record)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise Lost(f"/dev/kmsg: {error.strerror}") from error
                lost("the kernel's log was overwritten before all of it could be read")
                continue
            except ValueError as error:
                raise Lost(str(error)) from error
            if line.kernel:
                yield line
            elif line.text.startswith(f"{SIGNATURE} ({os.getpid()}."):
                self.heard += 1
                self._timed(line)

    def _timed(self, signature: Line) -> None:
        """It was written between two readings of CLOCK_MONOTONIC; the closer they are, the better."""
        began, ended = self._written
        doubt = ended - began
        if self.heard == self.signed and (self.ahead is None or doubt < self._doubt):
            self.ahead, self._doubt = (began + ended) // 2 - signature.t, doubt

    def close(self) -> None:
        self.fd.close()


def lockdep_off(proc: Path = Path("/proc")) -> str:
    """Why the log tells of no lock any more, "" if it does or never did: lockdep gives one report and ends."""
    try:
        stats = (proc / "lockdep_stats").read_text()
    except OSError:
        return ""
    on = re.search(r"^ *debug_locks: +1$", stats, re.MULTILINE)
    return "" if on else "lockdep has turned itself off since this kernel was booted"


def rearm(tainted: Path = Path("/proc/sys/kernel/tainted"), debug: Path = Path("/sys/kernel/debug")) -> str:
    """Let the kernel give each warning again that it gives once a boot (WARN_ONCE): an earlier run may have used it up.

    Returns why a warning may be missing all the same, "" if none can be.
    """
    try:
        if not int(tainted.read_text()) & TAINT_WARN:
            return ""  # it has not warned since it was booted
        (debug / "clear_warn_once").write_text("1")
    except (OSError, ValueError) as error:
        return f"this kernel has warned before, and what it warns of once a boot cannot be armed again: {error}"
    return ""
