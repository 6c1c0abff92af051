# SPDX-License-Identifier: Apache-2.0
"""Faults of the quota of ASIDs: limits in the tree of cgroups, and a host that has none left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chaos.cgroup.group import Cgroup
from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.history.reading import levels

Key = Literal["sev", "sev_es"]


@dataclass(kw_only=True, slots=True)
class Limit(Fault):
    """Set `misc.max` of a cgroup, at whatever level, to `max`: below what is in use, to nothing, or to just enough.
    What it was before is put back when this is undone."""

    TARGET: ClassVar[Target] = "cgroup"
    PROOF: ClassVar[str] = "misc.max still reads so when it is taken back; how many charges it has refused is told"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False

    max: int
    key: Key = "sev"
    _before: int | None = field(init=False, default=None)
    _set: bool = field(init=False, default=False)
    _refused: int = field(init=False, default=0)
    _asked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max <= 1 << 31:
            raise ValueError(f"max is 0 to {1 << 31}, not {self.max}")

    def apply(self, ctx: FaultContext, target: str) -> None:
        misc = ctx.cgroups[target].misc()
        self._before = misc.get("max", {}).get(self.key)
        self._refused = refused(misc, self.key)
        ctx.cgroups.limit(target, self.key, self.max)
        self._set = True

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """First when it was set, which is too early to say: somebody may set it otherwise."""
        first, self._asked = not self._asked, True
        group = ctx.cgroups[target]
        misc = group.misc() if group.exists else {}
        read = misc.get("max", {}).get(self.key)
        if read != self.max:
            return Evidence(False, f"misc.max of {target} reads {self.key} {'max' if read is None else read}")
        used = misc.get("current", {}).get(self.key, 0)
        more = refused(misc, self.key) - self._refused
        detail = f"misc.max of {target} reads {self.key} {read}, {used} in use; refused since: {more}"
        return Evidence(None if first else True, detail)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if not self._set or not ctx.cgroups[target].exists:
            return "not applied"
        ctx.cgroups.limit(target, self.key, self._before)
        return f"misc.max of {target} is {self.key} {'max' if self._before is None else self._before} again"


@dataclass(kw_only=True, slots=True)
class Exhaust(Fault):
    """Let a VMM of the experiment, for which `target` stands, take every context of `key` that can be had but `leave`
    of them, and keep them until this is undone. Whether a limit or the host's capacity stops it is told."""

    TARGET: ClassVar[Target] = "vmm"
    DISTURBS: ClassVar[bool] = False
    PROOF: ClassVar[str] = (
        "the counters: at some level above that VMM what is in use has reached misc.max or the capacity"
    )

    key: Key = "sev"
    leave: int = 0
    _taken: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.leave <= 1 << 16:
            raise ValueError(f"leave is 0 to {1 << 16}, not {self.leave}")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        for number in range(1 << 16):
            vm = f"{target}-{self.key.replace('_', '-')}-{number}"
            self._taken.append(vm)
            if ctx.vms.take(target, vm, self.key).outcome != "ok":
                break
        for vm in self._taken[-1 - self.leave :]:  # what was refused left an empty VM
            ctx.vms.give_back(target, vm)
            self._taken.remove(vm)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        full = [told for left, told in self._room(ctx, target) if left == self.leave]
        if not full or not self._taken:
            rooms = "; ".join(told for _, told in self._room(ctx, target))
            return Evidence(False, f"{target} holds {len(self._taken)} contexts of {self.key}; {rooms}")
        return Evidence(True, f"{target} took {len(self._taken)} contexts of {self.key}; {'; '.join(full)}")

    def _room(self, ctx: FaultContext, target: str) -> Iterator[tuple[int, str]]:
        """How many more charges every level from the VMM's cgroup upwards has room for, in words."""
        capacity = capacity_above(ctx.cgroups["."], self.key)
        for level in reversed(levels(ctx.cgroups.home(ctx.vmms[target]))):
            misc = ctx.cgroups[level].misc()
            used, limit = misc.get("current", {}).get(self.key), misc.get("max", {}).get(self.key)
            if used is None:
                continue
            if limit is not None and limit < capacity:
                yield limit - used, f"{level} uses {used} of its limit of {limit}"
            else:
                yield capacity - used, f"{level} uses {used} of the host's capacity of {capacity}"

    def undo(self, ctx: FaultContext, target: str) -> str:
        if ctx.vmms[target].status is not None:
            return "they went with their VMM"
        count = len(self._taken)
        while self._taken:
            ctx.vms.give_back(target, self._taken.pop())
        return f"{count} contexts were given back"


def refused(misc: dict[str, dict[str, int]], key: str) -> int:
    """How many charges a limit of this cgroup, or one below it, has refused."""
    return misc.get("events", {}).get(f"{key}.max", 0)


def capacity_above(group: Cgroup, key: str) -> int:
    """The host's capacity, which only the root of the hierarchy tells."""
    for path in group.path.parents:
        found = Cgroup.at(path).capacity()
        if found is not None:
            return found.get(key, 0)
    return 0
