# SPDX-License-Identifier: Apache-2.0
"""What a VM is asked to find out whether it is dead: the names of the ioctls, by kind of descriptor.

Who asks (`chaos.vmm.ask`) has the arguments; who judges needs to know that nothing was left out. `ANYBODY` are ioctls
that change no VM that lives: they read, or ask for something impossible. `THE_DEAD` would change one that lives, so
they are asked only of a VM that has failed all of the others with EIO.
"""

from __future__ import annotations

from collections.abc import Mapping

VM, VCPU, DEVICE = "vm", "vcpu", "device"

ANYBODY: Mapping[str, tuple[str, ...]] = {
    VM: (
        "KVM_CHECK_EXTENSION",
        "KVM_GET_CLOCK",
        "KVM_MEMORY_ENCRYPT_OP GUEST_STATUS",
        "KVM_MEMORY_ENCRYPT_OP of no command",
        "KVM_MEMORY_ENCRYPT_REG_REGION of nothing",
        "KVM_MEMORY_ENCRYPT_UNREG_REGION of nothing",
        "KVM_CREATE_VCPU",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_GET_DIRTY_LOG",
        "KVM_ENABLE_CAP",
        "KVM_CREATE_DEVICE to test",
        "KVM_GET_STATS_FD",
        "KVM_UNKNOWN",
    ),
    VCPU: (
        "KVM_RUN",
        "KVM_GET_REGS",
        "KVM_GET_SREGS",
        "KVM_GET_FPU",
        "KVM_GET_MP_STATE",
        "KVM_GET_VCPU_EVENTS",
        "KVM_GET_DEBUGREGS",
        "KVM_GET_TSC_KHZ",
        "KVM_GET_XCRS",
        "KVM_GET_LAPIC",
        "KVM_GET_MSRS",
        "KVM_INTERRUPT",
        "KVM_GET_STATS_FD",
        "KVM_UNKNOWN",
    ),
    DEVICE: ("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR", "KVM_UNKNOWN"),
}

THE_DEAD: Mapping[str, tuple[str, ...]] = {
    VM: (
        "KVM_CREATE_VCPU of a free id",
        "KVM_SET_USER_MEMORY_REGION of slot 0",
        "KVM_MEMORY_ENCRYPT_REG_REGION",
        "KVM_MEMORY_ENCRYPT_UNREG_REGION",
        "KVM_CREATE_DEVICE",
        "KVM_CREATE_IRQCHIP",
        *(
            f"KVM_MEMORY_ENCRYPT_OP {command}"
            for command in (
                "INIT", "ES_INIT", "INIT2", "LAUNCH_START", "LAUNCH_UPDATE_DATA", "LAUNCH_UPDATE_VMSA",
                "LAUNCH_SECRET", "LAUNCH_MEASURE", "LAUNCH_FINISH", "DBG_DECRYPT", "DBG_ENCRYPT",
            )
        ),
    ),
    VCPU: (
        "KVM_SET_REGS",
        "KVM_SET_SREGS",
        "KVM_SET_FPU",
        "KVM_SET_XCRS",
        "KVM_SET_LAPIC",
        "KVM_SET_MSRS",
        "KVM_SET_MP_STATE",
        "KVM_SET_VCPU_EVENTS",
        "KVM_SET_DEBUGREGS",
        "KVM_SET_CPUID2",
    ),
    DEVICE: (),
}  # fmt: skip


def kind_of(fd: str) -> str:
    """The kind of descriptor that an answer is of: "vcpu" of "vcpu 3"."""
    return fd.partition(" ")[0]
