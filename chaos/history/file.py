# SPDX-License-Identifier: Apache-2.0
"""A history as a file: written record by record, and read up to where it is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from chaos.history.records import (
    FORMAT,
    Done,
    End,
    Header,
    Held,
    History,
    Invoke,
    Observation,
    Overdue,
    Record,
    decode,
    encode,
)


def up_to_damage(records: Sequence[Record], unreadable: str = "") -> History:
    """The records before the first that cannot be, and what the problem is. What comes after it rests on what is lost.

    `unreadable` says what follows the records in the file, if that is not a record.
    """
    found = _first_problem(records)
    if found is not None:
        kept, damage = found
        return History(tuple(records[:kept]), damage)
    if unreadable or not records:
        return History(tuple(records), unreadable or "it is empty")
    return History(tuple(records), "" if _is_end(records[-1]) else f"it breaks off after record {len(records) - 1}")


def _first_problem(records: Sequence[Record]) -> tuple[int, str] | None:
    """How many records are good, and what the problem is then. That the end is missing is not looked at."""
    begun: set[int] = set()
    under_way: set[int] = set()
    for number, record in enumerate(records):
        problem = _out_of_place(number, record, after_end=number > 0 and _is_end(records[number - 1]))
        if problem:
            return number, problem
        if isinstance(record, Header) and record.format != FORMAT:
            return 1, _other_format(record.format)
        if isinstance(record, Invoke):
            if record.op in begun:
                return number, f"record {number} begins operation {record.op} a second time"
            begun.add(record.op)
            under_way.add(record.op)
        elif isinstance(record, Done):
            if record.op not in under_way:
                return number, f"record {number} answers operation {record.op}, which is not under way"
            under_way.remove(record.op)
        elif isinstance(record, Held | Overdue) and record.op not in begun:
            return number, f"record {number} is about operation {record.op}, which was not begun"
    return None


def _out_of_place(number: int, record: Record, *, after_end: bool) -> str:
    """Why this cannot be the record of that number, "" if it can."""
    if number == 0 and not isinstance(record, Header):
        return "it does not begin with a header"
    if record.seq != number:
        return f"record {number} is missing: {record.seq} stands in its place"
    if after_end:
        return f"record {number} comes after the end"
    if number > 0 and isinstance(record, Header):
        return f"record {number} is another header"
    if isinstance(record, Observation) and not all(_is_count(n) for f in record.misc.values() for n in _values(f)):
        return f"record {number} has a number that no counter shows"
    return ""


def _values(files: dict[str, dict[str, int]]) -> Iterator[int]:
    for values in files.values():
        yield from values.values()


def _is_count(number: int) -> bool:
    """64 bits, signed or not: the kernel prints a counter below zero without its sign."""
    return -(1 << 63) <= number < 1 << 64


def _is_end(record: Record) -> bool:
    return isinstance(record, End)


def _other_format(number: int) -> str:
    return f"it has format {number}, this program reads {FORMAT}"


class _Format(msgspec.Struct):
    format: int


def read(path: Path) -> History:
    """Read up to the first damage, and say what it is. Raises OSError if there is no such file."""
    records: list[Record] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(decode(line))
            except msgspec.DecodeError as error:
                newer = _format_of(line) if number == 1 else FORMAT
                damage = f"line {number} is damaged: {error}" if newer == FORMAT else _other_format(newer)
                return up_to_damage(records, damage)
    return up_to_damage(records)


def format_of(path: Path) -> int:
    """The format that a history says it has; ours if it does not say. Raises OSError if there is no such file."""
    with path.open("rb") as lines:
        return _format_of(lines.readline())


def _format_of(line: bytes) -> int:
    """Of a header that cannot be read for what else is in it; ours if it does not say."""
    try:
        return msgspec.json.decode(line, type=_Format).format
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return FORMAT


class Writer:
    """Writes a history down. One writer a file; each record is with the kernel before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._seq = 0
        self.records: list[Record] = []

    def write(self, record: Record) -> Record:
        """Number the record and append it; returns it as written."""
        numbered = msgspec.structs.replace(record, seq=self._seq)
        self._seq += 1
        data = memoryview(encode(numbered))
        while data:  # a disk that is almost full takes a part
            data = data[os.write(self._fd, data) :]
        self.records.append(numbered)
        return numbered

    def close(self) -> None:
        os.close(self._fd)

    def history(self) -> History:
        return up_to_damage(self.records)
