# SPDX-License-Identifier: Apache-2.0
"""vCPUs that are created during a move, in a VMM that is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from chaos import fault
from chaos.errors import UsageError
from chaos.history.records import Done, Value
from faults.vcpu import CreateVcpu


@dataclass
class Call:
    done: Done | None = None
    tid: int = 0


@dataclass
class Vmm:
    """Answers a call when it is told to. `spans` are the moves, each from when to when."""

    spans: tuple[tuple[int, int], ...] = ()
    status: int | None = None
    pid: int = 0
    calls: list[tuple[int, Call, Callable[[], None]]] = field(default_factory=list)

    def add_vcpu(self, vm: str, id: int, then: Callable[[], None]) -> Call:
        self.calls.append((id, Call(), then))
        return self.calls[-1][1]

    def answer(self, began: int, ended: int, errno: int = 0, refused: str = "KVM_CREATE_VCPU") -> None:
        _, call, then = self.calls[-1]
        outcome: Literal["ok", "fail"] = "fail" if errno else "ok"
        value: dict[str, Value] = {"call": refused} if errno else {}
        call.done = Done(t=ended, op=0, outcome=outcome, errno=errno, began=began, ended=ended, value=value)
        then()

    def ctx(self) -> Any:
        moves = tuple(Call(done=Done(t=b, op=9, outcome="ok", began=a, ended=b)) for a, b in self.spans)
        vms = SimpleNamespace(add_vcpu=self.add_vcpu, vmm_of=lambda vm: self, moves=lambda vm: moves)
        return SimpleNamespace(vms=vms, wait=lambda happened, within, what: happened())


def test_one_comes_after_the_other_and_one_that_met_a_move_is_the_evidence() -> None:
    vmm, fault = Vmm(spans=((25, 40),)), CreateVcpu(count=3, first=7)
    fault.apply(vmm.ctx(), "new")
    assert fault.evidence(vmm.ctx(), "new").struck is None, "the move may be still to come"
    for times in ((10, 20), (22, 30), (50, 60)):
        vmm.answer(*times)
    assert [number for number, _, _ in vmm.calls] == [7, 8, 9]
    evidence = fault.evidence(vmm.ctx(), "new")
    assert evidence.struck is True and "of 3 calls 1 met a move of new; 3 vCPUs were created" in evidence.detail
    assert fault.undo(vmm.ctx(), "new") == "what was created stays"


@pytest.mark.parametrize(("refused", "created"), [("KVM_CREATE_VCPU", 0), ("KVM_CHECK_EXTENSION", 1)])
def test_a_vcpu_of_a_vm_that_died_meanwhile_was_created(refused: str, created: int) -> None:
    vmm, fault = Vmm(spans=((15, 40),)), CreateVcpu(count=1)
    fault.apply(vmm.ctx(), "old")
    fault.evidence(vmm.ctx(), "old")
    vmm.answer(10, 50, errno=5, refused=refused)
    evidence = fault.evidence(vmm.ctx(), "old")
    assert evidence.struck is True and f"1 met a move of old; {created} vCPUs were created" in evidence.detail


def test_calls_before_and_after_every_move_prove_nothing() -> None:
    vmm, fault = Vmm(spans=((25, 40), (70, 80))), CreateVcpu(count=2)
    fault.apply(vmm.ctx(), "new")
    fault.evidence(vmm.ctx(), "new")
    vmm.answer(10, 20)
    vmm.answer(45, 60)
    assert fault.evidence(vmm.ctx(), "new").struck is False


def test_no_more_are_created_once_it_is_asked_for_the_last_time_or_its_vmm_is_dead() -> None:
    vmm, fault = Vmm(spans=((5, 15),)), CreateVcpu(count=9)
    fault.apply(vmm.ctx(), "new")
    fault.evidence(vmm.ctx(), "new")
    fault.evidence(vmm.ctx(), "new")
    assert fault.undo(vmm.ctx(), "new") == "some are still being created"
    vmm.answer(1, 9)
    assert len(vmm.calls) == 1
    dying, other = Vmm(), CreateVcpu(count=9)
    other.apply(dying.ctx(), "new")
    dying.status = -9
    dying.answer(0, 0, errno=5)
    assert len(dying.calls) == 1


def test_what_was_never_applied_did_not_strike() -> None:
    fault, ctx = CreateVcpu(), Vmm(spans=((1, 2),)).ctx()
    fault.evidence(ctx, "new")
    assert fault.evidence(ctx, "new").struck is False
    assert fault.undo(ctx, "new") == "none was to be created"


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 65}, {"first": -1}, {"first": 2000}, {"many": 1}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        fault.find("create-vcpu", options)
