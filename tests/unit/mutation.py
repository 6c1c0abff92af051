# SPDX-License-Identifier: Apache-2.0
"""Valid input with some of it changed: what random bytes alone would never get far enough to find."""

from __future__ import annotations

import random

_TELLING = (
    b"\0",
    b"\xff",
    b"-1",
    b"99999999999999999999",
    b"1e999",
    b"NaN",
    b"null",
    b"[",
    b"{",
    b'"',
    b"\n",
    b"\\u0000",
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to eight times: a byte flipped, a piece lost, doubled, moved, or replaced by something telling."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice([1, 1, 2, 8, 64])
        piece = changed[at : at + length]
        match chance.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = piece
            case 3:
                to = chance.randrange(len(changed) + 1)
                changed[to:to] = piece
            case _:
                changed[at : at + length] = chance.choice(_TELLING)
    return bytes(changed)
