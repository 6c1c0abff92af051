# SPDX-License-Identifier: Apache-2.0
"""The operation of an agent in which the nth fault point of the kernel's is to fail, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from chaos.history.records import Value
from chaos.kvm.call import made_by
from chaos.native.failing import Failing
from chaos.vmm.messages import ArmFailNth, Operation, Reply, name_of


@dataclass(slots=True)
class PointsToFail:
    """By VM and operation, which is `armed`, at most one of each, and what came of the latest, `told`."""

    armed: dict[tuple[str, str], ArmFailNth] = field(default_factory=dict)
    told: dict[tuple[str, str], dict[str, Value]] = field(default_factory=dict)

    def arm(self, which: ArmFailNth) -> None:
        self.armed[which.vm, which.operation] = which
        self.told.pop((which.vm, which.operation), None)

    def tell(self, vm: str, operation: str, *, disarm: bool) -> dict[str, Value]:
        if disarm:
            self.armed.pop((vm, operation), None)
        return self.told.get((vm, operation), {})

    def within(self, do: Operation, make: Callable[[], Reply]) -> Reply:
        """What `make` answers, which carries the operation out. If it is the armed one it says itself which point was
        to fail, `fail_nth`, whether there was such a one and it failed, `struck`, and how many there were until then,
        `points`."""
        mine = getattr(do, "vm", ""), name_of(do)
        armed = self.armed.pop(mine, None)
        if armed is None:
            return make()
        with Failing(armed.nth) as failing, made_by(failing):
            reply = make()
        struck = int(failing.struck is not None)
        counted: dict[str, Value] = {"struck": struck, "points": failing.met}
        told = self.told[mine] = {"done": 1, **counted, "calls": failing.calls, "errno": reply.errno}
        if failing.struck is not None:
            told["call"] = failing.struck
        return msgspec.structs.replace(reply, value={**reply.value, "fail_nth": armed.nth, **counted})
