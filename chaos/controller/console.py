# SPDX-License-Identifier: Apache-2.0
"""What the serial console says of a kernel, beside the kernel's log.

Both show the same messages, and the log tells more of each: its level, and all that are not urgent. But a kernel that
panics stops whoever reads its log, and its last words come out on the console only. So a line of the console becomes a
record of the history if no `Kernel` record has said it. That is known at the end of a run, when both have come.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from chaos.history.records import Console, Header, Kernel, Record

# "[   12.345678] text", with CONFIG_PRINTK_CALLER "[   12.345678][  T123] text".
_PREFIX = re.compile(r"\[ *(?P<seconds>\d+)\.(?P<microseconds>\d{6})\](?:\[ *[TC]\d+\])? ?(?P<text>.*)")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")  # as /dev/kmsg gives what does not print


@dataclass(frozen=True, slots=True)
class Heard:
    """A line as it came, after a record of the time `after`."""

    text: str
    after: int


def unsaid(lines: Iterable[Heard], records: Sequence[Record]) -> Iterator[Console]:
    """The lines that came in the run of these records and that none of them says, in order."""
    header = next((record for record in records if isinstance(record, Header)), None)
    ahead = (header.log_ahead if header is not None else None) or 0
    said = {
        (record.t - ahead, text) for record in records if isinstance(record, Kernel) for text in _printed(record.text)
    }
    untimed = {text for _, text in said}
    for line in lines:
        found = _PREFIX.fullmatch(line.text)
        if found is None:
            if line.text.strip() and line.text not in untimed:
                yield Console(t=line.after, text=line.text)
            continue
        at = int(found["seconds"]) * 1_000_000_000 + int(found["microseconds"]) * 1_000
        before = header is not None and at + ahead < header.t  # the console is slow: this was said before the run
        if not before and (at, found["text"]) not in said:
            yield Console(t=at + ahead, text=line.text)


def _printed(text: str) -> list[str]:
    """A message of the log as a console prints it: in lines, nothing escaped."""
    plain = _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), text.encode())
    return plain.decode(errors="replace").split("\n")


class SerialConsole:
    """The serial console of a host that outlives a run: its lines go to the log of the run that is on.

    `heard` are those of this run, each with the time of the record before it.
    """

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self.after = 0
        self._file: TextIO | None = None

    def line(self, text: str) -> None:
        if self._file is not None:
            self._file.write(f"{text}\n")
            self.heard.append(Heard(text, self.after))

    @contextlib.contextmanager
    def into(self, path: Path) -> Iterator[None]:
        self.heard, self.after = [], 0
        with path.open("w", buffering=1) as self._file:
            yield
        self._file = None
