# SPDX-License-Identifier: Apache-2.0
"""The guest on a real KVM, where there is one. Without SEV: what does not depend on it, which is most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from errno import EBADF, EFAULT, EINVAL, EIO, ENODEV
from pathlib import Path
from typing import cast, get_args

import pytest

from chaos.experiment.steps import ForeignFd
from chaos.history.questions import ANYBODY, DEVICE, THE_DEAD, VCPU, VM
from chaos.kinds import Kind
from chaos.kvm import sev
from chaos.kvm.call import KernelError, timed
from chaos.kvm.structs import Lapic, from_bytes
from chaos.kvm.system import API_VERSION, System
from chaos.linux.seqpacket import memory_file
from chaos.native import VcpuThread, read_vcpu
from chaos.vmm import foreign_fds, guest, harm, state, vcpus
from chaos.vmm.ask import DEVICE_QUESTIONS, QUESTIONS_OF_THE_DEAD, VCPU_QUESTIONS, VM_QUESTIONS, AskedIoctl, ask
from chaos.vmm.machine import Machine, OpenDevices
from faults import signal as signals
from tests.unit.host.peers import join, together

SECONDS = 20.0
ENOTTY = 25
NO_DEVICE = 1 << 29

Make = Callable[..., Machine]


@pytest.fixture
def host() -> Iterator[OpenDevices]:
    try:
        system = System.open()
    except OSError as error:
        pytest.skip(f"no KVM here: {error}")
    yield OpenDevices(system)
    system.close()


@pytest.fixture
def make(host: OpenDevices) -> Iterator[Make]:
    """Makes plain VMs that share one memory, with the program in it."""
    memory = memory_file("guest", guest.MEMORY)
    made: list[Machine] = []

    def create(vcpus: int = 1) -> Machine:
        machine = Machine.create(host, Kind.PLAIN, vcpus, memory.number, device=True)
        if not made:
            machine.memory.write(0, guest.image(guest.LANES))
        made.append(machine)
        return machine

    yield create
    for machine in made:
        machine.close()
    memory.close()


def counted(machine: Machine, ticks: int) -> int:
    """Wait until the guest has counted so many further; its counter."""
    deadline = time.monotonic() + SECONDS
    first = latest = machine.sample()
    while latest.ticks - first.ticks < ticks:
        assert time.monotonic() < deadline and not latest.ended, latest
        latest = machine.sample()
    assert latest.stale == 0
    return latest.ticks


def test_the_interface_is_the_one_we_know(host: OpenDevices) -> None:
    assert host.system.api_version() == API_VERSION


@pytest.mark.parametrize("every", [1, 64, 0])
def test_the_guest_counts_and_can_be_stopped_at_any_time(make: Make, every: int) -> None:
    machine = make()
    driver = machine.runnable
    last = 0
    for _ in range(5):
        driver.resume(every)
        assert driver.running
        assert counted(machine, 100) > last
        began = time.monotonic()
        driver.pause()
        assert time.monotonic() - began < vcpus.PAUSE_WITHIN / 2
        last = vcpus.ticks_of(machine.vcpus[0].regs())
        assert machine.sample().ticks == last and not driver.running
        driver.pause()  # as often as one likes


def test_every_vcpu_counts_on_a_page_of_its_own(make: Make) -> None:
    machine = make(4)
    machine.runnable.resume(1)
    deadline = time.monotonic() + SECONDS
    while min((sampled := machine.sample()).each) < 200:
        assert time.monotonic() < deadline and not sampled.ended
    machine.runnable.pause()
    sampled = machine.sample()
    assert sampled.stale == 0 and sampled.ticks == min(sampled.each)
    for number, ticks in enumerate(sampled.each):
        page = machine.memory.read(guest.LANES_AT + number * guest.LANE, guest.LANE)
        assert page in (guest.pattern(ticks), guest.pattern(ticks - 1))  # stopped before or after it wrote


def test_a_page_that_was_lost_is_noticed_by_the_vcpu_whose_it_is(make: Make) -> None:
    machine = make(2)
    machine.runnable.resume(1)
    counted(machine, 100)
    machine.runnable.pause()
    machine.memory.write(guest.LANES_AT + guest.LANE, guest.pattern(0))
    machine.runnable.resume(1)
    deadline = time.monotonic() + SECONDS
    while not machine.sample().stale:
        assert time.monotonic() < deadline


def test_the_counter_goes_on_when_its_low_half_wraps(make: Make) -> None:
    machine = make()
    near = (1 << 32) - 200
    registers = machine.vcpus[0].regs()
    registers.rbx = near
    machine.vcpus[0].set_regs(registers)
    machine.memory.write(guest.LANES_AT, guest.pattern(near))
    machine.runnable.resume(4)
    assert counted(machine, 400) > 1 << 32
    machine.runnable.pause()
    assert machine.sample().ticks > 1 << 32


def test_the_first_and_the_last_tick_of_a_stay_are_told_and_can_be_read_elsewhere(make: Make) -> None:
    machine = make(2)
    began = time.monotonic_ns()
    for _ in range(2):
        with VcpuThread.memory() as one, VcpuThread.memory() as other:
            machine.runnable.resume(1, (one.number, other.number))
            counted(machine, 10)
            sampled = machine.sample()
            value = machine.pause()
            ended = time.monotonic_ns()
            read = [read_vcpu(board.number) for board in (one, other)]
        out = machine.sample()
        assert out.first_ticks == sampled.first_ticks == tuple(seen.first_tick for seen in read)
        assert value["last_ticks"] == list(out.last_ticks) == [seen.last_tick for seen in read]
        assert (value["astray"], value["torn"], value["registers"]) == ([], [], [])
        for first, early, last in zip(out.first_ticks, sampled.last_ticks, out.last_ticks, strict=True):
            assert began < first <= early <= last < ended
        began = ended


def test_a_guest_that_never_leaves_tells_no_tick(make: Make) -> None:
    machine = make()
    machine.runnable.resume(0)
    counted(machine, 100)
    assert machine.pause() == {"last_ticks": [0], "astray": [], "torn": [], "ended": "", "registers": []}

    assert machine.sample().first_ticks == (0,)


def test_signals_of_a_storm_take_a_vcpu_out_of_its_guest_and_it_goes_on(make: Make) -> None:
    """Of a guest that never leaves by itself all of them meet its first KVM_RUN."""
    harm.handled()
    machine = make()
    machine.runnable.resume(0)
    (tid,) = machine.threads
    deadline = time.monotonic() + SECONDS
    while machine.seen[0].interrupted < 10:
        signals._libc.tgkill(os.getpid(), tid, harm.STORM_SIGNAL)
        assert time.monotonic() < deadline
    seen = machine.seen[0]
    assert seen.early == seen.interrupted and seen.exits == 0
    assert harm.handled() >= 10
    counted(machine, 100)
    assert machine.pause()["ended"] == ""


def test_a_vcpu_that_has_left_the_program_is_told_when_it_is_paused(make: Make) -> None:
    machine = make(vcpus=2)
    machine.runnable.resume(0)
    counted(machine, 100)
    assert machine.pause()["astray"] == []
    elsewhere = guest.CODE + len(guest.TEXT)
    machine.memory.write(elsewhere, b"\xeb\xfe")  # jmp to itself
    registers = machine.vcpus[1].regs()
    registers.rip = elsewhere
    machine.vcpus[1].set_regs(registers)
    machine.runnable.resume(0)
    value = machine.pause()
    assert (value["astray"], value["torn"]) == ([1], [])
    (told,) = cast(list[str], value["registers"])
    assert told.startswith("vcpu 1: rax ") and f" rip {elsewhere:x} " in told


@pytest.mark.parametrize("every", [0, 1])
def test_a_vcpu_whose_counter_jumped_is_told_when_it_is_paused(make: Make, every: int) -> None:
    machine = make(vcpus=2)
    machine.runnable.resume(every)
    counted(machine, 100)
    assert machine.pause()["torn"] == []
    sound = machine.sample().sound
    assert min(sound) >= 100 if every else sound == (0, 0)
    registers = machine.vcpus[1].regs()
    registers.rbx ^= 0x8000
    machine.vcpus[1].set_regs(registers)
    machine.runnable.resume(every)
    value = machine.pause()
    assert (value["astray"], value["torn"]) == ([], [1])  # the page shows it, or the guest has said so
    assert machine.sample().sound[1] == 0
    (told,) = cast(list[str], value["registers"])
    assert told.startswith("vcpu 1: rax ")


def test_a_vcpu_that_has_stopped_by_itself_is_told_when_it_is_paused(make: Make) -> None:
    machine = make(vcpus=2)
    registers = machine.vcpus[1].regs()
    registers.rip = guest.CODE + len(guest.TEXT)
    machine.memory.write(registers.rip, b"\xe6\x77")  # out 0x77, al
    machine.vcpus[1].set_regs(registers)
    machine.runnable.resume(0)
    deadline = time.monotonic() + SECONDS
    while not machine.runnable.ended:
        assert time.monotonic() < deadline
    value = machine.pause()
    assert value["ended"] == "an access to port 0x77, which the guest does not make"
    (told,) = cast(list[str], value["registers"])
    assert told.startswith("vcpu 1: rax ") and " exit 2 01017700" in told  # an OUT of one byte


def test_pages_that_cannot_be_read_show_nothing(make: Make) -> None:
    machine = make()
    machine.memory.write(guest.CODE, b"\xeb\xfe")  # jmp to itself; the program does not look like itself then
    machine.memory.write(guest.LANES_AT, bytes(guest.LANE))
    machine.runnable.resume(0)
    assert machine.pause()["torn"] == []


def test_stopping_right_after_starting_loses_no_signal(make: Make) -> None:
    driver = make().runnable
    for _ in range(200):
        driver.resume(0)
        driver.pause()


def handed_over(source: Machine, destination: Machine) -> int:
    """The state, as far as to the destination's memory; of how many vCPUs."""
    sent, received = together(
        lambda: source.get_state(within=SECONDS), lambda: destination.receive_state(within=SECONDS)
    )
    assert sent == received
    return int(str(sent["vcpus"]))


def test_state_and_memory_carried_over_the_guest_goes_on_where_it_stopped(make: Make) -> None:
    old, new = make(2), make(2)
    old.runnable.resume(1)
    counted(old, 50)
    join(old.peer, new.peer)
    old.runnable.pause()
    stopped = old.sample().ticks
    assert handed_over(old, new) == 2
    old.send_fd()
    with new.peer.take_fd() as descriptor:
        assert descriptor.number != old.vm.fd.number
    assert new.set_state() == {"vcpus": 2, "differs": []}
    assert new.sample().ticks == stopped
    new.runnable.resume(1)
    assert counted(new, 50) >= stopped + 50
    new.peer.commit(within=SECONDS)
    together(lambda: new.peer.confirm(within=SECONDS), lambda: old.peer.confirm(within=SECONDS))


def carried(host: OpenDevices, old: Machine, new: Machine) -> list[str]:
    """What differs of the vCPUs after the state of each was carried over."""
    differs: list[str] = []
    for one, other in zip(old.vcpus, new.vcpus, strict=True):
        given = state.take(one, host.extent())
        state.give(other, given)
        differs += state.differences(given, state.take(other, host.extent()))
    return differs


def test_the_time_stamp_counter_goes_on_as_if_nothing_had_happened(host: OpenDevices, make: Make) -> None:
    """Written as an MSR it would be taken for an attempt to bring the vCPUs into step."""
    old, new = make(3), make(3)
    for number, vcpu in enumerate(old.vcpus):
        vcpu.set_tsc_offset(-1_000_000 * number % (1 << 64))
    assert carried(host, old, new) == []
    if old.vcpus[2].tsc_offset() == old.vcpus[0].tsc_offset():
        pytest.skip("this host's KVM gives its guests the host's counter, whatever it is told")
    assert [vcpu.tsc_offset() for vcpu in new.vcpus] == [vcpu.tsc_offset() for vcpu in old.vcpus]


def test_the_timer_of_a_guest_that_sleeps_is_carried_over(host: OpenDevices, make: Make) -> None:
    """An APIC takes a deadline only once its timer goes by one."""
    old, new = make(), make()
    (vcpu,) = old.vcpus
    page = bytearray(bytes(vcpu.lapic()))
    page[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # on
    page[0x320:0x324] = (0x40031).to_bytes(4, "little")  # its timer goes by TSC_DEADLINE
    vcpu.set_lapic(from_bytes(Lapic, bytes(page)))
    deadline = vcpu.msrs([state.TSC])[state.TSC] + (1 << 42)
    assert vcpu.set_msrs({state.TSC_DEADLINE: deadline}) == ()
    if not vcpu.msrs([state.TSC_DEADLINE])[state.TSC_DEADLINE]:
        pytest.skip("this host's KVM offers no such timer")
    assert carried(host, old, new) == []
    assert new.vcpus[0].msrs([state.TSC_DEADLINE]) == {state.TSC_DEADLINE: deadline}


def test_a_destination_with_more_vcpus_starts_those_the_guest_has(make: Make) -> None:
    old, new, last = make(), make(3), make(4)
    old.runnable.resume(1)
    stopped = counted(old, 50)
    for source, destination, number in ((old, new, 1), (new, last, 1)):
        join(source.peer, destination.peer)
        source.runnable.pause()
        assert handed_over(source, destination) == number
        assert destination.set_state()["vcpus"] == number
        destination.runnable.resume(1)
        assert len(destination.sample().each) == number
        stopped, before = counted(destination, 20), stopped
        assert stopped >= before + 20


def test_a_source_that_went_on_is_noticed_by_the_guest_itself(make: Make) -> None:
    """Two that run on one memory: what no correct migration lets happen."""
    old, new = make(), make()
    old.runnable.resume(1)
    new.runnable.resume(1)
    deadline = time.monotonic() + SECONDS
    while not (old.sample().stale or new.sample().stale):
        assert time.monotonic() < deadline
    old.runnable.pause()
    new.runnable.pause()


def test_what_is_asked_of_a_live_vm_is_answered_as_by_the_one_beside_it_and_changes_nothing(
    host: OpenDevices, make: Make
) -> None:
    machine = make(2)
    machine.runnable.resume(1)
    counted(machine, 10)
    machine.runnable.pause()
    before = [bytes(vcpu.regs()) + bytes(vcpu.sregs()) + bytes(vcpu.events()) for vcpu in machine.vcpus]
    answers = ask(host.system, machine.vm, machine.vcpus, machine.device)
    after = [bytes(vcpu.regs()) + bytes(vcpu.sregs()) + bytes(vcpu.events()) for vcpu in machine.vcpus]
    assert before == after
    kinds = (VM, VCPU, VCPU, *((DEVICE,) if machine.device is not None else ()))
    assert [answer.ioctl for answer in answers] == [name for kind in kinds for name in ANYBODY[kind]]
    assert [answer for answer in answers if answer.errno != answer.control] == []
    machine.runnable.resume(1)
    counted(machine, 10)


def test_the_questions_have_the_names_by_which_the_judge_looks_for_them() -> None:
    def named(questions: Sequence[AskedIoctl]) -> tuple[str, ...]:
        return tuple(question.name or question.number.name for question in questions)

    anybody = {VM: named(VM_QUESTIONS), VCPU: ("KVM_RUN", *named(VCPU_QUESTIONS)), DEVICE: named(DEVICE_QUESTIONS)}
    assert anybody == ANYBODY
    assert {kind: set(named(questions)) for kind, questions in QUESTIONS_OF_THE_DEAD.items()} == {
        kind: set(names) for kind, names in THE_DEAD.items()
    }


def test_a_vm_has_a_device_where_the_kernel_has_any(make: Make) -> None:
    machine = make()
    assert (machine.device is None) == (machine.no_device != 0)
    assert machine.no_device in (0, ENODEV)


def test_what_is_asked_of_the_dead_is_known_to_this_kernel(host: OpenDevices, make: Make) -> None:
    """Put to a VM that is thrown away: an ioctl that no kernel has would answer EIO too if its VM were dead."""
    machine = make()
    fds = {VM: machine.vm.fd.number, VCPU: machine.vcpus[0].fd.number}
    asked = [(q, fds[kind]) for kind, questions in QUESTIONS_OF_THE_DEAD.items() for q in questions]
    answers = {q.name or q.number.name: q.put(fd)[0] for q, fd in asked}
    of_sev = {name for name, errno in answers.items() if "ENCRYPT" in name and errno == ENOTTY}
    assert {name for name, errno in answers.items() if errno in (EIO, ENOTTY, EFAULT)} == of_sev
    assert answers["KVM_CREATE_VCPU of a free id"] == answers["KVM_SET_USER_MEMORY_REGION of slot 0"] == 0


def test_a_guest_that_leaves_its_program_says_how_it_ended(make: Make) -> None:
    machine = make()
    machine.memory.write(guest.CODE, b"\xe7\x99\xeb\xfe")  # out 0x99, ax
    machine.runnable.resume(1)
    deadline = time.monotonic() + SECONDS
    while not (ended := machine.sample().ended):
        assert time.monotonic() < deadline
    assert "port 0x99" in ended
    machine.runnable.pause()
    assert not machine.runnable.running


@pytest.mark.parametrize(
    ("code", "number"), [(b"\x0f\x0b", 6), (b"\xcd\x00", 0), (b"\xcd\x7f", 127)], ids=["ud2", "int 0", "int 127"]
)
def test_a_guest_that_takes_an_interrupt_or_exception_says_which_and_where(
    make: Make, code: bytes, number: int
) -> None:
    machine = make(vcpus=2)
    elsewhere = guest.CODE + len(guest.TEXT)
    machine.memory.write(elsewhere, code)
    registers = machine.vcpus[1].regs()
    registers.rip = elsewhere
    machine.vcpus[1].set_regs(registers)
    machine.runnable.resume(1)
    deadline = time.monotonic() + SECONDS
    while not (ended := machine.sample().ended):
        assert time.monotonic() < deadline
    at = elsewhere + len(code) * (code[0] == 0xCD)  # behind an INT, at what is undefined
    assert ended == f"an interrupt or exception that was not due, vector {number} at {at:#x}"
    assert machine.pause()["astray"] == [1]
    assert machine.sample().ended == ended


def test_commands_of_a_vm_without_a_context_are_refused(host: OpenDevices, make: Make) -> None:
    machine = make()
    if sev.enabled(machine.vm.fd.number):
        pytest.skip("this host has SEV")
    with pytest.raises(KernelError, match="GUEST_STATUS: ENOTTY") as refused:
        sev.Sev(machine.vm.fd.number, 0).guest_status()
    assert (refused.value.number, refused.value.firmware) == (ENOTTY, 0)


def test_closing_a_vm_closes_all_of_it(make: Make) -> None:
    from pathlib import Path

    def open_files() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("kvm-vcpu")

    make()
    before = open_files(), mapped()
    machine = make(3)
    assert open_files() > before[0] and mapped() == before[1] + 3
    machine.runnable.resume(0)
    machine.close()
    assert (open_files(), mapped()) == before
    machine.close()


def open_now() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("sort", get_args(ForeignFd))
def test_wrong_descriptors_are_refused_and_not_left_behind(host: OpenDevices, make: Make, sort: str) -> None:
    """Without SEV a move says EINVAL to everything; what is looked at is that each sort can be given at all."""
    machine, before = make(), open_now()
    with timed() as watch, foreign_fds.descriptor(sort, host.system, sev=NO_DEVICE) as number:
        opened = number >= 0 and number not in (foreign_fds.NEVER_OPEN, NO_DEVICE)
        assert opened == (sort not in ("closed", "negative", "sev"))
        assert not opened or os.fstat(number)
        assert watch.began == 0  # what it took to open it is not the operation's
        with pytest.raises(KernelError) as refused:
            machine.vm.move_context_from(number)
    assert refused.value.number in (EBADF, EINVAL)
    assert open_now() == before


def test_vcpus_are_added_while_the_others_run(make: Make) -> None:
    machine = make(2)
    machine.runnable.resume(1)
    machine.add_vcpu(9)
    assert (machine.count, len(machine.vcpus)) == (2, 3)
    counted(machine, 10)
    machine.runnable.pause()
    machine.add_vcpu(4)
    assert machine.count == len(machine.vcpus) == 4
    machine.runnable.resume(1)
    assert len(machine.sample().each) == 4
