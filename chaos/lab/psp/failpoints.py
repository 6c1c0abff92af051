# SPDX-License-Identifier: Apache-2.0
"""Failpoints: the rules of a plan, written down. The same words in experiments, on the command line and in histories.

    LAUNCH_START#2=fail:RESOURCE_LIMIT      the second one is refused
    DEACTIVATE*3=delay:50ms                 the first three are late
    GUEST_STATUS=stall                      none is answered until it is released
    *%10=fail:HWERROR_PLATFORM              a tenth of all commands is refused, by the run's seed
    PEK_CSR=length:4000                     none is carried out: 4000 bytes are what it would want

    plan   = failpoint { ";" failpoint }
    failpoint = COMMAND { "#" NTH | "/" EVERY | "%" PERCENT | "*" TIMES } "=" ACTION

docs/firmware.md explains each part to users. Any text is read or refused with a `ValueError` that quotes what is wrong
and says what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import (
    UNITS,
    Corrupt,
    DelayAnswer,
    Die,
    Fail,
    FailpointAction,
    FailpointRule,
    Reset,
    Stall,
    TellLength,
    named_status,
    status_of,
)

LENGTH_MAX: Final = 4096
LATEST_NS: Final = 600 * UNITS["s"]  # later than any run waits
_SIGNS: Final = {"#": "nth", "/": "every", "%": "percent", "*": "times"}
_WHEN: Final = re.compile(r"([#/%*])(\d{1,9}(?:\.\d{1,9})?)", re.ASCII)
_TIME: Final = re.compile(r"(\d{1,12})(ns|us|ms|s)", re.ASCII)
_PLAIN: Final[dict[str, FailpointAction]] = {
    "skip": Fail("SUCCESS"),
    "stall": Stall(),
    "withhold": Stall(carried_out=True),
    "garbage": Corrupt(),
    "dead": Die(),
    "reset": Reset(),
}


def parse(text: str) -> tuple[FailpointRule, ...]:
    """The rules of a plan, at least one. ValueError."""
    if len(text) > LENGTH_MAX:
        raise ValueError(f"a plan is at most {LENGTH_MAX} characters long, this has {len(text)}")
    return tuple(_failpoint(part.strip()) for part in text.split(";"))


def write(rules: tuple[FailpointRule, ...]) -> str:
    """What `parse` reads. The rules' names are not part of it."""
    return "; ".join(map(str, rules))


def _failpoint(text: str) -> FailpointRule:
    place, equals, action = text.partition("=")
    if not equals:
        raise ValueError(
            f"{text[:80]!r} is no failpoint: give COMMAND=ACTION, as in LAUNCH_START#2=fail:RESOURCE_LIMIT"
        )
    try:
        return _rule(place, _action(action))
    except ValueError as error:
        raise ValueError(f"{text[:80]!r}: {error}") from error


def _rule(place: str, action: FailpointAction) -> FailpointRule:
    named = re.match(r"\*|\w*", place, re.ASCII)
    assert named is not None  # it matches nothing as well
    command, when = named[0], place[named.end() :]
    if command not in ("*", *FirmwareCommand.__members__):
        raise ValueError(
            f"there is no command {command!r}: give one of {', '.join(FirmwareCommand.__members__)}, or * for any"
        )
    conditions: dict[str, Any] = {}
    while when:
        found = _WHEN.match(when)
        if found is None:
            raise ValueError(f"{when!r} does not say when: give #NTH, /EVERY, %PERCENT or *TIMES")
        key, number = _SIGNS[found[1]], found[2]
        if key in conditions:
            raise ValueError(f"{found[1]} is given twice")
        if key != "percent" and "." in number:
            raise ValueError(f"{found[0]} is no whole number")
        conditions[key] = float(number) if key == "percent" else int(number)
        when = when[found.end() :]
    return FailpointRule(action, command=None if command == "*" else command, **conditions)


def _action(text: str) -> FailpointAction:
    word, colon, rest = text.partition(":")
    if not colon and word in _PLAIN:
        return _PLAIN[word]
    if colon and word in _WITH_VALUE:
        return _WITH_VALUE[word](rest)
    known = ", ".join(("fail:STATUS", "lie:STATUS", "delay:TIME", "length:BYTES", *_PLAIN))
    raise ValueError(f"there is no action {text!r}: give one of {known}")


def _fail(text: str, *, carried_out: bool = False) -> Fail:
    """Statuses that have a name are known by it."""
    code = status_of(text)
    if code == FirmwareStatus.SUCCESS:
        raise ValueError("SUCCESS is no failure; `skip` answers it without doing anything")
    return Fail(named_status(code), carried_out=carried_out)


def _lie(text: str) -> Fail:
    return _fail(text, carried_out=True)


def _delay(text: str) -> DelayAnswer:
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time: give a number and a unit of {', '.join(UNITS)}, as in 50ms")
    ns = int(found[1]) * UNITS[found[2]]
    if ns > LATEST_NS:
        raise ValueError(f"{text} is too long: at most {LATEST_NS // UNITS['s']}s")
    return DelayAnswer(ns)


def _length(text: str) -> TellLength:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ValueError(f"{text!r} is no length: give a number of bytes, as in 4000")
    return TellLength(int(text))


_WITH_VALUE: Final[dict[str, Callable[[str], FailpointAction]]] = {
    "fail": _fail,
    "lie": _lie,
    "delay": _delay,
    "length": _length,
}


def named(rules: tuple[FailpointRule, ...], name: str) -> tuple[FailpointRule, ...]:
    """The same, to be known by this name."""
    return tuple(msgspec.structs.replace(rule, name=name) for rule in rules)
