# SPDX-License-Identifier: Apache-2.0
"""Faults of the CPUs that VMMs run on."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from chaos.cgroup.group import Cgroup
from chaos.errors import Unsupported
from chaos.fault import Evidence, Fault, FaultContext, Target, Victim
from faults.vmm import require_controller

CPUS = Path("/sys/devices/system/cpu")
ONLINE, OFFLINE = "1", "0"


def _threads(pid: int) -> tuple[int, ...]:
    return tuple(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())


@dataclass(kw_only=True, slots=True)
class Pin(Fault):
    """Put every thread that a VMM has onto one CPU, and with them those that they start.

    Two VMMs that are pinned to one CPU take turns on it: whatever one does while the other waits has to wait as well.
    """

    TARGET: ClassVar[Target] = "vmm"
    DISTURBS: ClassVar[bool] = False
    NEEDS: ClassVar[str] = "the CPU"
    PROOF: ClassVar[str] = "the affinity that the kernel tells of each thread is this CPU alone"

    cpu: int = 1
    _before: dict[int, set[int]] = field(init=False, default_factory=dict)

    _victim: Victim | None = field(init=False, default=None)

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def require(self, ctx: FaultContext, target: str) -> None:
        if self.cpu not in os.sched_getaffinity(0):
            raise Unsupported(f"there is no CPU {self.cpu} to run on here", remedy="choose another")

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._victim = ctx.vmms[target]
        for tid in _threads(self._victim.pid):
            self._before[tid] = os.sched_getaffinity(tid)
            os.sched_setaffinity(tid, {self.cpu})

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        try:
            found = {tid: os.sched_getaffinity(tid) for tid in _threads(ctx.vmms[target].pid)}
        except (FileNotFoundError, ProcessLookupError):
            return Evidence(False, f"{target} is gone")
        elsewhere = [tid for tid, cpus in found.items() if cpus != {self.cpu}]
        return Evidence(
            bool(found) and not elsewhere, f"{len(found) - len(elsewhere)} of {len(found)} threads on CPU {self.cpu}"
        )

    def undo(self, ctx: FaultContext, target: str) -> str:
        """Of the process that was pinned: a dead one's numbers may be somebody else's by now."""
        if self._victim is None or not self._before:
            return "no thread was pinned"
        if self._victim.status is not None:
            return f"{target} has ended"
        pid = self._victim.pid
        freed = 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may be ending
            for tid in _threads(pid):
                os.sched_setaffinity(tid, self._before.get(tid, self._before[pid]))
                freed += 1
        return f"{freed} threads may run where they could before"


@dataclass(kw_only=True, slots=True)
class CpuOffline(Fault):
    """Take a CPU offline. What ran on it is moved to the others, in the middle of whatever it does."""

    TARGET: ClassVar[Target] = "host"
    NEEDS: ClassVar[str] = "a CPU that can be taken offline, and another one beside it; a host that nobody shares"
    PROOF: ClassVar[str] = "the kernel no longer counts the CPU among those online"

    cpu: int = 1
    _taken: bool = field(init=False, default=False)

    @property
    def _switch(self) -> Path:
        return CPUS / f"cpu{self.cpu}" / "online"

    def require(self, ctx: FaultContext, target: str) -> None:
        if not self._switch.exists():
            raise Unsupported(f"CPU {self.cpu} is not there, or cannot be taken offline", remedy="choose another")
        if not self._online:
            raise Unsupported(f"CPU {self.cpu} is offline already", remedy="choose another, or bring it online")

    @property
    def _online(self) -> bool:
        return self._switch.read_text().strip() == ONLINE

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._taken = self._online
        if self._taken:
            ctx.host.remember(self._switch, ONLINE)
        self._switch.write_text(OFFLINE)
        ctx.count_entries(self.cpu)  # when it comes back it begins to give ASIDs anew

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        online = (CPUS / "online").read_text().strip()
        return Evidence(self._taken and not self._online, f"online: {online}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if not self._taken:
            return f"CPU {self.cpu} was not taken"
        self._switch.write_text(ONLINE)
        ctx.host.forget(self._switch, ONLINE)
        return f"CPU {self.cpu} is online"


@dataclass(kw_only=True, slots=True)
class CpuThrottle(Fault):
    """Let the VMM, with all else in its cgroup, run for only `percent` of one CPU's time (cpu.max). When that is used
    up it stands still until the next period of `milliseconds`, also in the kernel with whatever lock it has there."""

    TARGET: ClassVar[Target] = "vmm"
    NEEDS: ClassVar[str] = "the cpu controller, no process in any cgroup above the VMM's"
    PROOF: ClassVar[str] = "cpu.stat of its cgroup counts more periods in which it had to stand still"
    LETS_GO: ClassVar[bool] = False

    percent: int = 20
    milliseconds: int = 100
    _group: Cgroup | None = field(init=False, default=None)
    _before: tuple[int, int] = field(init=False, default=(0, 0))
    _asked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not 1 <= self.percent <= 99 or not 1 <= self.milliseconds <= 1000 or self.quota < 1000:
            raise ValueError("percent is 1 to 99, milliseconds 1 to 1000, and of a period at least one can be run")

    @property
    def quota(self) -> int:
        """In microseconds."""
        return self.milliseconds * 10 * self.percent

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def require(self, ctx: FaultContext, target: str) -> None:
        require_controller(ctx, "cpu")

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._group = ctx.cgroups[ctx.cgroups.home(ctx.vmms[target])]
        ctx.enable_controller(ctx.cgroups.home(ctx.vmms[target]), "cpu")
        self._before = self._group.throttled()
        self._group.limit_cpu(self.quota, self.milliseconds * 1000)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """Not before it is to be over, when this is asked a second time."""
        first, self._asked = not self._asked, True
        group = self._group or ctx.cgroups[ctx.cgroups.home(ctx.vmms[target])]
        periods, spent = (now - before for now, before in zip(group.throttled(), self._before, strict=True))
        detail = f"the cgroup of {target} stood still in {periods} periods, {spent / 1000:.0f} ms in all"
        return Evidence(None if first else periods > 0, detail)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._group is None:
            return "there was no limit"
        if self._group.exists and self._group.has("cpu"):
            self._group.limit_cpu(None)
        return "it may run as much as before"
