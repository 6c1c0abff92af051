# SPDX-License-Identifier: Apache-2.0
"""Writes a run's history out, a record a line, each gone from this process before anything else happens."""

from __future__ import annotations

import os
import time
from typing import Literal

from chaos.history import records
from chaos.history.records import Note, Record


class OutsideGone(Exception):
    """Nobody reads the history any more."""


class Recorder:
    """`fd` is the outside's pipe. Records are numbered there."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gone = False

    def now(self) -> int:
        return time.monotonic_ns()

    def write(self, record: Record) -> None:
        """Raises `OutsideGone`, once; after that the run only cleans up, and what it says is dropped."""
        self.send(records.encode(record))

    def send(self, line: bytes) -> None:
        """A line that may be no record; the same otherwise."""
        if self._gone:
            return
        data = memoryview(line)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            self._gone = True
            raise OutsideGone from None

    def note(self, topic: Literal["skipped", "error", "left", "progress"], text: str, step: int = -1) -> None:
        self.write(Note(t=self.now(), topic=topic, text=text, step=step))

    def lost(self, witness: Literal["log", "guests", "firmware", "events", "entries"], text: str) -> None:
        """A witness is lost, or a part of what it had to say."""
        self.write(Note(t=self.now(), topic="witness", text=text, witness=witness))
