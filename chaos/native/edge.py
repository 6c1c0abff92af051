# SPDX-License-Identifier: Apache-2.0
"""Where in the calls of a thread one answer begins: the last call before, and the first with it.

What is asked of hundred thousands of records is worked out on their bytes: in the lab Python takes 10 us for each.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from chaos.native.board import Call, Ran
from chaos.native.layout import RECORD

_SIZE = struct.calcsize(RECORD)
_WORDS = _SIZE // 4
_ERROR = _WORDS - 1  # the errno is the last word of a record


@dataclass(frozen=True, slots=True)
class Edge:
    """`other` is the last call that had another answer, `first` the first one that had it; None if there was none.

    With `lost` one of them may be among the calls whose records were overwritten, so that it is not known.
    """

    other: Call | None
    first: Call | None
    lost: bool


def edge(thread: Ran, errno: int) -> Edge:
    """Where `errno` begins in what a thread did that has ended."""
    codes = array("I")
    for piece in filter(len, thread.records):
        codes.frombytes(piece.cast("I")[_ERROR::_WORDS].tobytes())
    first = _first(codes, errno)
    other = first - 1
    if codes[first:] != array("I", [errno]) * (len(codes) - first):
        other = max(place for place in range(first, len(codes)) if codes[place] != errno)
    return Edge(
        other=_call(thread, other) if other >= 0 else None,
        first=_call(thread, first) if first < len(codes) else None,
        lost=bool(thread.overwritten) and not _told(thread, errno, codes, other),
    )


def _told(thread: Ran, errno: int, codes: array[int], other: int) -> bool:
    """Whether the ring holds both, though it does not hold all calls: none of those with `errno` was overwritten, and
    one with another answer was not, unless there was none."""
    total = thread.errnos.get(errno, 0)
    return codes.count(errno) == total and (other >= 0 or total == thread.calls)


def _first(codes: array[int], errno: int) -> int:
    """Its first place, their number if it has none."""
    words, wanted, at = codes.tobytes(), array("I", [errno]).tobytes(), -1
    while (at := words.find(wanted, at + 1)) >= 0:
        if at % 4 == 0:
            return at // 4
    return len(codes)


def _call(thread: Ran, place: int) -> Call:
    """The record at that place among those that are kept."""
    for piece in thread.records:
        if place * _SIZE < len(piece):
            began, ended, index, number = struct.unpack_from(RECORD, piece, place * _SIZE)
            return Call(thread.thread, index, began, ended, number)
        place -= len(piece) // _SIZE
    raise IndexError(place)
