# SPDX-License-Identifier: Apache-2.0
"""Failures on purpose: which command is failed, delayed, stalled or corrupted, when, and the proof that it was.

A plan is data. For each command the rules are asked in order, and the first that matches and is due fires; at most one
does. Every rule counts the commands it matches from the moment the plan is set, whether or not an earlier rule took
them, so rules do not disturb each other's counting. Chance comes from the plan's seed, one stream a rule.

What fired is recorded as a `Firing`. A planned fault without one did not happen.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

import msgspec

from chaos.lab.psp.numbers import Command, Status
from chaos.lab.psp.state import Rng

_CHANCE_BYTES: Final = 7  # 56 bits: more than a float's mantissa


class Fail(msgspec.Struct, frozen=True, tag="fail", forbid_unknown_fields=True):
    """Answer with `status`. `carried_out`: do the command first, and lie about it."""

    status: str
    carried_out: bool = False

    def __post_init__(self) -> None:
        if self.status not in Status.__members__:
            raise ValueError(f"status {self.status!r} is none of {', '.join(Status.__members__)}")


class Delay(msgspec.Struct, frozen=True, tag="delay", forbid_unknown_fields=True):
    """Carry the command out `ns` nanoseconds late."""

    ns: int

    def __post_init__(self) -> None:
        if self.ns < 0:
            raise ValueError(f"ns must not be negative, got {self.ns}")


class Stall(msgspec.Struct, frozen=True, tag="stall", forbid_unknown_fields=True):
    """Answer only when released. `carried_out`: the command is done at once and only its answer is held back."""

    carried_out: bool = False


class Corrupt(msgspec.Struct, frozen=True, tag="corrupt", forbid_unknown_fields=True):
    """Carry the command out, then write random bytes over its whole command buffer. The status stays as it was."""


Action = Fail | Delay | Stall | Corrupt


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to do what. Without `nth`, `every` and `probability` every match is due; with more than one, all must be.

    command:      a name of `Command`, None for any
    nth:          the nth match only, from 1
    every:        the every'th match, and each every'th after it
    probability:  of each match, 0 to 1
    times:        fire at most so often
    name:         for the record
    """

    action: Action
    command: str | None = None
    nth: int | None = None
    every: int | None = None
    probability: float | None = None
    times: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.command is not None and self.command not in Command.__members__:
            raise ValueError(f"command {self.command!r} is none of {', '.join(Command.__members__)}")
        for key in ("nth", "every", "times"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be 0 to 1, got {self.probability}")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rules: tuple[Rule, ...] = ()
    seed: int = 0


class Firing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule fired. `rule` is its place in the plan, `sequence` the command's number, `at_ns` CLOCK_MONOTONIC.

    `applied` is false where there was nothing to break: a command without a buffer cannot be corrupted.
    """

    rule: int
    name: str
    action: str
    command: str
    sequence: int
    at_ns: int
    applied: bool = True


class Planner:
    """A plan being followed: its counters and its chance."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._matched = [0] * len(plan.rules)
        self._fired = [0] * len(plan.rules)
        self._chance = [
            Rng(hmac.digest(b"sevchaos plan", f"{plan.seed}/{index}".encode(), hashlib.sha256))
            for index in range(len(plan.rules))
        ]

    def choose(self, command: str) -> int | None:
        """The place of the rule that fires for the next command, named `command`; None if none does."""
        chosen: int | None = None
        for index, rule in enumerate(self.plan.rules):
            if rule.command is not None and rule.command != command:
                continue
            self._matched[index] += 1
            if self._due(index, rule) and chosen is None:
                self._fired[index] += 1
                chosen = index
        return chosen

    def _due(self, index: int, rule: Rule) -> bool:
        count = self._matched[index]
        # Drawn for every match, used or not: which matches are lucky must not depend on the other conditions.
        draw = int.from_bytes(self._chance[index].take(_CHANCE_BYTES), "little") / (1 << 8 * _CHANCE_BYTES)
        return (
            (rule.nth is None or count == rule.nth)
            and (rule.every is None or count % rule.every == 0)
            and (rule.probability is None or draw < rule.probability)
            and (rule.times is None or self._fired[index] < rule.times)
        )

    def garbage(self, index: int, length: int) -> bytes:
        """Random bytes for rule `index`."""
        return self._chance[index].take(length)
