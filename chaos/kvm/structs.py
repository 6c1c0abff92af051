# SPDX-License-Identifier: Apache-2.0
"""Structures of the interface, x86-64. From the uapi headers of 6.12.117; each asserts the size it was seen to have."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from typing import TypeVar


class Segment(ctypes.Structure):
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class DescriptorTable(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


GENERAL = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
_SEGMENTS = "cs ds es fs gs ss tr ldt"
_CONTROL = "cr0 cr2 cr3 cr4 cr8 efer apic_base"
_CPUID = "function index flags eax ebx ecx edx pad0 pad1 pad2"


class Regs(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in GENERAL.split()]


class Sregs(ctypes.Structure):
    _fields_ = [
        *((name, Segment) for name in _SEGMENTS.split()),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, c_uint64) for name in _CONTROL.split()),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class Fpu(ctypes.Structure):
    _fields_ = [
        ("fpr", c_uint8 * 128),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 256),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class MpState(ctypes.Structure):
    _fields_ = [("mp_state", c_uint32)]


class Interrupt(ctypes.Structure):
    _fields_ = [("irq", c_uint32)]


class VcpuEvents(ctypes.Structure):
    """Carried from one vCPU to another and never looked into."""

    _fields_ = [("bytes", c_uint8 * 64)]


class Xsave(ctypes.Structure):
    """The area of KVM_GET_XSAVE; that of KVM_GET_XSAVE2 goes on behind it."""

    _fields_ = [("bytes", c_uint8 * 4096)]


class Xcrs(ctypes.Structure):
    _fields_ = [("bytes", c_uint8 * 392)]


class Lapic(ctypes.Structure):
    _fields_ = [("bytes", c_uint8 * 1024)]


MSR_ENTRIES = 1024


class MsrEntry(ctypes.Structure):
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class Msrs(ctypes.Structure):
    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32), ("entries", MsrEntry * MSR_ENTRIES)]


class MsrList(ctypes.Structure):
    _fields_ = [("nmsrs", c_uint32), ("indices", c_uint32 * MSR_ENTRIES)]


class DebugRegs(ctypes.Structure):
    _fields_ = [("bytes", c_uint8 * 128)]


class DeviceAttr(ctypes.Structure):
    """kvm_device_attr: `addr` is where the value is."""

    _fields_ = [("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64)]


class CreateDevice(ctypes.Structure):
    """kvm_create_device: the kernel fills in `fd`."""

    _fields_ = [("type", c_uint32), ("fd", c_uint32), ("flags", c_uint32)]


class ClockData(ctypes.Structure):
    _fields_ = [("bytes", c_uint8 * 48)]


class MemoryRegion(ctypes.Structure):
    """Slot, flags, guest address, size in bytes, address in the VMM."""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class Irqfd(ctypes.Structure):
    _fields_ = [
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class Ioeventfd(ctypes.Structure):
    _fields_ = [
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    ]


ROUTES = 256


class IrqRoute(ctypes.Structure):
    """kvm_irq_routing_entry of a message: its address, which says to which APIC, and its data, which says what."""

    _fields_ = [
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("pad1", c_uint32 * 5),
    ]


class IrqRouting(ctypes.Structure):
    _fields_ = [("nr", c_uint32), ("flags", c_uint32), ("entries", IrqRoute * ROUTES)]


class DirtyLog(ctypes.Structure):
    _fields_ = [("slot", c_uint32), ("padding", c_uint32), ("bitmap", c_uint64)]


class EnableCap(ctypes.Structure):
    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class EncRegion(ctypes.Structure):
    _fields_ = [("addr", c_uint64), ("size", c_uint64)]


CPUID_ENTRIES = 256


class CpuidEntry(ctypes.Structure):
    _fields_ = [(name, c_uint32) for name in _CPUID.split()]


class Cpuid(ctypes.Structure):
    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * CPUID_ENTRIES)]


class RunIo(ctypes.Structure):
    """KVM_EXIT_IO. `data_offset` counts from the start of kvm_run."""

    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class RunExit(ctypes.Union):
    """What belongs to the exit's reason: of all its members the one we read."""

    _fields_ = [("io", RunIo), ("padding", c_uint8 * 256)]


class KvmRun(ctypes.Structure):
    """kvm_run. `valid_regs` asks KVM_RUN for copies of registers: it writes them whenever it ends."""

    _anonymous_ = ("exit",)

    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", RunExit),
        ("valid_regs", c_uint64),
        ("dirty_regs", c_uint64),
        ("regs", Regs),
        ("sregs", Sregs),
    ]


class SevCmd(ctypes.Structure):
    """`error` is the firmware's status."""

    _fields_ = [
        ("id", c_uint32),
        ("pad0", c_uint32),
        ("data", c_uint64),
        ("error", c_uint32),
        ("sev_fd", c_uint32),
    ]


class SevInit(ctypes.Structure):
    """kvm_sev_init, of KVM_SEV_INIT2."""

    _fields_ = [
        ("vmsa_features", c_uint64),
        ("flags", c_uint32),
        ("ghcb_version", c_uint16),
        ("pad1", c_uint16),
        ("pad2", c_uint32 * 8),
    ]


class LaunchStartData(ctypes.Structure):
    _fields_ = [
        ("handle", c_uint32),
        ("policy", c_uint32),
        ("dh_uaddr", c_uint64),
        ("dh_len", c_uint32),
        ("pad0", c_uint32),
        ("session_uaddr", c_uint64),
        ("session_len", c_uint32),
        ("pad1", c_uint32),
    ]


class AddressLength(ctypes.Structure):
    """kvm_sev_launch_update_data and kvm_sev_launch_measure."""

    _fields_ = [("uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


class GuestStatusData(ctypes.Structure):
    _fields_ = [("handle", c_uint32), ("policy", c_uint32), ("state", c_uint32)]


class IssueCmd(ctypes.Structure):
    """Of SEV_ISSUE_CMD; packed."""

    _pack_ = 1
    _fields_ = [("cmd", c_uint32), ("data", c_uint64), ("error", c_uint32)]


class PlatformStatusData(ctypes.Structure):
    _pack_ = 1
    _fields_ = [
        ("api_major", c_uint8),
        ("api_minor", c_uint8),
        ("state", c_uint8),
        ("flags", c_uint32),
        ("build", c_uint8),
        ("guest_count", c_uint32),
    ]


class BlobData(ctypes.Structure):
    """sev_user_data_pek_csr and sev_user_data_get_id2: `length` is told back."""

    _pack_ = 1
    _fields_ = [("address", c_uint64), ("length", c_uint32)]


class PdhCertExportData(ctypes.Structure):
    """Both lengths are told back."""

    _pack_ = 1
    _fields_ = [
        ("pdh_cert_address", c_uint64),
        ("pdh_cert_len", c_uint32),
        ("cert_chain_address", c_uint64),
        ("cert_chain_len", c_uint32),
    ]


class DebugData(ctypes.Structure):
    """kvm_sev_dbg."""

    _fields_ = [("src_uaddr", c_uint64), ("dst_uaddr", c_uint64), ("len", c_uint32), ("pad0", c_uint32)]


SIZES: dict[type[ctypes.Structure], int] = {
    Segment: 24,
    DescriptorTable: 16,
    Regs: 144,
    Sregs: 312,
    Fpu: 416,
    MpState: 4,
    VcpuEvents: 64,
    Xsave: 4096,
    Xcrs: 392,
    Lapic: 1024,
    MsrEntry: 16,
    Msrs: 8 + 16 * MSR_ENTRIES,
    MsrList: 4 + 4 * MSR_ENTRIES,
    DebugRegs: 128,
    DeviceAttr: 24,
    CreateDevice: 12,
    ClockData: 48,
    MemoryRegion: 32,
    Irqfd: 32,
    Ioeventfd: 64,
    IrqRoute: 48,
    IrqRouting: 8 + 48 * ROUTES,
    DirtyLog: 16,
    EnableCap: 104,
    EncRegion: 16,
    CpuidEntry: 40,
    Cpuid: 8 + 40 * CPUID_ENTRIES,
    RunIo: 16,
    KvmRun: 760,
    SevCmd: 24,
    SevInit: 48,
    LaunchStartData: 40,
    AddressLength: 16,
    GuestStatusData: 12,
    IssueCmd: 16,
    PlatformStatusData: 12,
    BlobData: 12,
    PdhCertExportData: 24,
    DebugData: 24,
}
for _structure, _size in SIZES.items():
    assert ctypes.sizeof(_structure) == _size, (_structure, ctypes.sizeof(_structure), _size)

S = TypeVar("S", bound=ctypes.Structure)


def from_bytes(structure: type[S], data: bytes) -> S:
    """A copy. Raises ValueError if `data` has another length than the structure."""
    if len(data) != ctypes.sizeof(structure):
        raise ValueError(f"{structure.__name__} has {ctypes.sizeof(structure)} bytes, not {len(data)}")
    return structure.from_buffer_copy(data)
