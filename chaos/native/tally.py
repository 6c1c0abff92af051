# SPDX-License-Identifier: Apache-2.0
"""What a thread was answered, of the calls that are on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from chaos.native.board import Call, Ran
from chaos.native.edge import ERRNO

INDEX = -2  # of a record's words


def tally(thread: Ran) -> Counter[tuple[int, int]]:
    """How many calls of each step, by its index, had which errno; 0 for successes."""
    return Counter(zip(thread.column(INDEX), thread.column(ERRNO), strict=True))


def answered(thread: Ran, errno: int) -> Iterator[Call]:
    """The calls that had this errno, in their order."""
    codes = thread.column(ERRNO)
    place = -1
    for _ in range(codes.count(errno)):
        place = codes.index(errno, place + 1)
        yield thread.call_at(place)
