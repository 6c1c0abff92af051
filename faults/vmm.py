# SPDX-License-Identifier: Apache-2.0
"""Faults of a VMM process as a whole."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGSTOP, Signals, pidfd_send_signal
from typing import ClassVar, Literal

from chaos.cgroup.group import Cgroup
from chaos.errors import Unsupported
from chaos.fault import Evidence, Fault, FaultContext, Target, Victim
from chaos.linux.task import parse_state
from chaos.vmm.messages import Eat, EndThread, Inside

# A process that sleeps in the kernel where only a fatal signal can reach it takes a moment to unwind.
GONE_WITHIN = 30.0
STOPPED_WITHIN = 5.0


@dataclass(kw_only=True, slots=True)
class Kill(Fault):
    """End the process with a signal. What it owned goes with it, and what it was doing is never answered."""

    TARGET: ClassVar[Target] = "vmm"
    FATAL: ClassVar[bool] = True
    DISTURBS: ClassVar[bool] = False
    PROOF: ClassVar[str] = "the process was reaped, ended by just this signal"

    signal: Literal["KILL", "TERM", "ABRT", "SEGV"] = "KILL"
    _hit: Victim | None = field(init=False, default=None)

    @property
    def number(self) -> Signals:
        return Signals[f"SIG{self.signal}"]

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._hit = ctx.vmms[target]  # one that is started in its stead has its name
        pidfd_send_signal(self._hit.pidfd, self.number)

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._hit is None:
            return "not applied"
        return "nothing to undo" if self._hit.status is not None else "the process lives"

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        return ended(ctx.vmms[target], self.number)


@dataclass(kw_only=True, slots=True)
class KillBoth(Fault):
    """End two VMMs with SIGKILL, one right after the other, so that neither side sees the other one's end first."""

    TARGET: ClassVar[Target] = "vmm"
    FATAL: ClassVar[bool] = True
    DISTURBS: ClassVar[bool] = False
    PROOF: ClassVar[str] = "both were reaped, ended by SIGKILL; how long it took to signal them is told"
    NAMES: ClassVar[Mapping[str, Target]] = {"other": "vmm"}

    other: str
    _took: int = field(init=False, default=0)

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return (target, self.other)

    def apply(self, ctx: FaultContext, target: str) -> None:
        first, second = ctx.vmms[target].pidfd, ctx.vmms[self.other].pidfd
        began = time.monotonic_ns()
        pidfd_send_signal(first, Signals.SIGKILL)
        pidfd_send_signal(second, Signals.SIGKILL)
        self._took = time.monotonic_ns() - began

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        each = [ended(ctx.vmms[name], Signals.SIGKILL) for name in (target, self.other)]
        told = "; ".join(one.detail for one in each)
        return Evidence(all(one.struck for one in each), f"{told}; signalled within {self._took / 1000:.0f} µs")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "nothing to undo"


@dataclass(kw_only=True, slots=True)
class Stop(Fault):
    """Stop the process with SIGSTOP: every thread where it next leaves the kernel, a vCPU out of its guest. It goes on
    (SIGCONT) when this is undone."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "the process's first thread is in state T, and every other too unless it waits in the kernel"

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        pidfd_send_signal(ctx.vmms[target].pidfd, SIGSTOP)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        victim = ctx.vmms[target]
        if victim.status is not None:
            return Evidence(False, f"{target} has ended")
        stopped = ctx.wait(lambda: _stopped(victim.pid), STOPPED_WITHIN, f"{target} to stop")
        return Evidence(stopped, f"threads of {target} by state: {_listed(states(victim.pid))}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        victim = ctx.vmms[target]
        if victim.status is not None:
            return "the process has ended"
        with contextlib.suppress(ProcessLookupError):  # it may be ending just now
            pidfd_send_signal(victim.pidfd, SIGCONT)
        gone_on = ctx.wait(lambda: "T" not in states(victim.pid), STOPPED_WITHIN, f"{target} to go on")
        return "the process runs again" if gone_on else "the process is still stopped"


@dataclass(kw_only=True, slots=True)
class LoseFd(Fault):
    """Close a descriptor behind the VMM's back: the VM's own, that of a vCPU, or the process's /dev/sev. Who uses it
    then is answered EBADF; what a call under way holds, it keeps. There is no way back."""

    TARGET: ClassVar[Target] = "vm"
    PROOF: ClassVar[str] = "in the process the descriptor's number leads to nothing any more"

    fd: Literal["vm", "vcpu", "sev"] = "vm"
    vcpu: int = 0

    @property
    def _name(self) -> str:
        return f"vcpu {self.vcpu}" if self.fd == "vcpu" else self.fd

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.vms.lose_fd(target, self._name)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        told = ctx.vms.vmm_of(target).ask(Inside(vm=target, fd=self._name))
        if told is None:
            return Evidence(False, "its process has ended")
        return Evidence(bool(told["lost"]), f"{self._name} of {target} {'is lost' if told['lost'] else 'is open'}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "nothing to undo: the descriptor is closed"


@dataclass(kw_only=True, slots=True)
class ThreadExit(Fault):
    """Let a thread end while its process lives: those that drive the VM's vCPUs, or the VMM's first one, which leaves
    a process whose leader is a zombie. (A thread that is inside a system call cannot end by itself.)"""

    TARGET: ClassVar[Target] = "vm"
    PROOF: ClassVar[str] = (
        "the vCPUs' threads are gone from the process, or its first one is in state Z, and others live"
    )

    thread: Literal["vcpu", "first"] = "vcpu"

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.vms.vmm_of(target).ask(EndThread(vm=target if self.thread == "vcpu" else ""))

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        victim = ctx.vms.vmm_of(target)
        told = victim.ask(Inside(vm=target))
        threads = told["threads"] if told is not None else []
        assert isinstance(threads, list)
        if told is None or (self.thread == "vcpu" and not threads):
            return Evidence(False, f"{victim.name} has {'ended' if told is None else 'no thread that drives a vCPU'}")

        def gone() -> bool:
            if self.thread == "first":
                return state(victim.pid, victim.pid) == "Z"
            return not any(state(victim.pid, int(tid)) for tid in threads)

        ended = ctx.wait(gone, STOPPED_WITHIN, f"a thread of {victim.name} to end")
        which = "its first thread" if self.thread == "first" else f"threads {', '.join(map(str, threads))}"
        told_of = f"of {victim.name}, {which} {'ended' if ended else 'did not end'}"
        return Evidence(ended, f"{told_of}; the others by state: {_listed(states(victim.pid))}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return "nothing to undo: the thread has ended"


@dataclass(kw_only=True, slots=True)
class Oom(Fault):
    """Let the VMM run out of memory: its cgroup gets a `memory.max` of `mebibytes` more than it uses, and it uses twice
    as much. The kernel kills it, wherever it is. The limit goes when this is undone, the controller, where it had to be
    enabled, when the run is over."""

    TARGET: ClassVar[Target] = "vmm"
    DISTURBS: ClassVar[bool] = False
    NEEDS: ClassVar[str] = "the memory controller, no process in any cgroup above the VMM's"
    PROOF: ClassVar[str] = "memory.events of its cgroup counts one more oom_kill, and it was reaped, ended by SIGKILL"

    mebibytes: int = 16
    _group: Cgroup | None = field(init=False, default=None)
    _before: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not 1 <= self.mebibytes <= 1024:
            raise ValueError(f"mebibytes is 1 to 1024, not {self.mebibytes}")

    def require(self, ctx: FaultContext, target: str) -> None:
        require_controller(ctx, "memory")

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._group = ctx.cgroups[ctx.cgroups.home(ctx.vmms[target])]
        ctx.enable_controller(ctx.cgroups.home(ctx.vmms[target]), "memory")
        self._before = self._group.memory_events("oom_kill")
        self._group.limit_memory(self.mebibytes << 20)
        ctx.vmms[target].ask(Eat(mebibytes=2 * self.mebibytes))

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        end = ended(ctx.vmms[target], Signals.SIGKILL)
        kills = self._group.memory_events("oom_kill") - self._before if self._group is not None else 0
        return Evidence(bool(end.struck) and kills > 0, f"oom_kill of its cgroup: {kills} more; {end.detail}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._group is None:
            return "there was no limit"
        if self._group.exists and self._group.has("memory"):
            self._group.limit_memory(None)
        return "the limit is gone"


def require_controller(ctx: FaultContext, controller: str) -> None:
    """Raises `Unsupported`."""
    here = ctx.cgroups["."].path
    above = [Cgroup.at(path) for path in (here, *here.parents) if (path / "cgroup.controllers").exists()]
    if not any(group.has(controller) for group in above):
        raise Unsupported(f"the hierarchy has no {controller} controller", remedy="enable it, or use the lab")
    if ctx.shared and not Cgroup.at(here.parent).has(controller):
        raise Unsupported(
            f"the {controller} controller would have to be enabled for the cgroups of others, who share this host",
            remedy=f"enable it in {above[-1].path}/cgroup.subtree_control, or use a host of its own",
        )


def ended(victim: Victim, number: Signals) -> Evidence:
    """Whether it was this signal that ended the process."""
    if not victim.wait_end(GONE_WITHIN):
        return Evidence(False, f"{victim.name} was still there after {GONE_WITHIN:g} s")
    if victim.status != -number:
        return Evidence(False, f"{victim.name} ended with status {victim.status}, not by {number.name}")
    return Evidence(True, f"{victim.name} was ended by {number.name}")


def states(pid: int) -> Counter[str]:
    """How many threads of the process are in each state; nothing if it is gone."""
    found: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[parse_state(task.read_text())] += 1
    return found


def state(pid: int, tid: int) -> str:
    """The state of one thread, "" if it is gone."""
    try:
        return parse_state(Path(f"/proc/{pid}/task/{tid}/stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stopped(pid: int) -> bool:
    """A thread that sleeps where no signal but a fatal one reaches it (D) stops when it leaves the kernel."""
    found = states(pid)
    return found["T"] > 0 and set(found) <= {"T", "D"}


def _listed(found: Counter[str]) -> str:
    return ", ".join(f"{number} {state}" for state, number in sorted(found.items())) or "none"
