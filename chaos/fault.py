# SPDX-License-Identifier: Apache-2.0
"""What a fault is, and where faults come from.

A fault is three verbs on one victim, a VMM process:

    apply     break it
    undo      make it whole again, if that can be; registered before `apply`, always called, may be called alone
    evidence  did it strike? A run in which a planned fault left no evidence says nothing

The options of a fault are its fields, so that a file is checked against them before anything runs. Faults register
themselves under the entry point group `sevchaos.faults`; the engine knows none by name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from chaos.errors import UsageError

GROUP = "sevchaos.faults"


class Victim(Protocol):
    """The VMM process that a fault strikes, as the runner sees it."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int:
        """Refers to the process and no other, also when its pid is used again."""

    @property
    def status(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it has not been reaped."""

    def wait_end(self, within: float) -> bool:
        """Whether it ended within so many seconds. It is reaped then."""


@dataclass(frozen=True, slots=True)
class Evidence:
    struck: bool
    detail: str


class Fault(Protocol):
    """A msgspec Struct, whose fields are the options. Every verb may raise OSError."""

    def apply(self, victim: Victim) -> None: ...

    def undo(self, victim: Victim) -> str:
        """What was done, in a few words."""

    def evidence(self, victim: Victim) -> Evidence: ...


def names() -> tuple[str, ...]:
    return tuple(sorted(point.name for point in importlib.metadata.entry_points(group=GROUP)))


def find(name: str, options: Mapping[str, object]) -> Fault:
    """The fault of this name with these options. Raises `UsageError`."""
    points = tuple(importlib.metadata.entry_points(group=GROUP, name=name))
    if not points:
        raise UsageError(f"there is no fault {name!r}", remedy=f"the faults are {', '.join(names()) or '(none)'}")
    kind = points[0].load()
    try:
        fault: Fault = msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        allowed = ", ".join(field.name for field in msgspec.structs.fields(kind)) or "(none)"
        raise UsageError(f"fault {name!r}: {error}", remedy=f"its options are {allowed}") from error
    return fault
