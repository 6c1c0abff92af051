# SPDX-License-Identifier: Apache-2.0
"""Faults of CPUs, against files that are none of the kernel's, and against this machine's scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chaos.errors import Unsupported
from faults import cpu
from faults.cpu import CpuOffline, Pin


@dataclass
class Victim:
    pid: int
    status: int | None = None


@dataclass
class Context:
    """`owed` is what the warden would write, `counted` are the CPUs whose entries into guests are counted."""

    victim: Victim = field(default_factory=lambda: Victim(os.getpid()))
    owed: list[tuple[Path, str]] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)

    def count_entries(self, cpu: int) -> None:
        self.counted.append(cpu)

    @property
    def vmms(self) -> dict[str, Victim]:
        return {"source": self.victim}

    @property
    def host(self) -> Context:
        return self

    def remember(self, path: Path, text: str) -> None:
        self.owed.append((path, text))

    def forget(self, path: Path, text: str) -> None:
        self.owed.remove((path, text))


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpu, "CPUS", tmp_path)
    (tmp_path / "cpu1").mkdir()
    (tmp_path / "online").write_text("0-1\n")
    found = tmp_path / "cpu1" / "online"
    found.write_text("1\n")
    return found


def test_a_cpu_is_taken_and_given_back(switch: Path) -> None:
    ctx, fault = Context(), CpuOffline()
    fault.require(ctx, "")  # type: ignore[arg-type]
    assert fault.evidence(ctx, "").struck is False  # type: ignore[arg-type]
    fault.apply(ctx, "")  # type: ignore[arg-type]
    assert ctx.counted == [1], "from when it is away"
    assert switch.read_text() == "0" and fault.evidence(ctx, "").struck  # type: ignore[arg-type]
    assert ctx.owed == [(switch, "1")], "should the runner be killed now"
    assert fault.undo(ctx, "") == "CPU 1 is online"  # type: ignore[arg-type]
    assert switch.read_text() == "1" and not ctx.owed


def test_a_cpu_that_was_offline_before_is_neither_taken_nor_brought_online(switch: Path) -> None:
    switch.write_text("0\n")
    ctx, fault = Context(), CpuOffline()
    with pytest.raises(Unsupported, match="offline already"):
        fault.require(ctx, "")  # type: ignore[arg-type]
    fault.apply(ctx, "")  # type: ignore[arg-type]
    assert fault.evidence(ctx, "").struck is False  # type: ignore[arg-type]
    assert fault.undo(ctx, "") == "CPU 1 was not taken" and not ctx.owed  # type: ignore[arg-type]
    assert switch.read_text() == "0"


def test_a_process_that_ended_is_not_looked_for_by_its_number() -> None:
    """It may be another one's by now, and the VMM of that name another process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before, victim = os.sched_getaffinity(child.pid), Victim(child.pid)
        ctx, fault = Context(victim), Pin(cpu=min(before))
        fault.apply(ctx, "source")  # type: ignore[arg-type]
        assert fault.evidence(ctx, "source").struck and os.sched_getaffinity(child.pid) == {min(before)}  # type: ignore[arg-type]
        victim.status, ctx.victim = -9, Victim(os.getpid())
        assert fault.undo(ctx, "source") == "source has ended"  # type: ignore[arg-type]
        assert os.sched_getaffinity(child.pid) == {min(before)}
        victim.status = None
        assert "threads may run where" in fault.undo(ctx, "source")  # type: ignore[arg-type]
        assert os.sched_getaffinity(child.pid) == before
