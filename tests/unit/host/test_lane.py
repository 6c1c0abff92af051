# SPDX-License-Identifier: Apache-2.0
"""What a relay decides about packets, and what it counts. No packet moves here, and no clock runs."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.netns.netem import Impairment
from chaos.netns.relay_lane import Fate, Lane, corrupted, fates

MS = 1_000_000
PACKETS = tuple(bytes([0x45, number]) * 50 for number in range(200))


def first(impairment: Impairment) -> list[Fate]:
    return list(islice(fates(impairment), len(PACKETS)))


def through(impairment: Impairment, *, apart: int = MS) -> tuple[list[tuple[int, int]], Lane]:
    """Of packets that come `apart` nanoseconds from one another, in the order in which they go on: when, and which."""
    lane, gone = Lane(impairment), list[tuple[int, int]]()

    def until(now: int | None) -> None:
        while (when := lane.due) is not None and (now is None or when < now):
            gone.extend((when, given[1]) for given in lane.give(when))

    for number, packet in enumerate(PACKETS):
        until(number * apart)
        lane.take(packet, number * apart)
        assert lane.counts.balanced
    until(None)
    assert lane.counts.balanced and not lane.counts.waiting
    assert lane.counts.given == len(gone)
    return gone, lane


def numbers(gone: list[tuple[int, int]]) -> list[int]:
    return [number for _, number in gone]


@given(st.integers(0, (1 << 63) - 1))
def test_the_same_seed_is_the_same_fate(seed: int) -> None:
    asked = Impairment(loss=30, duplication=30, corruption=30, reordering=30, delay_us=9, jitter_us=5, seed=seed)
    assert first(asked) == first(asked)
    assert through(asked)[0] == through(asked)[0]
    assert first(asked) != first(Impairment(loss=30, seed=seed ^ 1))


def test_what_else_is_asked_for_changes_no_decision() -> None:
    lost = [fate.lost for fate in first(Impairment(loss=20, seed=3))]
    assert 15 < sum(lost) < 70
    assert lost == [fate.lost for fate in first(Impairment(loss=20, corruption=50, duplication=9, seed=3))]


def test_nothing_is_done_if_nothing_is_asked_for() -> None:
    gone, lane = through(Impairment(seed=1))
    assert gone == [(number * MS, number) for number in range(len(PACKETS))]
    counts = lane.counts
    assert (counts.taken, counts.given) == (200, 200)
    assert not any((counts.dropped, counts.duplicated, counts.corrupted, counts.slowed, counts.reordered))


def test_loss() -> None:
    gone, lane = through(Impairment(loss=30, seed=1))
    assert len(gone) == 200 - lane.counts.dropped
    assert 20 < lane.counts.dropped < 120
    assert through(Impairment(loss=100, seed=1))[0] == []


def test_duplication() -> None:
    gone, lane = through(Impairment(duplication=50, seed=1))
    assert len(gone) == 200 + lane.counts.duplicated
    assert 40 < lane.counts.duplicated < 160
    assert sorted(set(numbers(gone))) == list(range(200))


def test_a_delay_is_the_same_for_all() -> None:
    gone, lane = through(Impairment(delay_us=5000, seed=1))
    assert gone == [(number * MS + 5 * MS, number) for number in range(200)]
    assert (lane.counts.slowed, lane.counts.reordered) == (200, 0)


def test_jitter_spreads_the_delay_and_packets_overtake_each_other() -> None:
    gone, lane = through(Impairment(delay_us=5000, jitter_us=4000, seed=1))
    waits = [when - number * MS for when, number in gone]
    assert 1 * MS <= min(waits) < 2 * MS and 8 * MS < max(waits) <= 9 * MS
    assert numbers(gone) != sorted(numbers(gone)) == list(range(200))
    assert lane.counts.slowed == 200 and lane.counts.reordered > 0


def test_reordering_skips_the_delay() -> None:
    gone, lane = through(Impairment(delay_us=5000, reordering=25, seed=1))
    early = [number for when, number in gone if when == number * MS]
    assert 20 < len(early) < 90
    assert lane.counts.slowed == 200 - len(early)
    assert 0 < lane.counts.reordered <= len(early)  # the first of all has nobody to overtake


def test_a_rate_is_kept() -> None:
    gone, lane = through(Impairment(rate=8 * 100 * 100, seed=1), apart=0)  # a hundred packets a second
    assert [when for when, _ in gone] == [(number + 1) * 10 * MS for number in range(200)]
    assert lane.counts.slowed == 200


def test_there_is_room_for_so_many() -> None:
    gone, lane = through(Impairment(delay_us=1000, limit=50, seed=1), apart=0)
    assert (len(gone), lane.counts.dropped) == (50, 150)


@given(st.binary(min_size=2, max_size=100), st.floats(0, 1, exclude_max=True))
def test_one_bit_is_flipped_and_never_one_of_the_first_byte(packet: bytes, where: float) -> None:
    flipped = corrupted(packet, where)
    assert flipped[0] == packet[0]
    assert (int.from_bytes(flipped) ^ int.from_bytes(packet)).bit_count() == 1


def test_a_packet_that_is_sent_at_once_is_not_slowed_whatever_was_decided() -> None:
    class Hasty(Lane):
        def take(self, packet: bytes, now: int) -> None:
            super().take(packet, now)
            self._waiting = [type(kept)(now, kept.number, now, kept.least, packet) for kept in self._waiting]

    lane = Hasty(Impairment(delay_us=5000, seed=1))
    lane.take(PACKETS[0], 0)
    assert list(lane.give(0)) == [PACKETS[0]]
    assert (lane.counts.given, lane.counts.slowed) == (1, 0)


@pytest.mark.parametrize("name", ["dropped", "duplicated", "given", "waiting", "taken"])
def test_counts_that_do_not_add_up(name: str) -> None:
    _, lane = through(Impairment(loss=30, duplication=20, seed=1))
    setattr(lane.counts, name, getattr(lane.counts, name) + 1)
    assert not lane.counts.balanced
