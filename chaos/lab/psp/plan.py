# SPDX-License-Identifier: Apache-2.0
"""Failures on purpose: which command is broken, how and when, and the proof that it was.

A plan is data, and `str` of a rule is what `failpoints` reads. For each command the rules are asked in order, and the
first that matches and is due fires; at most one does. Every rule counts the commands it matches from the moment it was
added, whether or not an earlier rule took them, so rules do not disturb each other's counting. Chance comes from the
plan's seed, one stream a rule.

What fired is recorded as a `Firing`. A planned fault without one did not happen.
"""

from __future__ import annotations

import hashlib
import hmac
from decimal import Decimal
from typing import Final

import msgspec

from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import Rng

_CHANCE_BYTES: Final = 7  # 56 bits: more than a float's mantissa
_STATUS_NAMES: Final[dict[int, str]] = {status: status.name for status in FirmwareStatus}
STATUS_MAX: Final = 0xFFFF
TOLD_MAX: Final = 0xFFFFFFFF
UNITS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}


def status_of(text: str) -> int:
    """The status of this name or number. ValueError if there is none."""
    if text in FirmwareStatus.__members__:
        return FirmwareStatus[text]
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= STATUS_MAX:
        return int(text)
    raise ValueError(
        f"status {text!r} is no number up to {STATUS_MAX} and none of {', '.join(FirmwareStatus.__members__)}"
    )


def named_status(code: int) -> str:
    """The name of a status, or its number where it has none."""
    return _STATUS_NAMES.get(code) or str(code)


class Fail(msgspec.Struct, frozen=True, tag="fail", forbid_unknown_fields=True):
    """Answer with `status`: a name of `FirmwareStatus`, or the number of one that has no name. `carried_out`: do the
    command first, and lie about it. SUCCESS without doing anything is a lie as well."""

    status: str
    carried_out: bool = False

    def __post_init__(self) -> None:
        if self.code == FirmwareStatus.SUCCESS and self.carried_out:
            raise ValueError("a command that is carried out and answered with SUCCESS does not fail")
        if self.status != named_status(self.code):
            raise ValueError(f"status {self.status!r} is written {named_status(self.code)!r}")

    @property
    def code(self) -> int:
        return status_of(self.status)

    def __str__(self) -> str:
        if self.code == FirmwareStatus.SUCCESS:
            return "skip"
        return f"{'lie' if self.carried_out else 'fail'}:{self.status}"


class DelayAnswer(msgspec.Struct, frozen=True, tag="delay", forbid_unknown_fields=True):
    """Carry the command out `ns` nanoseconds late."""

    ns: int

    def __post_init__(self) -> None:
        if self.ns < 0:
            raise ValueError(f"ns must not be negative, got {self.ns}")

    def __str__(self) -> str:
        unit = next(unit for unit in reversed(UNITS) if self.ns % UNITS[unit] == 0)
        return f"delay:{self.ns // UNITS[unit]}{unit}"


class Stall(msgspec.Struct, frozen=True, tag="stall", forbid_unknown_fields=True):
    """Answer only when released. `carried_out`: the command is done at once and only its answer is held back."""

    carried_out: bool = False

    def __str__(self) -> str:
        return "withhold" if self.carried_out else "stall"


class Corrupt(msgspec.Struct, frozen=True, tag="corrupt", forbid_unknown_fields=True):
    """Carry the command out, then write random bytes over its whole command buffer. The status stays as it was."""

    def __str__(self) -> str:
        return "garbage"


class TellLength(msgspec.Struct, frozen=True, tag="length", forbid_unknown_fields=True):
    """Answer INVALID_LEN without doing anything, and say of every length in the command buffer that it has to be
    `bytes`, as the firmware does where a buffer is too short. Only commands that are answered so can be."""

    bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.bytes <= TOLD_MAX:
            raise ValueError(f"a length is 0 to {TOLD_MAX}, not {self.bytes}")

    def __str__(self) -> str:
        return f"length:{self.bytes}"


class Die(msgspec.Struct, frozen=True, tag="die", forbid_unknown_fields=True):
    """Answer neither this command nor any after it, whatever becomes of the plan."""

    def __str__(self) -> str:
        return "dead"


class Reset(msgspec.Struct, frozen=True, tag="reset", forbid_unknown_fields=True):
    """Lose everything, as a platform that was reset, and take the command as the first after that."""

    def __str__(self) -> str:
        return "reset"


FailpointAction = Fail | DelayAnswer | Stall | Corrupt | TellLength | Die | Reset


class FailpointRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to do what. Without `nth`, `every` and `percent` every match is due; with more than one, all must be.

    command:  a name of `FirmwareCommand`, None for any
    nth:      the nth match only, from 1
    every:    the every'th match, and each every'th after it
    percent:  of the matches, by chance
    times:    fire at most so often
    name:     for the record, and to take the rule back by
    """

    action: FailpointAction
    command: str | None = None
    nth: int | None = None
    every: int | None = None
    percent: float | None = None
    times: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.command is not None and self.command not in FirmwareCommand.__members__:
            raise ValueError(f"command {self.command!r} is none of {', '.join(FirmwareCommand.__members__)}")
        for key in ("nth", "every", "times"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if self.percent is not None and not 0 <= self.percent <= 100:
            raise ValueError(f"percent must be 0 to 100, got {self.percent}")

    def __str__(self) -> str:
        when = {"#": self.nth, "/": self.every, "%": self.percent, "*": self.times}
        told = "".join(f"{sign}{_plain(value)}" for sign, value in when.items() if value is not None)
        return f"{self.command or '*'}{told}={self.action}"


def _plain(number: float) -> str:
    """Without an exponent, and without a fraction that is none."""
    return str(int(number)) if number == int(number) else format(Decimal(repr(number)), "f")


class FailpointPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rules: tuple[FailpointRule, ...] = ()
    seed: int = 0


class Firing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule fired. `rule` is its place among all that were added, `name` its name, `action` what was done in the words
    of `failpoints`, `sequence` the command's number, `at_ns` CLOCK_MONOTONIC.

    `applied` is false where there was nothing to break: a command without a buffer cannot be corrupted, and one without
    a length to tell is carried out as ever.
    """

    rule: int
    name: str
    action: str
    command: str
    sequence: int
    at_ns: int
    applied: bool = True


class _Entry(msgspec.Struct):
    """A rule being followed: its counters and its chance."""

    rule: FailpointRule
    chance: Rng
    matched: int = 0
    fired: int = 0
    over: bool = False


class Planner:
    """Plans being followed."""

    def __init__(self, plan: FailpointPlan) -> None:
        self._entries: list[_Entry] = []
        self.add(plan)

    def add(self, plan: FailpointPlan) -> None:
        """Follow these rules as well, from the next command on, after those there are."""
        for index, rule in enumerate(plan.rules):
            key = hmac.digest(b"sevchaos plan", f"{plan.seed}/{index}".encode(), hashlib.sha256)
            self._entries.append(_Entry(rule, Rng(key)))

    def withdraw(self, name: str) -> None:
        """The rules of this name fire no more. The others keep their places and counts."""
        for entry in self._entries:
            entry.over |= entry.rule.name == name

    def rule(self, index: int) -> FailpointRule:
        return self._entries[index].rule

    def choose(self, command: str) -> int | None:
        """The place of the rule that fires for the next command, named `command`; None if none does."""
        chosen: int | None = None
        for index, entry in enumerate(self._entries):
            if entry.over or entry.rule.command not in (None, command):
                continue
            entry.matched += 1
            if _due(entry) and chosen is None:
                entry.fired += 1
                chosen = index
        return chosen

    def garbage(self, index: int, length: int) -> bytes:
        """Random bytes for rule `index`."""
        return self._entries[index].chance.take(length)


def _due(entry: _Entry) -> bool:
    rule, count = entry.rule, entry.matched
    # Drawn for every match, used or not: which matches are lucky must not depend on the other conditions.
    draw = int.from_bytes(entry.chance.take(_CHANCE_BYTES), "little") / (1 << 8 * _CHANCE_BYTES)
    return (
        (rule.nth is None or count == rule.nth)
        and (rule.every is None or count % rule.every == 0)
        and (rule.percent is None or draw * 100 < rule.percent)
        and (rule.times is None or entry.fired < rule.times)
    )
