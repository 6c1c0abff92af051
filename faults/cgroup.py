# SPDX-License-Identifier: Apache-2.0
"""Faults of the tree of cgroups under a VMM: it is put elsewhere, its cgroup goes, stands still, or loses its
controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import ClassVar

from chaos.fault import Evidence, Fault, FaultContext, Target, Victim
from chaos.linux.task import look
from faults.vmm import ended

FREEZER = frozenset({"do_freezer_trap", "get_signal"})  # the one inlined into the other, or not
FROZEN_WITHIN = 2.0
EMPTY_WITHIN = 2.0


@dataclass(kw_only=True, slots=True)
class Enter(Fault):
    """Put the VMM, all of it, into the cgroup `into`. It is put back when this is undone."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "cgroup.threads of that cgroup has every thread of the process that has not ended"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False
    NAMES: ClassVar[Mapping[str, Target]] = {"into": "cgroup"}

    into: str
    _from: str | None = field(init=False, default=None)

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._from = ctx.cgroups.home(ctx.vmms[target])
        ctx.cgroups.enter(ctx.vmms[target], self.into)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        home = ctx.cgroups.home(ctx.vmms[target])
        return Evidence(home == self.into, f"every thread of {target} is in {home}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if ctx.vmms[target].status is not None:
            return f"{target} has ended"
        if self._from is None or not ctx.cgroups[self._from].exists:
            return "nothing to undo: there is no way back"
        ctx.cgroups.enter(ctx.vmms[target], self._from)
        return f"{target} is in {self._from} again"


@dataclass(kw_only=True, slots=True)
class RemoveCgroup(Fault):
    """Remove a cgroup that something is still charged to; nobody lives in it any more. It is made again, with its
    limits and nothing charged, when this is undone. Where the kernel counts the dying of each controller, from 6.12
    on, what it says of misc is told too."""

    TARGET: ClassVar[Target] = "cgroup"
    NEEDS: ClassVar[str] = "no process in the cgroup, and no cgroup below it"
    PROOF: ClassVar[str] = "it is gone, it was charged until then, and the run's cgroup counts it as a dying one"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False

    _charged: dict[str, int] = field(init=False, default_factory=dict)
    _limits: dict[str, int] = field(init=False, default_factory=dict)
    _dying: int = field(init=False, default=0)
    _of_misc: int | None = field(init=False, default=None)

    def apply(self, ctx: FaultContext, target: str) -> None:
        misc = ctx.cgroups[target].misc()
        self._charged = {key: number for key, number in misc.get("current", {}).items() if number}
        self._limits = misc.get("max", {})
        # A thread that has just ended is in it a little longer than anybody can see. If more is, the kernel refuses.
        ctx.wait(lambda: not ctx.cgroups[target].populated, EMPTY_WITHIN, f"{target} to be empty")
        ctx.cgroups.remove(target)
        self._dying, self._of_misc = ctx.cgroups["."].dying(), ctx.cgroups["."].dying_of("misc")

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        if ctx.cgroups[target].exists:
            return Evidence(False, f"{target} is there")
        charged = ", ".join(f"{key} {number}" for key, number in self._charged.items())
        detail = f"{target} is gone, charged {charged or 'nothing'}; dying cgroups: {self._dying}"
        if self._of_misc is not None:
            detail += f", of misc {self._of_misc}"
        return Evidence(bool(charged) and self._dying > 0, detail)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if ctx.cgroups[target].exists:
            return "the cgroup is there"
        ctx.cgroups.add(target)
        for key, number in self._limits.items():
            ctx.cgroups.limit(target, key, number)
        return f"{target} was made again"


@dataclass(kw_only=True, slots=True)
class Freeze(Fault):
    """Freeze a cgroup: every process in it stands still where it next leaves the kernel, a vCPU out of its guest. It is
    thawed when this is undone."""

    TARGET: ClassVar[Target] = "cgroup"
    PROOF: ClassVar[str] = (
        "cgroup.events says frozen 1, at the latest when it is thawed: what waits in the kernel is not. Where a thread"
        " of the kernel's own lives there, as KVM's does on 6.1, it never does: then every thread of the VMMs in it"
        " must sleep in the freezer"
    )

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.cgroups[target].freeze(True)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        group, victims = ctx.cgroups[target], ctx.cgroups.living_in(target)
        frozen = ctx.wait(lambda: group.frozen or _all_frozen(victims), FROZEN_WITHIN, f"{target} to freeze")
        threads = [state for victim in victims for state in _in_freezer(victim.pid)]
        detail = f"cgroup.events of {target} says frozen {int(group.frozen)}, with {len(victims)} VMMs in it"
        return Evidence(True if frozen else None, f"{detail}, {sum(threads)} of their {len(threads)} threads frozen")

    def undo(self, ctx: FaultContext, target: str) -> str:
        group = ctx.cgroups[target]
        if not group.exists:
            return "the cgroup is gone"
        victims = ctx.cgroups.living_in(target)
        group.freeze(False)
        thawed = ctx.wait(lambda: not (group.frozen or _all_frozen(victims)), FROZEN_WITHIN, f"{target} to thaw")
        return "thawed" if thawed else "still frozen"


def _all_frozen(victims: Iterable[Victim]) -> bool:
    threads = [frozen for victim in victims for frozen in _in_freezer(victim.pid)]
    return bool(threads) and all(threads)


def _in_freezer(pid: int) -> list[bool]:
    """Of each thread that has not ended, whether it sleeps where a frozen cgroup holds it."""
    tids = (int(task.name) for task in Path(f"/proc/{pid}/task").glob("*"))
    found = (look(pid, tid) for tid in tids)
    living = [each for each in found if each is not None and each.state not in ("Z", "X")]
    return [each.state == "S" and not FREEZER.isdisjoint((each.wchan, *each.stack)) for each in living]


@dataclass(kw_only=True, slots=True)
class KillCgroup(Fault):
    """End every process in a cgroup and below it at once, with cgroup.kill."""

    TARGET: ClassVar[Target] = "cgroup"
    FATAL: ClassVar[bool] = True
    DISTURBS: ClassVar[bool] = False
    PROOF: ClassVar[str] = "every VMM that lived there was reaped, ended by SIGKILL"

    _hit: tuple[Victim, ...] = field(init=False, default=())

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return tuple(victim.name for victim in ctx.cgroups.living_in(target))

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._hit = ctx.cgroups.living_in(target)
        ctx.cgroups[target].kill()

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        if not self._hit:
            return Evidence(False, f"no VMM in {target} was hit")
        each = [ended(victim, Signals.SIGKILL) for victim in self._hit]
        return Evidence(all(one.struck for one in each), "; ".join(one.detail for one in each))

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "nothing to undo"


@dataclass(kw_only=True, slots=True)
class DisableMisc(Fault):
    """Take the misc controller from everything below a cgroup: what is charged there stays charged to accounts that
    nobody can read any more, and who takes an ASID below is charged here. It is given back, with the limits, when this
    is undone."""

    TARGET: ClassVar[Target] = "cgroup"
    NEEDS: ClassVar[str] = "cgroups below the one it strikes"
    PROOF: ClassVar[str] = "cgroup.controllers of every cgroup below has no misc"
    LETS_GO: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = False

    _disabled: list[str] = field(init=False, default_factory=list)
    _limits: list[tuple[str, str, int]] = field(init=False, default_factory=list)

    def apply(self, ctx: FaultContext, target: str) -> None:
        below = ctx.cgroups.below(target)
        for path in below:
            limits = ctx.cgroups[path].misc().get("max", {})
            self._limits += [(path, key, number) for key, number in limits.items()]
        for path in reversed((target, *below)):  # the kernel wants the deepest first
            if ctx.cgroups[path].divides("misc"):
                ctx.cgroups.disable_misc(path)
                self._disabled.append(path)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        below = ctx.cgroups.below(target)
        without = [path for path in below if not ctx.cgroups[path].has("misc")]
        return Evidence(
            bool(below) and without == list(below),
            f"{len(without)} of {len(below)} cgroups below {target} have no misc",
        )

    def undo(self, ctx: FaultContext, target: str) -> str:
        count = len(self._disabled)
        while self._disabled:
            path = self._disabled.pop()
            if ctx.cgroups[path].exists:
                ctx.cgroups.enable_misc(path)
        while self._limits:
            path, key, number = self._limits.pop()
            if ctx.cgroups[path].exists:
                ctx.cgroups.limit(path, key, number)
        return f"the children of {count} cgroups have misc again"
