# SPDX-License-Identifier: Apache-2.0
"""What a thread was answered, of the calls that are on record: how often, by which of them, and where in them one
answer begins: the last call before, and the first with it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from chaos.native.board import NativeCall, Ran

INDEX, ERRNO = -2, -1  # of a record's words


@dataclass(frozen=True, slots=True)
class Edge:
    """`other` is the last call that had another answer, `first` the first one that had it; None if there was none.

    With `lost` one of them may be among the calls whose records were overwritten, so that it is not known.
    """

    other: NativeCall | None
    first: NativeCall | None
    lost: bool


def edge(thread: Ran, errno: int) -> Edge:
    """Where `errno` begins in what a thread did that has ended."""
    codes = thread.column(ERRNO)
    first = _first(codes, errno)
    other = first - 1
    if codes[first:] != array("I", [errno]) * (len(codes) - first):
        other = max(place for place in range(first, len(codes)) if codes[place] != errno)
    return Edge(
        other=thread.call_at(other) if other >= 0 else None,
        first=thread.call_at(first) if first < len(codes) else None,
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


def tally(thread: Ran) -> Counter[tuple[int, int]]:
    """How many calls of each step, by its index, had which errno; 0 for successes."""
    return Counter(zip(thread.column(INDEX), thread.column(ERRNO), strict=True))


def answered(thread: Ran, errno: int) -> Iterator[NativeCall]:
    """The calls that had this errno, in their order."""
    codes = thread.column(ERRNO)
    place = -1
    for _ in range(codes.count(errno)):
        place = codes.index(errno, place + 1)
        yield thread.call_at(place)
