# SPDX-License-Identifier: Apache-2.0
"""What a relay does to the packets of one direction: decided from a seed, in user space, packet by packet.

It stands in for netem where a kernel has none, so it is told the same (`Impairment`) and means the same by it. The
decisions come from a generator of its own that is asked equally often for every packet, whatever is to be done: under
the same seed the n-th packet meets the same fate, whoever sends it and whenever.

Nothing here reads a clock or touches a system; the relay says when it is.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.netns.netem import Impairment


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one packet. `flipped` is the place of a bit in it as a fraction, `spread` of the jitter: -1 to 1.

    A packet that is `early` skips the delay. The copy of one that is `doubled` is never corrupted.
    """

    lost: bool
    doubled: bool
    early: bool
    flipped: float | None
    spread: float


def fates(impairment: Impairment) -> Iterator[Fate]:
    """Of the first packet, the second and so on, without end."""
    chance = random.Random(impairment.seed)
    while True:
        lost, doubled, early, flips, where, spread = (chance.random() for _ in range(6))
        yield Fate(
            lost=lost * 100 < impairment.loss,
            doubled=doubled * 100 < impairment.duplication,
            early=early * 100 < impairment.reordering,
            flipped=where if flips * 100 < impairment.corruption else None,
            spread=2 * spread - 1,
        )


@dataclass(slots=True)
class Counts:
    """Packets. Of those that were `taken`, `dropped` were lost or found no room, and `duplicated` were doubled; `given`
    went on, copies included, and `waiting` are still here.

    Of those given, `slowed` had waited at least as long as was asked for, and `reordered` went before one that had come
    earlier. `strays` were for somebody else, and went nowhere.
    """

    taken: int = 0
    dropped: int = 0
    duplicated: int = 0
    corrupted: int = 0
    given: int = 0
    slowed: int = 0
    reordered: int = 0
    waiting: int = 0
    strays: int = 0

    @property
    def balanced(self) -> bool:
        return self.taken + self.duplicated == self.dropped + self.given + self.waiting


@dataclass(order=True, frozen=True, slots=True)
class _Waiting:
    """`due` and `came` are times, `least` is how long it has to wait at least, 0 if not at all; nanoseconds."""

    due: int
    number: int
    came: int = field(compare=False)
    least: int = field(compare=False)
    packet: bytes = field(compare=False)


class Lane:
    """The packets on their way from one end to the other. Times are nanoseconds of one clock."""

    def __init__(self, impairment: Impairment) -> None:
        self.counts = Counts()
        self._impairment = impairment
        self._fates = fates(impairment)
        self._waiting: list[_Waiting] = []
        self._number = 0
        self._free = 0  # when all that came so far will have been sent at the rate

    def take(self, packet: bytes, now: int) -> None:
        """A packet has come."""
        fate = next(self._fates)
        self.counts.taken += 1
        if fate.lost:
            self.counts.dropped += 1
            return
        if fate.doubled:
            self.counts.duplicated += 1
            self._keep(packet, fate, now)
        if fate.flipped is not None:
            self.counts.corrupted += 1
            packet = corrupted(packet, fate.flipped)
        self._keep(packet, fate, now)

    @property
    def due(self) -> int | None:
        """When the next packet is to go; None if none waits."""
        return self._waiting[0].due if self._waiting else None

    def give(self, now: int) -> Iterator[bytes]:
        """Those that are to go by now."""
        while self._waiting and self._waiting[0].due <= now:
            going = heapq.heappop(self._waiting)
            self.counts.waiting -= 1
            self.counts.given += 1
            self.counts.slowed += 0 < going.least <= now - going.came
            self.counts.reordered += any(left.number < going.number for left in self._waiting)
            yield going.packet

    def _keep(self, packet: bytes, fate: Fate, now: int) -> None:
        if len(self._waiting) >= self._impairment.limit:
            self.counts.dropped += 1
            return
        wait, least = (0, 0) if fate.early else self._wait(packet, fate, now)
        heapq.heappush(self._waiting, _Waiting(now + wait, self._number, now, least, packet))
        self._number += 1
        self.counts.waiting += 1

    def _wait(self, packet: bytes, fate: Fate, now: int) -> tuple[int, int]:
        """How long it is to wait, and how long at least if the jitter is all in its favour."""
        asked, rate = self._impairment, 0
        if asked.rate:
            self._free = max(self._free, now) + 8 * len(packet) * 1_000_000_000 // asked.rate
            rate = self._free - now
        wait = rate + max(0, round((asked.delay_us + asked.jitter_us * fate.spread) * 1000))
        return wait, rate + max(0, asked.delay_us - asked.jitter_us) * 1000


def corrupted(packet: bytes, where: float) -> bytes:
    """With one bit flipped, anywhere but in the first byte: without the version in it the packet would not even be
    received, let alone found to be wrong."""
    bit = 8 + int(where * 8 * (len(packet) - 1))
    flipped = bytearray(packet)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
