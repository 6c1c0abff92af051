# SPDX-License-Identifier: Apache-2.0
"""The storm of signals, against a process that handles none and lives for as long as it is said to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.vmm.harm import STORM_SIGNAL
from faults.signal import SignalStorm

SECONDS = 20.0


@dataclass
class Victim:
    pid: int
    status: int | None = None
    busy: tuple[int, ...] = ()
    says: dict[str, int] = field(default_factory=lambda: {"handled": 0})

    def ask(self, question: object) -> dict[str, int]:
        return self.says


def ctx(victim: Victim) -> Any:
    return SimpleNamespace(vmms={"source": victim}, wait=lambda happened, within, what: happened())


@pytest.mark.parametrize(("status", "ends"), [(None, -STORM_SIGNAL), (0, 0)])
def test_a_number_that_was_a_dead_victims_gets_no_signal(status: int | None, ends: int) -> None:
    """Another process may have it by now. The one here would be ended by the signal."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        storm = SignalStorm(signals=1)
        storm.apply(ctx(Victim(child.pid, status)), "source")
        assert storm._thread is not None
        storm._thread.join(SECONDS)
        assert not storm._thread.is_alive()
        child.communicate(b"\n", timeout=SECONDS)
        assert child.returncode == ends


WITH_A_VCPU = f"""
import ctypes, signal, threading
signal.signal({int(STORM_SIGNAL)}, lambda number, frame: None)
def drive():
    ctypes.CDLL(None).prctl(15, b"vcpu 0")
    print(threading.get_native_id(), flush=True)
    threading.Event().wait()
threading.Thread(target=drive, daemon=True).start()
input()
"""


def at_a_vcpu(storm: SignalStorm, **says: int) -> tuple[Any, set[int], int]:
    """A storm against a process with a thread that is called as a vCPU's is: its evidence, the threads that it sent to,
    and that thread. `says` is what the process tells of what has happened to it."""
    with subprocess.Popen(
        [sys.executable, "-c", WITH_A_VCPU], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        vcpu = int(child.stdout.readline())
        run = ctx(Victim(child.pid, says={"handled": storm.signals, **says}))
        storm.apply(run, "source")
        assert storm.evidence(run, "source").struck is None
        assert storm._thread is not None
        storm._thread.join(SECONDS)
        evidence = storm.evidence(run, "source")
        assert child.poll() is None  # which it survived
        child.kill()
    return evidence, {tid for tid, sent in storm._sent.items() if sent}, vcpu


@pytest.mark.parametrize(
    ("first_run", "interrupted", "early", "struck"),
    [(False, 3, 0, True), (False, 0, 0, False), (True, 3, 0, False), (True, 3, 1, True)],
)
def test_a_storm_at_vcpus_meets_them_alone(first_run: bool, interrupted: int, early: int, struck: bool) -> None:
    """Whether it met one is the VMM's word: that a signal was sent to the thread does not say where that was."""
    storm = SignalStorm(signals=100, thread="vcpu", first_run=first_run)
    evidence, met, vcpu = at_a_vcpu(storm, interrupted=interrupted, early=early)
    assert evidence.struck is struck and met == {vcpu}
    assert f"KVM_RUN interrupted {interrupted} times, {early} in the first run" in evidence.detail


def test_a_storm_at_anything_meets_vcpus_too() -> None:
    _, met, vcpu = at_a_vcpu(SignalStorm(signals=1000))
    assert met > {vcpu}


def test_a_first_run_is_a_vcpus() -> None:
    with pytest.raises(ValueError, match="give thread: vcpu"):
        SignalStorm(first_run=True)
