# SPDX-License-Identifier: Apache-2.0
"""The kernel's own fault injection, at one point of one operation. Every point of an operation, one after the other, is
a step of its own (`chaos.experiment.steps.SweepStep`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.history.records import Value
from chaos.vmm.messages import ArmFailNth, FailedNth

MOST = 10_000


@dataclass(kw_only=True, slots=True)
class FailNth(Fault):
    """Let the `nth` fault point on the way of the VM's next `operation` fail, counted over all calls that it makes:
    an allocation of the kernel's, or a copy of its from or to the VMM. ENOMEM and EFAULT are allowed to it then. Pages
    that vmalloc takes never fail. A move is one of its destination. Undone before the operation is made, no point is to
    fail any more."""

    TARGET: ClassVar[Target] = "vm"
    NEEDS: ClassVar[str] = "a kernel with fault injection, a host of its own"
    PROOF: ClassVar[str] = "/proc/thread-self/fail-nth of the thread that made the operation has counted down to 0"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False

    operation: Literal[
        "create", "init", "create_vcpu", "command", "launch_start", "launch_update_data", "launch_update_vmsa",
        "launch_measure", "launch_finish", "register_region", "unregister_region", "set_memory", "irqfd", "ioeventfd",
        "dbg_decrypt", "dbg_encrypt", "run", "get_state", "set_state", "move", "mirror", "close",
    ]  # fmt: skip
    nth: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.nth <= MOST:
            raise ValueError(f"nth is 1 to {MOST}, not {self.nth}")

    def require(self, ctx: FaultContext, target: str) -> None:
        ctx.let_points_fail()

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.vms.vmm_of(target).ask(ArmFailNth(vm=target, operation=self.operation, nth=self.nth))

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        told = self._told(ctx, target)
        if told is None:
            return Evidence(False, "the process has ended")
        what = f"{self.operation} of {target}"
        if not told.get("done"):
            return Evidence(None, f"{what} has not been made")
        if not told["struck"]:
            return Evidence(False, f"{what} was made of {told['calls']} calls, with {told['points']} fault points")
        return Evidence(True, f"point {self.nth} failed, in call {told['call']} of {what}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        told = self._told(ctx, target, disarm=True)
        if told is None:
            return "the process has ended"
        return "nothing to undo: it is over" if told.get("done") else "no point is to fail"

    def _told(self, ctx: FaultContext, target: str, *, disarm: bool = False) -> Mapping[str, Value] | None:
        return ctx.vms.vmm_of(target).ask(FailedNth(vm=target, operation=self.operation, disarm=disarm))
