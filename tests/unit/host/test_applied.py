# SPDX-License-Identifier: Apache-2.0
"""A fault's life as it stands in the history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.history.records import Fault as Record
from chaos.runner.script.applied import AppliedFault

CONTEXT: Any = None


class Log:
    """Keeps what would be written out."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def now(self) -> int:
        return len(self.records)

    def write(self, record: Record) -> None:
        self.records.append(record)


@dataclass
class Switch(Fault):
    """Breaks a switch, which is seen to be broken only after `late` looks."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "it is broken"

    late: int = 0
    fails: bool = False
    broken: bool = field(init=False, default=False)

    def apply(self, ctx: FaultContext, target: str) -> None:
        self.broken = True
        if self.fails:
            raise OSError("half way")

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        self.late -= 1
        return Evidence(self.broken if self.late < 0 else None, "looked at")

    def undo(self, ctx: FaultContext, target: str) -> str:
        self.broken = False
        return "mended"


def told(fault: Switch, *, withheld: bool = False) -> list[tuple[str, bool | None, tuple[str, ...]]]:
    log: Any = Log()
    applied = AppliedFault("switch", fault, "source", 3, CONTEXT, log, withheld=withheld)
    if fault.fails:
        with pytest.raises(OSError, match="half way"):
            applied.apply()
    else:
        applied.apply()
    applied.undo()
    applied.undo()
    assert not fault.broken
    return [(record.event, record.struck, record.ends) for record in log.records]


APPLIED = ("apply", None, ("source",))
UNDONE = ("undo", None, ())


def test_evidence_is_given_at_once_or_before_the_undo() -> None:
    assert told(Switch()) == [APPLIED, ("evidence", True, ()), UNDONE]
    assert told(Switch(late=1)) == [APPLIED, ("evidence", True, ()), UNDONE]
    assert told(Switch(late=2)) == [APPLIED, ("evidence", False, ()), UNDONE]


def test_what_is_half_applied_is_undone() -> None:
    assert told(Switch(fails=True)) == [APPLIED, ("evidence", True, ()), UNDONE]


def test_what_is_withheld_is_asked_for_its_evidence_and_ends_nobody() -> None:
    assert told(Switch(), withheld=True) == [("withheld", None, ()), ("evidence", False, ()), UNDONE]
