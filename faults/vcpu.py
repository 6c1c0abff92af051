# SPDX-License-Identifier: Apache-2.0
"""Faults of a VM's vCPUs. Storms of calls on them are a step of their own (`chaos.experiment.steps.StormStep`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from chaos.fault import Evidence, Fault, FaultContext, Pending, Target
from chaos.history.records import Done
from faults.vmm import state

# While a move keeps the VM's lock a call waits, and no signal ends that wait: it is not over before the move is.
CREATED_WITHIN = 30.0
BEGUN_WITHIN = 10.0
MOST = 64


@dataclass(kw_only=True, slots=True)
class CreateVcpu(Fault):
    """Have the VMM create `count` more vCPUs of the VM, with ids from `first` on, one right after the other, whatever
    else it does meanwhile. Nobody drives them and the guest has nothing of them, but a move counts them: a SEV-ES
    context goes only where there are as many. It ends by itself, or when this is undone; what was created stays."""

    TARGET: ClassVar[Target] = "vm"
    PROOF: ClassVar[str] = "how many of the calls were under way at the same time as a move from the VM or into it"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False

    count: int = 16
    first: int = 100
    _calls: list[Pending] = field(init=False, default_factory=list)
    _asked: bool = field(init=False, default=False)
    _enough: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST or not 0 <= self.first <= 1024:
            raise ValueError(f"count is 1 to {MOST}, first 0 to 1024")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._next(ctx, target)
        first, pid = self._calls[0], ctx.vms.vmm_of(target).pid

        def inside() -> bool:
            return first.done is not None or (first.tid > 0 and state(pid, first.tid) == "D")

        ctx.wait(inside, BEGUN_WITHIN, f"{target} to be at its first vCPU, or to wait for its lock")

    def _next(self, ctx: FaultContext, target: str) -> None:
        if len(self._calls) < self.count and not self._enough and ctx.vms.vmm_of(target).status is None:
            call = ctx.vms.add_vcpu(target, self.first + len(self._calls), lambda: self._next(ctx, target))
            self._calls.append(call)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """Not before it is to be over, when this is asked a second time: the move may be still to come."""
        first, self._asked = not self._asked, True
        if first:
            return Evidence(None, f"{len(self._calls)} calls were made")
        self._settle(ctx, target)
        met = sum(any(_overlap(call, move) for move in ctx.vms.moves(target)) for call in self._calls)
        created = sum(call.done is not None and _created(call.done) for call in self._calls)
        detail = f"of {len(self._calls)} calls {met} met a move of {target}; {created} vCPUs were created"
        return Evidence(met > 0, detail)

    def _settle(self, ctx: FaultContext, target: str) -> bool:
        """Let the call that is under way be the last."""
        self._enough = True
        what = f"{target} to have its vCPUs"
        return ctx.wait(lambda: all(call.done is not None for call in self._calls), CREATED_WITHIN, what)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if not self._calls:
            return "none was to be created"
        return "what was created stays" if self._settle(ctx, target) else "some are still being created"


def _created(done: Done) -> bool:
    """Of a VM that has died meanwhile the vCPU is there, and what the VMM asks next is answered EIO."""
    return done.outcome == "ok" or (done.outcome == "fail" and done.value.get("call") != "KVM_CREATE_VCPU")


def _overlap(call: Pending, other: Pending) -> bool:
    """Whether both are known to have been inside the kernel at one time."""
    ours, theirs = call.done, other.done
    if ours is None or theirs is None or not ours.began or not theirs.began:
        return False
    return ours.began < theirs.ended and theirs.began < ours.ended
