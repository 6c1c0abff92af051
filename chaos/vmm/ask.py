# SPDX-License-Identifier: Apache-2.0
"""Asking a VM whether it is dead.

After a move every ioctl on the source's descriptors must answer EIO. But EIO is also what any process with another
address space is told, so the question is put in the source's own process, and each time to a fresh plain VM beside it,
which shows what a live VM answers there and then.

Nothing asked changes a VM that lives: it reads, or asks for something impossible that is refused before anything is
touched. KVM_RUN with `immediate_exit` finishes an instruction that was under way and enters no guest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from chaos.history.records import Answer
from chaos.kvm.call import attempt
from chaos.kvm.numbers import Cap, Ioctl, SevCommand
from chaos.kvm.structs import (
    ClockData,
    DebugRegs,
    DirtyLog,
    EnableCap,
    Fpu,
    GuestStatusData,
    MemoryRegion,
    MpState,
    Regs,
    SevCmd,
    Sregs,
    VcpuEvents,
)  # fmt: skip
from chaos.kvm.system import System
from chaos.kvm.vcpu import KvmVcpu
from chaos.kvm.vm import KvmVm

ABSENT_SLOT = 77
ABSURD_ID = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class AskedIoctl:
    """An ioctl. `argument` makes it anew each time: the kernel writes into it."""

    number: Ioctl
    argument: Callable[[], Any]
    name: str = ""

    def put(self, fd: int) -> tuple[int, int]:
        """The errno and, of a command of SEV, the firmware's status."""
        argument = self.argument()
        passed = ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument
        errno = attempt(fd, self.number, passed)[1]
        return errno, argument.error if errno and isinstance(argument, SevCmd) else 0


# Kept beyond the call: the kernel writes the status to the address in the command.
_status = GuestStatusData()

VM_QUESTIONS: Sequence[AskedIoctl] = (
    AskedIoctl(Ioctl.KVM_CHECK_EXTENSION, lambda: Cap.MOVE_ENC_CONTEXT_FROM),
    AskedIoctl(Ioctl.KVM_GET_CLOCK, ClockData),
    AskedIoctl(
        Ioctl.KVM_MEMORY_ENCRYPT_OP,
        lambda: SevCmd(id=SevCommand.GUEST_STATUS, data=ctypes.addressof(_status)),
        "KVM_MEMORY_ENCRYPT_OP GUEST_STATUS",
    ),
    AskedIoctl(Ioctl.KVM_CREATE_VCPU, lambda: ABSURD_ID),
    AskedIoctl(Ioctl.KVM_SET_USER_MEMORY_REGION, lambda: MemoryRegion(slot=ABSENT_SLOT)),
    AskedIoctl(Ioctl.KVM_GET_DIRTY_LOG, lambda: DirtyLog(slot=ABSENT_SLOT)),
    AskedIoctl(Ioctl.KVM_ENABLE_CAP, lambda: EnableCap(flags=1)),
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
    AskedIoctl(Ioctl.KVM_UNKNOWN, lambda: 0),
)


def ask(system: System, vm: KvmVm, vcpus: Sequence[KvmVcpu]) -> tuple[Answer, ...]:
    """Put every question to the VM and its vCPUs. Raises `KernelError` if the VM beside it cannot be made."""
    with ExitStack() as stack:
        control = system.create_vm()
        stack.callback(control.close)
        control_vcpu = control.create_vcpu(0)
        stack.callback(control_vcpu.close)
        return (*_ask_vm(vm, control), *(a for i, vcpu in enumerate(vcpus) for a in _ask_vcpu(i, vcpu, control_vcpu)))


def _ask_vm(vm: KvmVm, control: KvmVm) -> Iterator[Answer]:
    for question in VM_QUESTIONS:
        name = question.name or question.number.name
        errno, firmware = question.put(vm.fd.number)
        control_errno, _ = question.put(control.fd.number)
        yield Answer(fd="vm", ioctl=name, errno=errno, control=control_errno, firmware=firmware)


def _ask_vcpu(index: int, vcpu: KvmVcpu, control: KvmVcpu) -> Iterator[Answer]:
    fd = f"vcpu {index}"
    yield Answer(fd=fd, ioctl="KVM_RUN", errno=_run(vcpu), control=_run(control))
    for question in VCPU_QUESTIONS:
        (errno, _), (expected, _) = question.put(vcpu.fd.number), question.put(control.fd.number)
        yield Answer(fd=fd, ioctl=question.number.name, errno=errno, control=expected)


def _run(vcpu: KvmVcpu) -> int:
    before = vcpu.shared.immediate_exit  # a storm may have set it
    vcpu.shared.immediate_exit = 1
    try:
        return vcpu.run()
    finally:
        vcpu.shared.immediate_exit = before
