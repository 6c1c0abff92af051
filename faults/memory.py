# SPDX-License-Identifier: Apache-2.0
"""Faults of memory: what a VMM may lock, what its guest has, and what its cgroup is allowed. Running out of it is
`faults.vmm.Oom`."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from errno import EIO
from pathlib import Path
from typing import ClassVar, Literal

from chaos.cgroup.group import Cgroup
from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.vmm.harm import CAP_IPC_LOCK
from chaos.vmm.messages import Press, PunchOut, Shown
from faults.vmm import require_controller

PAGE = 4096
PAGES = 64
KEEP_SIZE_PUNCH_HOLE = 0x3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
PRESSED_WITHIN = 30.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_libc.fallocate.restype = ctypes.c_int


@dataclass(kw_only=True, slots=True)
class Memlock(Fault):
    """Take CAP_IPC_LOCK from the VMM and set its RLIMIT_MEMLOCK to `kibibytes`: KVM pins no more of a guest's memory
    than that. What is pinned stays. Both are as before when this is undone."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "/proc/PID/limits has the limit, and /proc/PID/status no CAP_IPC_LOCK in force"
    LETS_GO: ClassVar[bool] = False

    kibibytes: int = 0
    _set: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not 0 <= self.kibibytes <= 1 << 20:
            raise ValueError(f"kibibytes is 0 to {1 << 20}, not {self.kibibytes}")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._set = True
        ctx.vmms[target].limit_memlock(self.kibibytes << 10)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        process = Path("/proc", str(ctx.vmms[target].pid))
        try:
            limits, status = (process / "limits").read_text(), (process / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return Evidence(False, f"{target} is gone")
        soft = next(line.split()[3] for line in limits.splitlines() if line.startswith("Max locked memory"))
        effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
        may = bool(effective >> CAP_IPC_LOCK & 1)
        detail = f"{target} may lock {soft} bytes, {'with' if may else 'without'} CAP_IPC_LOCK"
        return Evidence(soft == str(self.kibibytes << 10) and not may, detail)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if not self._set:
            return "there was no limit"
        if ctx.vmms[target].status is not None:
            return f"{target} has ended"
        ctx.vmms[target].limit_memlock(None)
        return f"{target} may lock what it could before"


@dataclass(kw_only=True, slots=True)
class HolePunch(Fault):
    """Take `pages` pages from page `page` on out of the file that the guest's memory is: the file has a hole there,
    which reads as zeros, while KVM keeps the old pages pinned. By whoever has the file (punch: fallocate), or by the
    VMM (remove: madvise). The guest counts in the first pages, one a vCPU from the third on; what it loses is gone."""

    TARGET: ClassVar[Target] = "vm"
    PROOF: ClassVar[str] = "the file has a hole there where it had pages (SEEK_HOLE, SEEK_DATA)"
    LETS_GO: ClassVar[bool] = False

    page: int = 48
    pages: int = 16
    way: Literal["punch", "remove"] = "punch"
    _before: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if not 0 <= self.page < PAGES or not 1 <= self.pages <= PAGES - self.page:
            raise ValueError(f"the guest has pages 0 to {PAGES - 1}")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        memory, offset, length = ctx.vms.memory(target), self.page * PAGE, self.pages * PAGE
        self._before = not is_hole(memory, offset, length)
        if self.way == "remove":
            ctx.vms.vmm_of(target).ask(PunchOut(vm=target, offset=offset, length=length))
        elif _libc.fallocate(memory, KEEP_SIZE_PUNCH_HOLE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, f"fallocate: {os.strerror(number)}")

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        hole = is_hole(ctx.vms.memory(target), self.page * PAGE, self.pages * PAGE)
        now, then = ("a hole" if hole else "no hole"), ("pages" if self._before else "none")
        return Evidence(hole and self._before, f"{now} at page {self.page} of {target}, where there were {then}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "nothing to undo: the pages are gone"


@dataclass(kw_only=True, slots=True)
class MemslotGone(Fault):
    """Take the VM's memory slot away (KVM_SET_USER_MEMORY_REGION of size 0): there is nothing where the guest was, and
    a vCPU that runs leaves it. What is pinned stays. The slot is put there again when this is undone. A VM whose
    context was moved away must refuse it with EIO (P3): there it is the attempt that counts."""

    TARGET: ClassVar[Target] = "vm"
    PROOF: ClassVar[str] = (
        "KVM takes another slot in the place of this one, which it refuses while that is there; "
        "a VM whose context was moved away answered EIO"
    )

    _gone: bool = field(init=False, default=False)
    _refused: bool = field(init=False, default=False)

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        done = ctx.vms.set_memory(target, False)
        self._refused = done.errno == EIO and ctx.vms.is_dead(target)
        if done.outcome == "fail" and not self._refused:
            raise OSError(done.errno, f"KVM_SET_USER_MEMORY_REGION: {os.strerror(done.errno)}")
        self._gone = not self._refused

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        if ctx.vms.is_dead(target) and not self._gone:
            said = "answered EIO" if self._refused else "was not asked"
            return Evidence(self._refused, f"{target} is dead and {said}")
        told = ctx.vms.vmm_of(target).ask(Shown(vm=target))
        if told is None:
            return Evidence(False, "the process has ended")
        return Evidence(not told["there"], f"{target} has {'its' if told['there'] else 'no'} memory slot")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if not self._gone:
            return "nothing to undo: the slot stays" if self._refused else "not applied"
        if ctx.vms.vmm_of(target).status is not None:
            return "the process has ended"
        done = ctx.vms.set_memory(target, True)
        return "the slot is there again" if done.outcome == "ok" else f"the slot stays away: {os.strerror(done.errno)}"


@dataclass(kw_only=True, slots=True)
class MemoryPressure(Fault):
    """Let the VMM use `mebibytes` more of memory, which its cgroup is just short of (memory.high): whoever in it asks
    for more is made to wait, some ten milliseconds for each quarter of a mebibyte. The VMM keeps what it uses until
    this is undone, and asks for no more."""

    TARGET: ClassVar[Target] = "vmm"
    NEEDS: ClassVar[str] = "the memory controller, no process in any cgroup above the VMM's"
    PROOF: ClassVar[str] = "memory.events of its cgroup counts that it was over memory.high"
    LETS_GO: ClassVar[bool] = False

    mebibytes: int = 32
    _group: Cgroup | None = field(init=False, default=None)
    _before: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 32 <= self.mebibytes <= 512:
            raise ValueError(f"mebibytes is 32 to 512, not {self.mebibytes}")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def require(self, ctx: FaultContext, target: str) -> None:
        require_controller(ctx, "memory")

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._group = ctx.cgroups[ctx.cgroups.home(ctx.vmms[target])]
        ctx.enable_controller(ctx.cgroups.home(ctx.vmms[target]), "memory")
        self._before = self._group.memory_events("high")
        # How long one waits grows with the square of how far beyond it the cgroup is, up to two seconds each time.
        self._group.slow_memory(self._group.memory_used() + (self.mebibytes << 20) * 31 // 32)
        ctx.vmms[target].ask(Press(mebibytes=self.mebibytes))

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        group = self._group or ctx.cgroups[ctx.cgroups.home(ctx.vmms[target])]
        if self._group is not None:
            ctx.wait(lambda: group.memory_events("high") > self._before, PRESSED_WITHIN, f"{target} to be over")
        over = group.memory_events("high") - self._before
        return Evidence(over > 0, f"the cgroup of {target} was over memory.high {over} times")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._group is None:
            return "there was no limit"
        if self._group.exists and self._group.has("memory"):
            self._group.slow_memory(None)  # before it is asked: it may be waiting
        ctx.vmms[target].ask(Press(mebibytes=0))
        return "it has what memory it wants"


def is_hole(file: int, offset: int, length: int) -> bool:
    """Whether the file has no page in there."""
    if os.lseek(file, offset, os.SEEK_HOLE) != offset:
        return False
    try:
        return os.lseek(file, offset, os.SEEK_DATA) >= offset + length
    except OSError:  # ENXIO: none up to its end
        return True
