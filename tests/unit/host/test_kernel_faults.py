# SPDX-License-Identifier: Apache-2.0
"""Faults of a kernel function, against a module that is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from chaos import fault
from chaos.errors import Unsupported, UsageError
from chaos.linux.kfault import Action, Event, Happening, Refused, Slot
from faults.kernel import Delay, Return


@dataclass
class Module:
    """Keeps what it was told. `calls` are those that it says to have struck."""

    refuses: int = 0
    there: bool = True
    calls: int = 0
    asked: list[str] = field(default_factory=list)
    cleared: list[Slot] = field(default_factory=list)

    def require(self, function: str) -> None:
        if not self.there:
            raise Unsupported(f"no {function}")

    def _arm(self, action: Action, function: str, argument: int, nth: int, times: int, pid: int | None) -> Slot:
        if self.refuses:
            raise Refused(f"{action} {function}", self.refuses)
        self.asked.append(f"{action} {function} {argument} nth={nth} times={times} pid={pid}")
        return Slot(0, action, function, nth, times, pid, 0)

    def returns(self, function: str, *, value: int, nth: int, times: int, pid: int | None) -> Slot:
        return self._arm(Action.RETURN, function, value, nth, times, pid)

    def delay(self, function: str, *, microseconds: int, nth: int, times: int, pid: int | None) -> Slot:
        return self._arm(Action.DELAY, function, microseconds, nth, times, pid)

    def told(self, slot: Slot, what: Happening) -> tuple[Event, ...]:
        return tuple(Event(what, 0, slot.action, slot.function, 7, 8, n + 1, n, 0) for n in range(self.calls))

    def clear(self, slot: Slot) -> int:
        self.cleared.append(slot)
        return self.calls


def ctx(module: Module) -> Any:
    return SimpleNamespace(
        kfault=lambda: module, vmms={name: SimpleNamespace(pid=42) for name in ("source", "destination")}
    )


def test_it_is_applied_seen_and_undone() -> None:
    module = Module()
    planted = Return(function="misc_cg_uncharge", value=0)
    on = ctx(module)
    planted.apply(on, "destination")
    assert module.asked == ["return misc_cg_uncharge 0 nth=1 times=1 pid=42"]
    assert planted.evidence(on, "destination").struck is None, "it may come yet"
    module.calls = 7
    evidence = planted.evidence(on, "destination")
    assert evidence.struck is True
    assert "misc_cg_uncharge returned: call 1 by 7/8, " in evidence.detail and evidence.detail.endswith("and 2 more")
    assert planted.undo(on, "destination") == "misc_cg_uncharge is itself again; 7 calls were counted"
    assert len(module.cleared) == 1


def test_what_was_never_applied_did_not_strike_and_is_undone_all_the_same() -> None:
    planted = Delay(function="sev_asid_free", microseconds=5)
    assert planted.evidence(ctx(Module()), "").struck is False
    assert planted.undo(ctx(Module()), "") == "nothing was armed"


def test_without_a_target_everybody_s_calls_count() -> None:
    module = Module()
    Delay(function="sev_asid_free", microseconds=20_000, nth=2, times=0).apply(ctx(module), "")
    assert module.asked == ["delay sev_asid_free 20000 nth=2 times=0 pid=None"]


def test_an_error_by_name() -> None:
    module = Module()
    Return(function="misc_cg_try_charge", value="-EBUSY").apply(ctx(module), "source")
    assert module.asked == ["return misc_cg_try_charge -16 nth=1 times=1 pid=42"]


def test_whether_it_can_be_done_is_asked_without_striking_anybody() -> None:
    module = Module()
    Return(function="misc_cg_uncharge", value=0, times=0).require(ctx(module), "destination")
    assert module.asked == [f"return misc_cg_uncharge 0 nth={1 << 62} times=0 pid=None"]
    assert len(module.cleared) == 1
    for lacking in (Module(there=False), Module(refuses=1)):
        with pytest.raises(Unsupported):
            Return(function="sev_vm_destroy", value=0).require(ctx(lacking), "")


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("kernel-return", {"function": "f", "value": "EBUSY"}, "no number, and no error"),
        ("kernel-return", {"function": "f", "value": "-ENOSUCH"}, "no number, and no error"),
        ("kernel-return", {"function": "f", "value": 1 << 63}, "does not fit"),
        ("kernel-return", {"function": "a b", "value": 0}, "not the name of a kernel function"),
        ("kernel-return", {"function": "f"}, "value: it is missing"),
        ("kernel-return", {"function": "f", "value": 0, "nth": 0}, "calls count from 1"),
        ("kernel-return", {"function": "f", "value": 0, "times": -1}, "calls count from 1"),
        ("kernel-delay", {"function": "f", "microseconds": -1}, "it may be 0 to"),
        ("kernel-delay", {"function": "f", "value": 0}, "has no option 'value'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(name: str, options: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        fault.find(name, options)
