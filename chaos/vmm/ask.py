# SPDX-License-Identifier: Apache-2.0
"""Asking a VM whether it is dead.

After a move every ioctl on the source's descriptors must answer EIO. But EIO is also what any process with another
address space is told, so the question is put in the source's own process, and each time to a fresh plain VM beside it,
which shows what a live VM answers there and then.

What is asked of anybody changes no VM that lives: it reads, or asks for something impossible that is refused before
anything is touched. KVM_RUN with `immediate_exit` finishes an instruction that was under way and enters no guest. What
would change one that lives is asked only of a VM that has failed all of that with EIO; the VM beside it is asked it
too, and is thrown away afterwards.

The names of the questions are those of `chaos.history.questions`, where the judge looks for them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EBADF, EIO
from typing import Any

from chaos.history.questions import DEVICE, VCPU, VM
from chaos.history.records import Answer
from chaos.kvm.call import attempt
from chaos.kvm.numbers import CREATE_DEVICE_TEST, PAGE, Cap, DeviceType, Ioctl, SevCommand
from chaos.kvm.structs import (
    ClockData,
    Cpuid,
    CreateDevice,
    DebugRegs,
    DeviceAttr,
    DirtyLog,
    EnableCap,
    EncRegion,
    Fpu,
    GuestStatusData,
    Interrupt,
    Lapic,
    MemoryRegion,
    MpState,
    MsrEntry,
    Msrs,
    Regs,
    SevCmd,
    Sregs,
    VcpuEvents,
    Xcrs,
)  # fmt: skip
from chaos.kvm.system import System
from chaos.kvm.vcpu import KvmVcpu
from chaos.kvm.vm import KvmVm
from chaos.linux.fd import OwnedFd

ABSENT_SLOT = 77
ABSURD_ID = 0x7FFFFFFF
ABSURD_GROUP = 0x7FFFFFFF
FREE_ID = 200  # of a vCPU: below every kernel's limit, and no VM of ours has so many
TSC = 0x10


@dataclass(frozen=True, slots=True)
class AskedIoctl:
    """An ioctl. `argument` makes it anew each time: the kernel writes into it. One that `opens` answers with a
    descriptor, which is closed at once."""

    number: Ioctl
    argument: Callable[[], Any]
    name: str = ""
    opens: bool = False

    def put(self, fd: int) -> tuple[int, int]:
        """The errno and, of a command of SEV, the firmware's status."""
        argument = self.argument()
        structure = isinstance(argument, ctypes.Structure | ctypes.Array)
        result, errno = attempt(fd, self.number, ctypes.byref(argument) if structure else argument)
        if self.opens and not errno:
            os.close(argument.fd if isinstance(argument, CreateDevice) else result)
        return errno, argument.error if errno and isinstance(argument, SevCmd) else 0


# Kept beyond the call: the kernel writes the status to the address in the command.
_status = GuestStatusData()
_pages = ctypes.create_string_buffer(2 * PAGE)


def _page() -> EncRegion:
    """A page of our own to be pinned."""
    return EncRegion(addr=-(-ctypes.addressof(_pages) // PAGE) * PAGE, size=PAGE)


def one_msr() -> ctypes.Array[ctypes.c_char]:
    """One MSR of the hundreds that there is room for."""
    request = Msrs(nmsrs=1)
    request.entries[0].index = TSC
    length = Msrs.entries.offset + ctypes.sizeof(MsrEntry)
    return ctypes.create_string_buffer(bytes(request)[:length], length)


def _sev(command: SevCommand) -> AskedIoctl:
    """A command without data."""
    return AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_OP, lambda: SevCmd(id=command), f"KVM_MEMORY_ENCRYPT_OP {command.name}")


VM_QUESTIONS: Sequence[AskedIoctl] = (
    AskedIoctl(Ioctl.KVM_CHECK_EXTENSION, lambda: Cap.MOVE_ENC_CONTEXT_FROM),
    AskedIoctl(Ioctl.KVM_GET_CLOCK, ClockData),
    AskedIoctl(
        Ioctl.KVM_MEMORY_ENCRYPT_OP,
        lambda: SevCmd(id=SevCommand.GUEST_STATUS, data=ctypes.addressof(_status)),
        "KVM_MEMORY_ENCRYPT_OP GUEST_STATUS",
    ),
    AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_OP, lambda: SevCmd(id=ABSURD_ID), "KVM_MEMORY_ENCRYPT_OP of no command"),
    AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_REG_REGION, EncRegion, "KVM_MEMORY_ENCRYPT_REG_REGION of nothing"),
    AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_UNREG_REGION, EncRegion, "KVM_MEMORY_ENCRYPT_UNREG_REGION of nothing"),
    AskedIoctl(Ioctl.KVM_CREATE_VCPU, lambda: ABSURD_ID),
    AskedIoctl(Ioctl.KVM_SET_USER_MEMORY_REGION, lambda: MemoryRegion(slot=ABSENT_SLOT)),
    AskedIoctl(Ioctl.KVM_GET_DIRTY_LOG, lambda: DirtyLog(slot=ABSENT_SLOT)),
    AskedIoctl(Ioctl.KVM_ENABLE_CAP, lambda: EnableCap(flags=1)),
    AskedIoctl(
        Ioctl.KVM_CREATE_DEVICE,
        lambda: CreateDevice(type=DeviceType.VFIO, flags=CREATE_DEVICE_TEST),
        "KVM_CREATE_DEVICE to test",
    ),
    AskedIoctl(Ioctl.KVM_GET_STATS_FD, lambda: 0, opens=True),
    AskedIoctl(Ioctl.KVM_UNKNOWN, lambda: 0),
)

VCPU_QUESTIONS: Sequence[AskedIoctl] = (
    AskedIoctl(Ioctl.KVM_GET_REGS, Regs),
    AskedIoctl(Ioctl.KVM_GET_SREGS, Sregs),
    AskedIoctl(Ioctl.KVM_GET_FPU, Fpu),
    AskedIoctl(Ioctl.KVM_GET_MP_STATE, MpState),
    AskedIoctl(Ioctl.KVM_GET_VCPU_EVENTS, VcpuEvents),
    AskedIoctl(Ioctl.KVM_GET_DEBUGREGS, DebugRegs),
    AskedIoctl(Ioctl.KVM_GET_TSC_KHZ, lambda: 0),
    AskedIoctl(Ioctl.KVM_GET_XCRS, Xcrs),
    AskedIoctl(Ioctl.KVM_GET_LAPIC, Lapic),
    AskedIoctl(Ioctl.KVM_GET_MSRS, one_msr),
    AskedIoctl(Ioctl.KVM_INTERRUPT, Interrupt),  # refused: the interrupt controllers are the kernel's
    AskedIoctl(Ioctl.KVM_GET_STATS_FD, lambda: 0, opens=True),
    AskedIoctl(Ioctl.KVM_UNKNOWN, lambda: 0),
)

DEVICE_QUESTIONS: Sequence[AskedIoctl] = (
    AskedIoctl(Ioctl.KVM_HAS_DEVICE_ATTR, lambda: DeviceAttr(group=ABSURD_GROUP)),
    AskedIoctl(Ioctl.KVM_GET_DEVICE_ATTR, lambda: DeviceAttr(group=ABSURD_GROUP)),
    AskedIoctl(Ioctl.KVM_SET_DEVICE_ATTR, lambda: DeviceAttr(group=ABSURD_GROUP)),
    AskedIoctl(Ioctl.KVM_UNKNOWN, lambda: 0),
)

QUESTIONS_OF_THE_DEAD: Mapping[str, Sequence[AskedIoctl]] = {
    VM: (
        AskedIoctl(Ioctl.KVM_CREATE_VCPU, lambda: FREE_ID, "KVM_CREATE_VCPU of a free id", opens=True),
        AskedIoctl(Ioctl.KVM_SET_USER_MEMORY_REGION, MemoryRegion, "KVM_SET_USER_MEMORY_REGION of slot 0"),
        AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_REG_REGION, _page),
        AskedIoctl(Ioctl.KVM_MEMORY_ENCRYPT_UNREG_REGION, _page),
        AskedIoctl(Ioctl.KVM_CREATE_DEVICE, lambda: CreateDevice(type=DeviceType.VFIO), opens=True),
        AskedIoctl(Ioctl.KVM_CREATE_IRQCHIP, lambda: 0),
        *(_sev(command) for command in SevCommand if command is not SevCommand.GUEST_STATUS),
    ),
    VCPU: (
        AskedIoctl(Ioctl.KVM_SET_REGS, Regs),
        AskedIoctl(Ioctl.KVM_SET_SREGS, Sregs),
        AskedIoctl(Ioctl.KVM_SET_FPU, Fpu),
        AskedIoctl(Ioctl.KVM_SET_XCRS, Xcrs),
        AskedIoctl(Ioctl.KVM_SET_LAPIC, Lapic),
        AskedIoctl(Ioctl.KVM_SET_MSRS, lambda: Msrs(nmsrs=0)),
        AskedIoctl(Ioctl.KVM_SET_MP_STATE, MpState),
        AskedIoctl(Ioctl.KVM_SET_VCPU_EVENTS, VcpuEvents),
        AskedIoctl(Ioctl.KVM_SET_DEBUGREGS, DebugRegs),
        AskedIoctl(Ioctl.KVM_SET_CPUID2, lambda: Cpuid(nent=0)),
    ),
    DEVICE: (),
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A descriptor, the same of the VM beside it, and the vCPU if it is one's."""

    name: str
    kind: str
    fd: int
    control: int
    vcpus: tuple[KvmVcpu, KvmVcpu] | None = None

    def put(self, question: AskedIoctl) -> Answer:
        (errno, firmware), (control, _) = question.put(self.fd), question.put(self.control)
        name = question.name or question.number.name
        return Answer(fd=self.name, ioctl=name, errno=errno, control=control, firmware=firmware)


def ask(system: System, vm: KvmVm, vcpus: Sequence[KvmVcpu], device: OwnedFd | None = None) -> tuple[Answer, ...]:
    """Put every question to the VM, its vCPUs and its device, if it has one. Raises `KernelError` if the VM beside it
    cannot be made."""
    with ExitStack() as stack:
        asked = tuple(_beside(stack, system, vm, vcpus, device))
        answers = [answer for each in asked for answer in _of_anybody(each)]
        if all(a.errno in (EIO, EBADF) and not a.firmware for a in answers) and any(a.errno == EIO for a in answers):
            answers += [each.put(question) for each in asked for question in QUESTIONS_OF_THE_DEAD[each.kind]]
        return tuple(answers)


def _beside(
    stack: ExitStack, system: System, vm: KvmVm, vcpus: Sequence[KvmVcpu], device: OwnedFd | None
) -> Iterator[_Asked]:
    """The descriptors, each with that of a VM made for it."""
    control = system.create_vm()
    stack.callback(control.close)
    control.create_irqchip()
    control_vcpu = control.create_vcpu(0)
    stack.callback(control_vcpu.close)
    yield _Asked("vm", VM, vm.fd.number, control.fd.number)
    for index, vcpu in enumerate(vcpus):
        yield _Asked(f"vcpu {index}", VCPU, vcpu.fd.number, control_vcpu.fd.number, (vcpu, control_vcpu))
    if device is not None:
        control_device = control.create_device()
        stack.callback(control_device.close)
        yield _Asked("device", DEVICE, device.number, control_device.number)


_OF_ANYBODY: Mapping[str, Sequence[AskedIoctl]] = {VM: VM_QUESTIONS, VCPU: VCPU_QUESTIONS, DEVICE: DEVICE_QUESTIONS}


def _of_anybody(asked: _Asked) -> Iterator[Answer]:
    if asked.vcpus is not None:
        vcpu, control = asked.vcpus
        yield Answer(fd=asked.name, ioctl="KVM_RUN", errno=_run(vcpu), control=_run(control))
    for question in _OF_ANYBODY[asked.kind]:
        yield asked.put(question)


def _run(vcpu: KvmVcpu) -> int:
    before = vcpu.shared.immediate_exit  # a storm may have set it
    vcpu.shared.immediate_exit = 1
    try:
        return vcpu.run()
    finally:
        vcpu.shared.immediate_exit = before
