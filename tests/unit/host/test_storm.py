# SPDX-License-Identifier: Apache-2.0
"""Storms on a real KVM, where there is one: without SEV, and so without a death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import get_args

import pytest

from chaos.errors import InternalError
from chaos.experiment.steps import StormCall
from chaos.history.records import Stormed
from chaos.kinds import Kind
from chaos.kvm.system import System
from chaos.linux.seqpacket import memory_file
from chaos.native import read
from chaos.runner.script.storms import StormMemory
from chaos.vmm import guest, storm
from chaos.vmm.ask import ask
from chaos.vmm.machine import Machine, OpenDevices

SECONDS = 20.0
NAMES = ("KVM_RUN", *sorted(storm.CALLS - {"KVM_RUN", storm.OF_THE_FIRMWARE}))


@pytest.fixture
def machine() -> Iterator[Machine]:
    try:
        system = System.open()
    except OSError as error:
        pytest.skip(f"no KVM here: {error}")
    with memory_file("guest", guest.MEMORY) as memory:
        made = Machine.create(OpenDevices(system), Kind.PLAIN, 2, memory.number)
    made.memory.write(0, guest.image(guest.LANES))
    yield made
    made.close()
    system.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def state(machine: Machine) -> list[bytes]:
    return [bytes(vcpu.regs()) + bytes(vcpu.sregs()) + bytes(vcpu.events()) for vcpu in machine.vcpus]


def raged(machine: Machine, threads: int = 5, calls: tuple[str, ...] = NAMES) -> Stormed:
    """A storm in which every thread made each of its calls some times, and what is told of it."""
    told = StormMemory.prepare("vm", calls, threads)
    storm.begin(machine, threads, calls, told.memory.number)
    until(lambda: all(thread.calls > 3 * len(calls) for thread in read(told.memory.number)))
    storm.end(machine)
    return told.over(t=1, agent="source", step=2)


def test_what_a_script_may_name_is_what_there_is() -> None:
    assert set(get_args(StormCall)) == storm.CALLS


def test_a_live_vm_answers_every_thread_and_is_not_changed(machine: Machine) -> None:
    before = state(machine)
    stormed = raged(machine)
    assert state(machine) == before
    assert len(stormed.threads) == 5
    for thread in stormed.threads:
        assert thread.refused is None and not thread.lost
        assert thread.answered is not None and thread.answered.ended <= thread.ended
        assert sum(thread.errnos.values()) == thread.calls
        assert {"ok", "EINTR", "ENXIO", "EINVAL"} >= set(thread.errnos) >= {"ok", "EINTR", "ENXIO"}


@pytest.mark.parametrize("name", NAMES)
def test_each_call_alone_is_answered_as_it_should(machine: Machine, name: str) -> None:
    (thread,) = raged(machine, 1, (name,)).threads
    expected = {"KVM_RUN": "EINTR", "KVM_INTERRUPT": "ENXIO", "KVM_SET_USER_MEMORY_REGION": "EINVAL"}.get(name, "ok")
    assert set(thread.errnos) == {expected}
    assert thread.answered is not None and thread.answered.ioctl == name


def test_after_a_storm_the_guest_runs_and_during_one_it_is_asked_without_being_entered(machine: Machine) -> None:
    with storm.memory_of(2) as memory:
        storm.begin(machine, 2, ("KVM_RUN",), memory.number)
        answers = ask(machine.host.system, machine.vm, machine.vcpus)
        assert [answer for answer in answers if answer.errno != answer.control] == []
        first = [thread.calls for thread in read(memory.number)]
        until(lambda: all(t.calls > n for t, n in zip(read(memory.number), first, strict=True)))
        storm.end(machine)
        assert all(set(thread.errnos) == {4} for thread in read(memory.number))  # EINTR: nobody entered the guest
    machine.runnable.resume(1)
    until(lambda: machine.sample().ticks > 10)
    assert machine.sample().stale == 0


def test_readers_do_not_disturb_a_guest_that_runs(machine: Machine) -> None:
    machine.runnable.resume(1)
    raged(machine, 3, ("KVM_GET_REGS", "KVM_GET_CLOCK"))
    before = machine.sample().ticks
    until(lambda: machine.sample().ticks > before + 100)
    assert machine.sample().stale == 0 and not machine.sample().ended


def test_there_is_one_storm_at_a_time_and_closing_ends_it(machine: Machine) -> None:
    with storm.memory_of(1) as memory, storm.memory_of(1) as another:
        storm.begin(machine, 1, ("KVM_GET_REGS",), memory.number)
        with pytest.raises(InternalError, match="a storm on this VM already"):
            storm.begin(machine, 1, ("KVM_GET_REGS",), another.number)
        machine.close()
        (thread,) = read(memory.number)
        assert thread.ended
        storm.end(machine)  # as often as one likes


def test_of_a_process_that_was_killed_the_file_tells(machine: Machine) -> None:
    told = StormMemory.prepare("vm", ("KVM_GET_CLOCK",), 2)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException), memory_file("guest", guest.MEMORY) as memory:
            own = Machine.create(OpenDevices(System.open()), Kind.PLAIN, 1, memory.number)
            storm.begin(own, 2, told.calls, told.memory.number)
            signal.pause()
        os._exit(1)
    until(lambda: sum(thread.calls > 100 for thread in read(told.memory.number)) == 2)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    stormed = told.over(t=1, agent="source", step=2)
    for thread in stormed.threads:
        assert thread.calls > 100 and thread.ended == 0 and not thread.lost
        assert thread.answered is not None and thread.answered.errno == 0


def test_of_a_storm_that_never_began_nothing_is_told() -> None:
    assert StormMemory.prepare("vm", ("KVM_RUN",), 8).over(t=1, agent="source", step=2).threads == ()
