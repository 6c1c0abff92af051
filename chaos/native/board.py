# SPDX-License-Identifier: Apache-2.0
"""What a native thread has done so far: a report, a count for each errno, and a ring of the latest calls.

Boards lie one after another in a memory file, each on pages of its own. Reading one needs nothing but the file, so it
makes no difference whether the thread works, was joined, or was killed with its process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

from chaos.errors import InternalError
from chaos.linux.fd import OwnedFd
from chaos.native.layout import RECORD, CallRecord, Head, Report

_HEAD = ctypes.sizeof(Head)
_RECORD = ctypes.sizeof(CallRecord)
_NOT_ZERO = re.compile(rb"[^\0]")  # a loop over all counts would take an emulated CPU 10 ms


class Why(IntEnum):
    """Why a thread ended; `enum why` of native.h."""

    UNDER_WAY = 0
    ROUNDS = 1  # all rounds are done
    STOPPED = 2
    MET = 3  # an errno that was to end it
    FAILED = 4  # KVM_RUN failed
    EXITED = 5  # the guest left for a reason that it has not
    PORT = 6  # the guest used a port that it has not


@dataclass(frozen=True, slots=True)
class NativeCall:
    """`index` is the step's in its program; `errno` is 0 for a success. The call lies between `began` and `ended`."""

    thread: int
    index: int
    began: int
    ended: int
    errno: int


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A call that had not ended, or whose end was not yet written down: it may have happened."""

    thread: int
    index: int
    began: int


class Board:
    """One thread's board, `offset` bytes into a memory file that is mapped, or was copied."""

    __slots__ = ("_memory", "_offset")

    def __init__(self, memory: mmap.mmap | bytes, offset: int) -> None:
        self._memory = memory
        self._offset = offset

    def report(self) -> Report:
        """A copy. While the thread works, no number of it is older than the last."""
        return Report.from_buffer_copy(self._memory, self._offset)

    def errnos(self) -> dict[int, int]:
        """How many calls had which errno; 0 for successes."""
        place = self._offset + ctypes.sizeof(Report)
        counts = self._memory[place : self._offset + _HEAD]
        used = sorted({found.start() // 8 for found in _NOT_ZERO.finditer(counts)})
        return {number: int.from_bytes(counts[number * 8 : number * 8 + 8], "little") for number in used}

    def ring(self, first: int, last: int, size: int) -> tuple[memoryview, memoryview]:
        """The records of calls `first` to `last` (not included), oldest first, in two pieces where the ring wraps."""
        if last - first > size:
            raise InternalError(f"{last - first} records were asked of a ring of {size}")
        place = self._offset + _HEAD
        whole = memoryview(self._memory)[place : place + size * _RECORD]
        if first == last:
            return whole[:0], whole[:0]
        begin, end = first % size, (last - 1) % size + 1
        if begin < end:
            return whole[begin * _RECORD : end * _RECORD], whole[:0]
        return whole[begin * _RECORD :], whole[: end * _RECORD]


@dataclass(frozen=True, slots=True)
class Ran:
    """What one thread did. Times are CLOCK_MONOTONIC ns, 0 for what has not happened.

    `overwritten` counts the oldest calls, which are no longer in the ring; with recording off, all of them.
    The times of records were off by at most `clock_error`, which is 0 if each is a reading of the clock.
    `records` are the others in the layout of `layout.RECORD`, oldest first, in two pieces.
    """

    thread: int
    tid: int
    began: int
    ended: int
    calls: int
    errnos: Mapping[int, int]
    why: Why
    detail: int
    overwritten: int
    clock_error: int
    records: tuple[memoryview, memoryview]
    under_way: UnderWay | None

    def __iter__(self) -> Iterator[NativeCall]:
        for piece in self.records:
            for began, ended, index, errno in struct.iter_unpack(RECORD, piece):
                yield NativeCall(self.thread, index, began, ended, errno)

    def column(self, word: int) -> array[int]:
        """One 32-bit word of each record on record, oldest first: counted from the end, -1 is its errno, -2 its index.

        There may be hundred thousands, and in the lab Python takes 10 us for each; this is worked out on their bytes.
        """
        values = array("I")
        for piece in filter(len, self.records):
            values.frombytes(piece.cast("I")[_RECORD // 4 + word :: _RECORD // 4].tobytes())
        return values

    def call_at(self, place: int) -> NativeCall:
        """The call whose record is at that place among those that are kept."""
        for piece in self.records:
            if place * _RECORD < len(piece):
                began, ended, index, errno = struct.unpack_from(RECORD, piece, place * _RECORD)
                return NativeCall(self.thread, index, began, ended, errno)
            place -= len(piece) // _RECORD
        raise IndexError(place)


def ran(thread: int, board: Board) -> Ran:
    """Of a thread that is not working any more: it was joined, or its process has ended."""
    report = board.report()
    why = Why(report.why)
    kept = report.ring
    if why is Why.UNDER_WAY and kept:
        kept -= 1  # killed: one place may hold half of a new record
    first = max(0, report.calls - kept)
    records = board.ring(first, report.calls, report.ring)
    return Ran(
        thread=thread,
        tid=report.tid,
        began=report.began,
        ended=report.ended,
        calls=report.calls,
        errnos=board.errnos(),
        why=why,
        detail=report.detail,
        overwritten=first,
        clock_error=report.clock_error,
        records=records,
        under_way=_under_way(thread, report, records) if why is Why.UNDER_WAY else None,
    )


def _under_way(thread: int, report: Report, records: tuple[memoryview, memoryview]) -> UnderWay | None:
    """A call is under way from its `since` on, which the one before it had ended by."""
    latest = records[1] or records[0]
    ended = struct.unpack_from(RECORD, latest, len(latest) - _RECORD)[1] if latest else 0
    if not report.since or report.since < ended:
        return None
    return UnderWay(thread, report.call, report.since)


def size_of(ring: int) -> int:
    """Bytes of a memory file that a board with a ring of so many records takes."""
    return -(-(_HEAD + ring * _RECORD) // mmap.PAGESIZE) * mmap.PAGESIZE


def new_memory(rings: tuple[int, ...]) -> OwnedFd:
    """A memory file for a board with each of these rings. Raises OSError."""
    memory = OwnedFd(os.memfd_create("native", os.MFD_CLOEXEC))
    os.truncate(memory.number, sum(size_of(ring) for ring in rings))
    return memory


def map_memory(memory: int) -> mmap.mmap:
    """To read. Has a copy of the descriptor, so it is to be closed. Raises OSError."""
    return mmap.mmap(memory, 0, prot=mmap.PROT_READ)


def copy_memory(memory: int) -> bytes:
    """As it is now. Raises OSError."""
    with map_memory(memory) as mapped:
        return bytes(mapped)


def boards(memory: mmap.mmap | bytes) -> tuple[Board, ...]:
    """All boards of a memory file in which they have been set up."""
    found, offset = [], 0
    while offset + _HEAD <= len(memory):
        board = Board(memory, offset)
        found.append(board)
        offset += size_of(board.report().ring)
    return tuple(found)
