# SPDX-License-Identifier: Apache-2.0
"""Signals that are not fatal: a storm of them at whatever the VMM does. Fatal ones are `faults.vmm.Kill`."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from chaos.fault import Evidence, Fault, FaultContext, Target, Victim
from chaos.linux.loop import LOOK_AGAIN
from chaos.vmm.harm import STORM_SIGNAL
from chaos.vmm.messages import Handled

MICROSECOND = 1e-6
# Looking which threads there are takes as long as sending some dozens, so that is not done for each one.
BURST = 64
ALL_IN_WITHIN = 5.0
STRIKES_WITHIN = 5.0
VCPU = "vcpu "
"""How the names of the native threads begin that drive vCPUs (chaos/native/crew.c)."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.tgkill.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
_libc.tgkill.restype = ctypes.c_int


@dataclass(kw_only=True, slots=True)
class SignalStorm(Fault):
    """Send a signal that is handled, and does nothing, to every thread of the VMM, also to those in the kernel, again
    and again: one each with a pause of `microseconds`, or without one 64 each; `signals` in all. With `thread: vcpu` to
    those alone that drive vCPUs, as soon as there are any; with `first_run` it must meet one in its first KVM_RUN. It
    ends by itself, or when this is undone."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = (
        "how many were sent, to a thread with an operation under way too, and how many were handled; at vCPUs, how"
        " often KVM_RUN came back with EINTR for one, and how often before the guest had left by itself"
    )

    signals: int = 20_000
    microseconds: int = 0
    thread: Literal["any", "vcpu"] = "any"
    first_run: bool = False
    _sent: Counter[int] = field(init=False, default_factory=Counter)
    _moving: set[int] = field(init=False, default_factory=set)
    _handled: int = field(init=False, default=0)
    _interrupted: int = field(init=False, default=0)
    _early: int = field(init=False, default=0)
    _asked: bool = field(init=False, default=False)
    _enough: threading.Event = field(init=False, default_factory=threading.Event)
    _thread: threading.Thread | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not 1 <= self.signals <= 1_000_000 or not 0 <= self.microseconds <= 1_000_000:
            raise ValueError("signals is 1 to 1000000, microseconds 0 to 1000000")
        if self.first_run and self.thread != "vcpu":
            raise ValueError("first_run is of vCPUs: give thread: vcpu")

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        return ()

    def apply(self, ctx: FaultContext, target: str) -> None:
        ctx.vmms[target].ask(Handled())  # from now on they are
        self._thread = threading.Thread(target=self._send, args=(ctx.vmms[target],), name="storm", daemon=True)
        self._thread.start()

    def _send(self, victim: Victim) -> None:
        listening: dict[int, bool] = {}
        while self._sent.total() < self.signals and not self._enough.is_set() and victim.status is None:
            heard = False  # none may listen for a moment, while the VMM begins an operation
            for tid in self._aimed_at(victim.pid):
                self._moving |= {*victim.busy}
                if not listening.get(tid):  # one that has just begun may not listen yet
                    listening[tid] = _listens(victim.pid, tid)
                if listening[tid]:
                    heard = True
                    self._sent[tid] += self._burst(victim, tid)
            self._enough.wait(self.microseconds * MICROSECOND if heard else LOOK_AGAIN)

    def _aimed_at(self, pid: int) -> Iterator[int]:
        return (tid for tid in _threads(pid) if self.thread == "any" or _name(pid, tid).startswith(VCPU))

    def _burst(self, victim: Victim, tid: int) -> int:
        """How many were sent. Fewer than meant where the thread is gone, or has as many to come as the kernel keeps
        for it (RLIMIT_SIGPENDING, EAGAIN)."""
        meant = min(1 if self.microseconds else BURST, self.signals - self._sent.total())
        for number in range(meant):
            # A dead one's numbers may be somebody else's by now.
            if victim.status is not None or _libc.tgkill(victim.pid, tid, STORM_SIGNAL) != 0:
                return number
        return meant

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """Not before it is to be over, when this is asked a second time."""
        first, self._asked = not self._asked, True
        if first or self._thread is None:
            return Evidence(None, "no signal was sent" if self._thread is None else "signals are being sent")
        if self.thread == "vcpu":  # which may have begun just now
            ctx.wait(lambda: self._hear(ctx, target) and self._met, STRIKES_WITHIN, f"a vCPU of {target} to be met")
        self._stop()
        ctx.wait(
            lambda: not self._hear(ctx, target) or self._handled >= self._sent.total(), ALL_IN_WITHIN,
            f"{target} to have handled all",
        )  # fmt: skip
        return Evidence(self._met, f"{self._told()}; {self._handled} handled")

    def _hear(self, ctx: FaultContext, target: str) -> bool:
        """Ask how many were handled, and what they did; False if nobody is there to answer. Those that wait for a
        thread in the kernel are handled when it comes out."""
        told = ctx.vmms[target].ask(Handled())
        if told is None:
            return False
        handled, interrupted, early = (told.get(each, 0) for each in ("handled", "interrupted", "early"))
        assert isinstance(handled, int) and isinstance(interrupted, int) and isinstance(early, int)
        self._handled += handled
        self._interrupted, self._early = interrupted, early
        return True

    @property
    def _met(self) -> bool:
        """Whether what was aimed at was hit."""
        if self.thread == "vcpu":
            return (self._early if self.first_run else self._interrupted) > 0
        return self._to_moving > 0 and self._handled > 0

    @property
    def _to_moving(self) -> int:
        return sum(self._sent[tid] for tid in self._moving)

    def _told(self) -> str:
        sent = f"{self._sent.total()} sent to {len(self._sent)} threads"
        if self.thread == "vcpu":
            return f"{sent} of vCPUs, KVM_RUN interrupted {self._interrupted} times, {self._early} in the first run"
        return f"{sent}, {self._to_moving} to one with an operation under way"

    def undo(self, ctx: FaultContext, target: str) -> str:
        self._stop()
        return "no more are sent"

    def _stop(self) -> None:
        self._enough.set()
        if self._thread is not None:
            self._thread.join()


def _threads(pid: int) -> list[int]:
    try:
        return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _name(pid: int, tid: int) -> str:
    """What the thread is called, "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _listens(pid: int, tid: int) -> bool:
    """Whether the thread lets the signal in."""
    try:
        status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return not int(blocked, 16) >> (STORM_SIGNAL - 1) & 1
