# SPDX-License-Identifier: Apache-2.0
"""A fault from its application to its undoing, as it stands in the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chaos.fault import Evidence, Fault, FaultContext, naming_successors
from chaos.history.records import Fault as Record
from chaos.runner.operations import OperationLog

FaultEvent = Literal["apply", "withheld", "evidence", "undo"]


@dataclass(slots=True, eq=False)
class AppliedFault:
    """`target` is what it breaks. One that is `withheld` is not applied, but asked for its evidence. `asked` and
    `undone` once its evidence was given, and once it was undone."""

    name: str
    fault: Fault
    target: str
    step: int
    ctx: FaultContext
    log: OperationLog
    withheld: bool = False
    asked: bool = False
    undone: bool = False

    def apply(self) -> None:
        """Raises OSError, `Unsupported`, and `UsageError` of a verb that is written for an older context."""
        with naming_successors(self.ctx):
            if self.withheld:
                self._write("withheld")
            else:
                self._write("apply", ends=self.fault.ends(self.ctx, self.target))
                self.fault.apply(self.ctx, self.target)
            self._ask(self.fault.evidence(self.ctx, self.target), final=False)

    def undo(self) -> None:
        """Ask for the evidence if it was not there yet, and make whole. Once. Raises OSError."""
        if self.undone:
            return
        self.undone = True
        with naming_successors(self.ctx):
            try:
                if not self.asked:
                    self._ask(self.fault.evidence(self.ctx, self.target), final=True)
            finally:
                self._write("undo", detail=self.fault.undo(self.ctx, self.target))

    def _ask(self, evidence: Evidence, *, final: bool) -> None:
        if evidence.struck is None and not final:
            return
        self.asked = True
        self._write("evidence", struck=bool(evidence.struck), detail=evidence.detail)

    def _write(
        self, event: FaultEvent, *, struck: bool | None = None, detail: str = "", ends: tuple[str, ...] = ()
    ) -> None:
        self.log.write(
            Record(
                t=self.log.now(), fault=self.name, event=event, step=self.step, target=self.target, struck=struck,
                detail=detail, ends=ends, lets_go=self.fault.LETS_GO, fatal=self.fault.FATAL,
            )
        )  # fmt: skip
