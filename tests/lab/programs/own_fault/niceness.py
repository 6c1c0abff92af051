# SPDX-License-Identifier: Apache-2.0
"""A fault of somebody's own."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from chaos.fault import Evidence, Fault, Scene, Target


@dataclass(kw_only=True)
class Renice(Fault):
    """Give a VMM the lowest priority there is, so that everybody else comes first."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "the kernel tells the niceness that was asked for"

    niceness: int = 19
    _before: int = field(init=False, default=0)

    def apply(self, scene: Scene, target: str) -> None:
        pid = scene.vmm(target).pid
        self._before = os.getpriority(os.PRIO_PROCESS, pid)
        os.setpriority(os.PRIO_PROCESS, pid, self.niceness)

    def evidence(self, scene: Scene, target: str) -> Evidence:
        found = os.getpriority(os.PRIO_PROCESS, scene.vmm(target).pid)
        return Evidence(found == self.niceness, f"{target} has niceness {found}")

    def undo(self, scene: Scene, target: str) -> str:
        os.setpriority(os.PRIO_PROCESS, scene.vmm(target).pid, self._before)
        return f"{target} has niceness {self._before} again"
