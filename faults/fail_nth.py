# SPDX-License-Identifier: Apache-2.0
"""The kernel's own fault injection: an allocation, or a copy from or to the VMM, fails inside a chosen operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from chaos.errors import InternalError
from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.history.records import Value
from chaos.vmm.messages import ArmFailNth, FailedNth

_MOST = 10_000


@dataclass(kw_only=True, slots=True)
class FailNth(Fault):
    """Let the `nth` fault point fail on the way of the VM's next `operation`: an allocation of the kernel's, or a copy
    of its from or to the VMM, counted over all ioctls that the operation makes. The step `sweep` does it with each."""

    TARGET: ClassVar[Target] = "vm"
    NEEDS: ClassVar[str] = "a kernel with fault injection, such as `kernel build … --with kasan` makes"
    PROOF: ClassVar[str] = (
        "the kernel's own count of points: that it came to its end, in which ioctl, and what that answered"
    )
    DISTURBS: ClassVar[bool] = False

    operation: str
    nth: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.nth <= _MOST:
            raise ValueError(f"nth is 1 to {_MOST}")

    def require(self, ctx: FaultContext, target: str) -> None:
        ctx.let_points_fail()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.vms.vmm_of(target).ask(ArmFailNth(vm=target, operation=self.operation, nth=self.nth))

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        told = self._ask(ctx, target, disarm=False)
        if not told.get("done"):
            return Evidence(None, f"no {self.operation} of {target} was made")
        if not told.get("struck"):
            made = self.nth - _number(told, "left")
            return Evidence(False, f"{self.operation} of {target} has {made} fault points, and no {self.nth}th")
        where = f"in ioctl {_number(told, 'call') + 1} of {_number(told, 'calls')}, and it answered {told.get('errno')}"
        return Evidence(True, f"fault point {self.nth} of {self.operation} of {target} failed, {where}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        self._ask(ctx, target, disarm=True)
        return "nothing is to fail any more"

    def _ask(self, ctx: FaultContext, target: str, *, disarm: bool) -> Mapping[str, Value]:
        return ctx.vms.vmm_of(target).ask(FailedNth(vm=target, disarm=disarm)) or {}


def _number(told: Mapping[str, Value], key: str) -> int:
    value = told.get(key)
    if not isinstance(value, int):
        raise InternalError(f"the agent says {value!r} for {key}")
    return value
