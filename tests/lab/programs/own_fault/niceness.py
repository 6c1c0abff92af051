# SPDX-License-Identifier: Apache-2.0
"""A fault of somebody's own."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from chaos.fault import Evidence, Fault, FaultContext, Target


@dataclass(kw_only=True)
class Renice(Fault):
    """Give a VMM the lowest priority there is, so that everybody else comes first."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "the kernel tells the niceness that was asked for"

    niceness: int = 19
    _before: int = field(init=False, default=0)

    def apply(self, ctx: FaultContext, target: str) -> None:
        pid = ctx.vmms[target].pid
        self._before = os.getpriority(os.PRIO_PROCESS, pid)
        os.setpriority(os.PRIO_PROCESS, pid, self.niceness)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        found = os.getpriority(os.PRIO_PROCESS, ctx.vmms[target].pid)
        return Evidence(found == self.niceness, f"{target} has niceness {found}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        os.setpriority(os.PRIO_PROCESS, ctx.vmms[target].pid, self._before)
        return f"{target} has niceness {self._before} again"
