# SPDX-License-Identifier: Apache-2.0
"""The fault that takes every context, against a host that has few."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from faults.quota import Exhaust


@dataclass
class Context:
    """Has `free` contexts. `kept` are the VMs that are there."""

    free: int
    kept: list[str] = field(default_factory=list)

    def take(self, vmm: str, vm: str, key: str) -> Any:
        self.kept.append(vm)
        return SimpleNamespace(outcome="ok" if len(self.kept) <= self.free else "fail")

    def give_back(self, vmm: str, vm: str) -> None:
        self.kept.remove(vm)

    @property
    def vmms(self) -> Any:
        return {"other": SimpleNamespace(status=None)}

    @property
    def vms(self) -> Context:
        return self


@pytest.mark.parametrize(("free", "leave", "kept"), [(3, 0, 3), (3, 1, 2), (3, 3, 0), (3, 5, 0), (0, 0, 0)])
def test_what_was_refused_and_what_is_to_be_left_is_given_back(free: int, leave: int, kept: int) -> None:
    ctx, fault = Context(free), Exhaust(leave=leave)
    fault.apply(ctx, "other")  # type: ignore[arg-type]
    assert ctx.kept == [f"other-sev-{number}" for number in range(kept)]
    assert fault.undo(ctx, "other") == f"{kept} contexts were given back" and not ctx.kept  # type: ignore[arg-type]
