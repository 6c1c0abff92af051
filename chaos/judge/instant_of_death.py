# SPDX-License-Identifier: Apache-2.0
"""The one instant of death, for many calls at once.

A source that is moved dies at one instant between the beginning and the end of the move. The kernel looks whether the
VM is dead at the start of each call, so whatever was answered was looked at before that instant, and whatever failed
with EIO after it. A call that lasts from before to after may do either. So there must be an instant that is

    not before any call that was answered began, nor before the move did,
    not after any call that failed with EIO ended, nor after the move did.

One pass over the calls finds it, or the two calls that leave no room for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from errno import EIO
from typing import Literal, NamedTuple


class TimedCall(NamedTuple):
    """A system call on the source's descriptors, in CLOCK_MONOTONIC nanoseconds. `errno` is 0 if it succeeded. EIO with
    a status of the firmware's is an answer, and no EIO here."""

    began: int
    ended: int
    errno: int


ContradictionKind = Literal[
    "answered-after-eio", "answered-after-move", "eio-before-move", "eio-after-failed-move", "eio-without-move"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two calls that cannot both be. `first` ended before `second` began; None stands for the move itself."""

    kind: ContradictionKind
    first: TimedCall | None
    second: TimedCall | None


@dataclass(frozen=True, slots=True)
class Death:
    """What calls say of the instant, if there was one: not before `after`, and not after `before`."""

    contradictions: tuple[Contradiction, ...]
    after: int
    before: int


def instant_of_death(calls: Iterable[TimedCall], move: TimedCall) -> Death:
    """Hold calls against a move of their VM that succeeded."""
    last_answered: TimedCall | None = None  # the one that began last
    first_refused: TimedCall | None = None  # the one that ended first
    for call in calls:
        if call.errno == EIO:
            if first_refused is None or call.ended < first_refused.ended:
                first_refused = call
        elif last_answered is None or call.began > last_answered.began:
            last_answered = call
    after = max(move.began, last_answered.began) if last_answered else move.began
    before = min(move.ended, first_refused.ended) if first_refused else move.ended
    found = _contradictions(last_answered, first_refused, move)
    return Death(tuple(found), after, before)


def _contradictions(answered: TimedCall | None, refused: TimedCall | None, move: TimedCall) -> list[Contradiction]:
    found: list[Contradiction] = []
    if answered and refused and refused.ended < answered.began:
        found.append(Contradiction("answered-after-eio", refused, answered))
    if answered and answered.began > move.ended:
        found.append(Contradiction("answered-after-move", None, answered))
    if refused and refused.ended < move.began:
        found.append(Contradiction("eio-before-move", refused, None))
    return found
