# SPDX-License-Identifier: Apache-2.0
"""One instant of death in a storm of calls, and doctored storms that have none."""

from __future__ import annotations

from errno import EINVAL, EIO

import pytest

from chaos.judge.instant_of_death import TimedCall, instant_of_death

MOVE = TimedCall(100, 200, 0)


def storm(death: int = 150, count: int = 5000) -> list[TimedCall]:
    """Calls of 3 ns, one a nanosecond; each looks in its middle."""
    calls = [
        TimedCall(at, at + 3, EIO if at + 1 >= death else 0) for at in range(death - count // 2, death + count // 2)
    ]
    return calls[::2] + calls[1::2]


def test_a_storm_with_one_instant_of_death() -> None:
    death = instant_of_death(storm(), MOVE)
    assert not death.contradictions
    assert (death.after, death.before) == (148, 152)


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (TimedCall(160, 163, 0), ["answered-after-eio"]),
        (TimedCall(210, 213, EINVAL), ["answered-after-eio", "answered-after-move"]),
        (TimedCall(90, 99, EIO), ["answered-after-eio", "eio-before-move"]),
        (TimedCall(90, 300, EIO), []),
        (TimedCall(90, 300, 0), []),
    ],
)
def test_a_doctored_storm(call: TimedCall, kinds: list[str]) -> None:
    death = instant_of_death([*storm(), call], MOVE)
    assert [found.kind for found in death.contradictions] == kinds
    assert all(call in (found.first, found.second) for found in death.contradictions)


def test_a_move_beside_which_nothing_was_called_bounds_the_instant() -> None:
    death = instant_of_death([], MOVE)
    assert not death.contradictions and (death.after, death.before) == (100, 200)
