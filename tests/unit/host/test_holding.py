# SPDX-License-Identifier: Apache-2.0
"""A hold that is not reached says where the operation was instead."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.experiment import steps as s
from chaos.history.records import Done, Held
from chaos.linux.loop import Loop
from chaos.runner.holds.failpoints import RunFailpoints
from chaos.runner.script import holds
from chaos.runner.vmms import PendingOperation, StepFailed


def executor(pending: PendingOperation) -> tuple[Any, list[Held]]:
    written: list[Held] = []
    vmm = SimpleNamespace(pid=os.getpid())
    found = SimpleNamespace(
        guests={"new": SimpleNamespace(vmm=vmm)},
        loop=Loop(),
        armed={},
        step=7,
        now=lambda: 1,
        write=written.append,
        under_way=lambda vm: pending,
    )
    return found, written


def test_at_its_deadline_it_says_what_the_thread_does() -> None:
    stop, began = threading.Event(), threading.Event()

    def body() -> None:
        began.set()
        stop.wait()

    thread = threading.Thread(target=body)
    thread.start()
    assert began.wait(10) and thread.native_id is not None
    found, written = executor(PendingOperation(3, "move", True, "destination", os.getpid(), tid=thread.native_id))
    try:
        with pytest.raises(StepFailed, match=r"move of new to be stopped at vcpu-running.*state S, system call 202"):
            holds.hold(found, s.HoldStep(vm="new", within=0.2))
    finally:
        stop.set()
        thread.join()
    (held,) = written
    assert (held.reached, held.place, held.state, held.call) == (False, "vcpu", "S", "system call 202")


def test_one_that_ended_says_how() -> None:
    pending = PendingOperation(3, "move", True, "destination", os.getpid())
    pending.done = Done(t=0, op=3, outcome="fail", errno=16, value={"call": "KVM_ENABLE_CAP"})
    found, written = executor(pending)
    with pytest.raises(StepFailed, match="ended before it was stopped at vm-locked: KVM_ENABLE_CAP: EBUSY"):
        holds.hold(found, s.HoldStep(vm="new", at="vm-locked"))
    assert [held.reached for held in written] == [False]


def test_while_the_driver_is_held_the_firmware_is_not_asked() -> None:
    slot = SimpleNamespace(function=holds.DRIVER_LOCKED)
    kfault = SimpleNamespace(hold=lambda function, nth, pid: slot, clear=lambda slot: 0)
    outside: Any = None
    firmware = RunFailpoints(outside, 0, None)
    found, written = executor(PendingOperation(3, "move", True, "destination"))
    found.ctx = SimpleNamespace(kfault=lambda: kfault, firmware=firmware)
    found.undo = ExitStack()
    assert not firmware.may_stall
    holds.arm(found, s.ArmStep(hold="driver", kernel=s.KernelPlace(function=holds.DRIVER_LOCKED)))
    assert firmware.may_stall
    found.undo.close()
    assert not firmware.may_stall and len(written) == 1, "what was armed is released at the end, and recorded"


def test_what_is_armed_no_more_holds_nothing() -> None:
    found, written = executor(PendingOperation(3, "move", True, "destination"))
    with pytest.raises(StepFailed, match="commit is not armed"):
        holds.hold(found, s.HoldStep(vm="new", at="commit"))
    assert not written
