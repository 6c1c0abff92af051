# SPDX-License-Identifier: Apache-2.0
"""What is known of a VMM that was killed: its guest's last tick and the answers of its storm. On a real KVM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.history import records
from chaos.history.records import Exited, Record, Stormed
from chaos.linux.loop import Loop
from chaos.linux.seqpacket import memory_file
from chaos.native import read, read_vcpu
from chaos.runner.guests import Guest, Guests
from chaos.runner.operations import OperationLog
from chaos.runner.recorder import Recorder
from chaos.runner.script.storms import StormMemory, begin
from chaos.runner.vmms import VmmProcess, VmmProcesses
from chaos.vmm import guest
from chaos.vmm import messages as m
from chaos.vmm.server import ForkServer
from chaos.vmm.storm import CALLS
from tests.unit.host.test_processes import Outside, cgroup

SECONDS = 20.0
VM = "old"


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def vmms(outside: Outside) -> Iterator[VmmProcesses]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no KVM here")
    server = ForkServer()
    made = VmmProcesses(server, Loop(), OperationLog(Recorder(outside.writer)))
    yield made
    made.close()
    server.close()


@pytest.fixture
def vmm(vmms: VmmProcesses) -> VmmProcess:
    """A VMM with a plain VM of two vCPUs, whose guest's program is in its memory."""
    vmm = vmms.spawn("source", cgroup())
    with memory_file("guest", guest.MEMORY) as memory:
        os.pwrite(memory.number, guest.image(2), 0)
        done = vmms.do(vmm, m.Create(vm=VM, kind="plain", vcpus=2, memory="guest"), fds=(memory.number,))
    assert done.outcome == "ok", done
    return vmm


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def killed(vmm: VmmProcess, outside: Outside) -> tuple[list[Record], int]:
    """What is recorded of its end, and when that was, at the latest."""
    outside.records()
    os.kill(vmm.pid, signal.SIGKILL)
    assert vmm.wait_end(SECONDS)
    return outside.records(), time.monotonic_ns()


def test_the_last_tick_of_every_vcpu(vmms: VmmProcesses, vmm: VmmProcess, outside: Outside) -> None:
    began = time.monotonic_ns()
    boards = vmm.watch(VM, 2)
    assert vmms.do(vmm, m.RunVcpus(vm=VM, every=1), fds=boards).outcome == "ok"
    until(lambda: all(read_vcpu(board).exits > 10 for board in boards))
    (exited,), ended = killed(vmm, outside)
    assert isinstance(exited, Exited)
    assert all(began < tick < ended for tick in exited.last_ticks[VM]) and len(exited.last_ticks[VM]) == 2
    assert not vmm.boards


def test_nothing_is_said_of_a_guest_that_had_left(vmms: VmmProcesses, vmm: VmmProcess, outside: Outside) -> None:
    assert vmms.do(vmm, m.RunVcpus(vm=VM, every=1), fds=vmm.watch(VM, 2)).outcome == "ok"
    paused = vmms.do(vmm, m.Pause(vm=VM))
    vmm.unwatch(VM)
    assert isinstance(paused.value["last_ticks"], list) and len(paused.value["last_ticks"]) == 2
    (exited,), _ = killed(vmm, outside)
    assert isinstance(exited, Exited) and exited.last_ticks == {}


def begun(vmms: VmmProcesses, vmm: VmmProcess, outside: Outside, calls: tuple[str, ...], threads: int) -> StormMemory:
    nothing: Any = None
    guests = Guests(nothing, vmms, nothing, executes_es=False)
    return begin(guests, OperationLog(Recorder(outside.writer)), Guest(VM, nothing, vmm), calls, threads)


def test_what_its_storm_was_answered(vmms: VmmProcesses, vmm: VmmProcess, outside: Outside) -> None:
    storm = begun(vmms, vmm, outside, ("KVM_GET_REGS", "KVM_RUN"), 3)
    until(lambda: all(thread.calls > 100 for thread in read(storm.memory.number)))
    (exited, stormed), ended = killed(vmm, outside)
    assert isinstance(exited, Exited) and isinstance(stormed, Stormed)
    assert (stormed.agent, stormed.vm, len(stormed.threads)) == ("source", VM, 3)
    for thread in stormed.threads:
        assert thread.ended == 0 and thread.refused is None and not thread.lost
        assert thread.answered is not None and thread.answered.ended < ended
    assert not vmm.at_end


def test_a_vmm_that_ends_in_good_order_ends_its_storm(vmms: VmmProcesses, vmm: VmmProcess, outside: Outside) -> None:
    begun(vmms, vmm, outside, ("KVM_GET_CLOCK",), 2)
    outside.records()
    vmms.end(vmm)
    stormed = outside.records()[-1]
    assert isinstance(stormed, Stormed)
    assert all(thread.ended and thread.calls for thread in stormed.threads)


def test_every_call_of_a_storm_is_in_the_page_on_experiments() -> None:
    page = (Path(records.__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert [name for name in CALLS if name not in page] == []
