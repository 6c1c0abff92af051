# SPDX-License-Identifier: Apache-2.0
"""The numbers of the interface. From the uapi headers of 6.12.117; the same in 6.1.

Tests compute the numbers again from the sizes of the structures, so that a slip in one of the two files shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag


class Ioctl(IntEnum):
    # /dev/kvm
    KVM_GET_API_VERSION = 0xAE00
    KVM_CREATE_VM = 0xAE01
    KVM_GET_MSR_INDEX_LIST = 0xC004AE02
    KVM_CHECK_EXTENSION = 0xAE03  # also on a VM
    KVM_GET_VCPU_MMAP_SIZE = 0xAE04
    KVM_GET_SUPPORTED_CPUID = 0xC008AE05
    # a VM
    KVM_CREATE_VCPU = 0xAE41
    KVM_GET_DIRTY_LOG = 0x4010AE42
    KVM_SET_USER_MEMORY_REGION = 0x4020AE46
    KVM_CREATE_IRQCHIP = 0xAE60
    KVM_SET_GSI_ROUTING = 0x4008AE6A  # the size field is that of the head, entries follow
    KVM_IRQFD = 0x4020AE76
    KVM_IOEVENTFD = 0x4040AE79
    KVM_GET_CLOCK = 0x8030AE7C
    KVM_ENABLE_CAP = 0x4068AEA3
    KVM_MEMORY_ENCRYPT_OP = 0xC008AEBA  # the size field says 8, the structure behind it has 24
    KVM_MEMORY_ENCRYPT_REG_REGION = 0x8010AEBB
    KVM_MEMORY_ENCRYPT_UNREG_REGION = 0x8010AEBC
    KVM_GET_STATS_FD = 0xAECE  # also of a vCPU
    KVM_CREATE_DEVICE = 0xC00CAEE0
    # a vCPU
    KVM_RUN = 0xAE80
    KVM_GET_REGS = 0x8090AE81
    KVM_SET_REGS = 0x4090AE82
    KVM_GET_SREGS = 0x8138AE83
    KVM_SET_SREGS = 0x4138AE84
    KVM_INTERRUPT = 0x4004AE86
    KVM_GET_MSRS = 0xC008AE88
    KVM_SET_MSRS = 0x4008AE89
    KVM_GET_FPU = 0x81A0AE8C
    KVM_SET_FPU = 0x41A0AE8D
    KVM_GET_LAPIC = 0x8400AE8E
    KVM_SET_LAPIC = 0x4400AE8F
    KVM_SET_CPUID2 = 0x4008AE90
    KVM_GET_MP_STATE = 0x8004AE98
    KVM_SET_MP_STATE = 0x4004AE99
    KVM_GET_VCPU_EVENTS = 0x8040AE9F
    KVM_SET_VCPU_EVENTS = 0x4040AEA0
    KVM_GET_DEBUGREGS = 0x8080AEA1
    KVM_SET_DEBUGREGS = 0x4080AEA2
    KVM_GET_TSC_KHZ = 0xAEA3
    KVM_GET_XSAVE = 0x9000AEA4
    KVM_SET_XSAVE = 0x5000AEA5
    KVM_GET_XCRS = 0x8188AEA6
    KVM_SET_XCRS = 0x4188AEA7
    KVM_SET_DEVICE_ATTR = 0x4018AEE1
    KVM_GET_DEVICE_ATTR = 0x4018AEE2
    KVM_HAS_DEVICE_ATTR = 0x4018AEE3
    KVM_GET_XSAVE2 = 0x9000AECF  # as much as KVM_CAP_XSAVE2 says, which may be more than the size in it
    # no ioctl of any kernel; a live VM says ENOTTY, a live vCPU EINVAL, a dead one of either EIO
    KVM_UNKNOWN = 0xAEFE
    # /dev/sev
    SEV_ISSUE_CMD = 0xC0105300


IOCTL_NAMES: Mapping[int, str] = {call.value: call.name for call in Ioctl}


class Cap(IntEnum):
    SYNC_REGS = 74
    VCPU_ATTRIBUTES = 127
    COPY_ENC_CONTEXT_FROM = 197
    MOVE_ENC_CONTEXT_FROM = 206  # answers 1 on every x86 KVM: proves nothing about SEV
    XSAVE2 = 208
    VM_TYPES = 235


class Sync(IntFlag):
    """What KVM_RUN leaves copies of in kvm_run. KVM_CAP_SYNC_REGS of a VM says which it may."""

    REGS = 1
    SREGS = 2


class VmType(IntEnum):
    """What KVM_CREATE_VM is given. KVM_CAP_VM_TYPES has a bit for each that there is, and is 0 before there were any
    but the first. SEV and SEV_ES: since 6.10."""

    DEFAULT = 0
    SEV = 2
    SEV_ES = 3


class DeviceType(IntEnum):
    """What KVM_CREATE_DEVICE makes. On x86 there is this type alone (CONFIG_KVM_VFIO), and a VM has one at most."""

    VFIO = 4


ROUTE_TO_MSI = 2
"""KVM_IRQ_ROUTING_MSI: a GSI is a message to local APICs."""


class IrqfdFlag(IntFlag):
    DEASSIGN = 1 << 0


class IoeventfdFlag(IntFlag):
    PIO = 1 << 1  # `addr` is a port
    DEASSIGN = 1 << 2


CREATE_DEVICE_TEST = 1
"""A flag of KVM_CREATE_DEVICE: only say whether there is such a device."""


class SevCommand(IntEnum):
    """Ids of KVM_MEMORY_ENCRYPT_OP."""

    INIT = 0
    ES_INIT = 1
    LAUNCH_START = 2
    LAUNCH_UPDATE_DATA = 3
    LAUNCH_UPDATE_VMSA = 4
    LAUNCH_SECRET = 5
    LAUNCH_MEASURE = 6
    LAUNCH_FINISH = 7
    GUEST_STATUS = 16
    DBG_DECRYPT = 17
    DBG_ENCRYPT = 18
    INIT2 = 22


class PlatformCommand(IntEnum):
    """Ids of SEV_ISSUE_CMD."""

    FACTORY_RESET = 0
    PLATFORM_STATUS = 1
    PEK_GEN = 2
    PEK_CSR = 3
    PDH_GEN = 4
    PDH_CERT_EXPORT = 5
    GET_ID2 = 8


class Policy(IntEnum):
    """Bits of a SEV guest's policy."""

    NODBG = 1 << 0
    NOKS = 1 << 1
    ES = 1 << 2
    NOSEND = 1 << 3


class ExitReason(IntEnum):
    """Why KVM_RUN returned."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24


def exit_name(reason: int) -> str:
    try:
        return f"KVM_EXIT_{ExitReason(reason).name}"
    except ValueError:
        return f"KVM_EXIT {reason}"


FIRMWARE_INVALID_LEN = 4  # what LAUNCH_MEASURE says when asked with length 0: then the length is filled in
PAGE = 4096
