# SPDX-License-Identifier: Apache-2.0
"""The kernel's numbers and structures, computed a second time."""

from __future__ import annotations

import ctypes
import os

import pytest

from chaos.errors import InternalError
from chaos.kvm import call, structs
from chaos.kvm.numbers import Ioctl, exit_name
from chaos.linux.fd import Mapping, OwnedFd

READ, WRITE = 2, 1


def number(direction: int, nr: int, size: int, kind: int = 0xAE) -> int:
    """asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | kind << 8 | nr


@pytest.mark.parametrize(
    ("ioctl", "direction", "nr", "structure"),
    [
        (Ioctl.KVM_SET_USER_MEMORY_REGION, WRITE, 0x46, structs.MemoryRegion),
        (Ioctl.KVM_GET_DIRTY_LOG, WRITE, 0x42, structs.DirtyLog),
        (Ioctl.KVM_IRQFD, WRITE, 0x76, structs.Irqfd),
        (Ioctl.KVM_IOEVENTFD, WRITE, 0x79, structs.Ioeventfd),
        (Ioctl.KVM_GET_CLOCK, READ, 0x7C, structs.ClockData),
        (Ioctl.KVM_GET_REGS, READ, 0x81, structs.Regs),
        (Ioctl.KVM_SET_REGS, WRITE, 0x82, structs.Regs),
        (Ioctl.KVM_INTERRUPT, WRITE, 0x86, structs.Interrupt),
        (Ioctl.KVM_GET_SREGS, READ, 0x83, structs.Sregs),
        (Ioctl.KVM_SET_SREGS, WRITE, 0x84, structs.Sregs),
        (Ioctl.KVM_GET_FPU, READ, 0x8C, structs.Fpu),
        (Ioctl.KVM_SET_FPU, WRITE, 0x8D, structs.Fpu),
        (Ioctl.KVM_GET_MP_STATE, READ, 0x98, structs.MpState),
        (Ioctl.KVM_SET_MP_STATE, WRITE, 0x99, structs.MpState),
        (Ioctl.KVM_GET_VCPU_EVENTS, READ, 0x9F, structs.VcpuEvents),
        (Ioctl.KVM_SET_VCPU_EVENTS, WRITE, 0xA0, structs.VcpuEvents),
        (Ioctl.KVM_GET_DEBUGREGS, READ, 0xA1, structs.DebugRegs),
        (Ioctl.KVM_SET_DEBUGREGS, WRITE, 0xA2, structs.DebugRegs),
        (Ioctl.KVM_GET_XSAVE, READ, 0xA4, structs.Xsave),
        (Ioctl.KVM_SET_XSAVE, WRITE, 0xA5, structs.Xsave),
        (Ioctl.KVM_GET_XCRS, READ, 0xA6, structs.Xcrs),
        (Ioctl.KVM_SET_XCRS, WRITE, 0xA7, structs.Xcrs),
        (Ioctl.KVM_GET_XSAVE2, READ, 0xCF, structs.Xsave),
        (Ioctl.KVM_GET_LAPIC, READ, 0x8E, structs.Lapic),
        (Ioctl.KVM_SET_LAPIC, WRITE, 0x8F, structs.Lapic),
        (Ioctl.KVM_SET_DEVICE_ATTR, WRITE, 0xE1, structs.DeviceAttr),
        (Ioctl.KVM_GET_DEVICE_ATTR, WRITE, 0xE2, structs.DeviceAttr),  # so it is in kvm.h
        (Ioctl.KVM_HAS_DEVICE_ATTR, WRITE, 0xE3, structs.DeviceAttr),
        (Ioctl.KVM_CREATE_DEVICE, READ | WRITE, 0xE0, structs.CreateDevice),
        (Ioctl.KVM_ENABLE_CAP, WRITE, 0xA3, structs.EnableCap),
        (Ioctl.KVM_MEMORY_ENCRYPT_REG_REGION, READ, 0xBB, structs.EncRegion),
        (Ioctl.KVM_MEMORY_ENCRYPT_UNREG_REGION, READ, 0xBC, structs.EncRegion),
    ],
)
def test_numbers_agree_with_structures(
    ioctl: Ioctl, direction: int, nr: int, structure: type[ctypes.Structure]
) -> None:
    assert ioctl == number(direction, nr, ctypes.sizeof(structure))


def test_numbers_whose_size_is_not_their_structures() -> None:
    assert number(READ | WRITE, 0xBA, 8) == Ioctl.KVM_MEMORY_ENCRYPT_OP
    assert number(READ | WRITE, 0x05, 8) == Ioctl.KVM_GET_SUPPORTED_CPUID
    assert number(WRITE, 0x90, 8) == Ioctl.KVM_SET_CPUID2
    assert number(WRITE, 0x6A, 8) == Ioctl.KVM_SET_GSI_ROUTING
    assert number(READ | WRITE, 0x88, 8) == Ioctl.KVM_GET_MSRS
    assert number(WRITE, 0x89, 8) == Ioctl.KVM_SET_MSRS
    assert number(READ | WRITE, 0x02, 4) == Ioctl.KVM_GET_MSR_INDEX_LIST
    assert number(0, 0x60, 0) == Ioctl.KVM_CREATE_IRQCHIP
    assert number(READ | WRITE, 0, ctypes.sizeof(structs.IssueCmd), ord("S")) == Ioctl.SEV_ISSUE_CMD


@pytest.mark.parametrize(
    ("structure", "field", "offset"),
    [
        (structs.SevCmd, "error", 16),
        (structs.SevCmd, "sev_fd", 20),
        (structs.SevInit, "ghcb_version", 12),
        (structs.LaunchStartData, "session_uaddr", 24),
        (structs.AddressLength, "len", 8),
        (structs.GuestStatusData, "state", 8),
        (structs.DeviceAttr, "addr", 16),
        (structs.EnableCap, "args", 8),
        (structs.KvmRun, "exit_reason", 8),
        (structs.KvmRun, "io", 32),
        (structs.KvmRun, "valid_regs", 288),
        (structs.KvmRun, "regs", 304),
        (structs.Msrs, "entries", 8),
        (structs.MsrEntry, "data", 8),
        (structs.MsrList, "indices", 4),
        (structs.Regs, "rip", 128),
        (structs.Sregs, "cr0", 224),
        (structs.PlatformStatusData, "guest_count", 8),
        (structs.IssueCmd, "error", 12),
    ],
)
def test_offsets(structure: type[ctypes.Structure], field: str, offset: int) -> None:
    assert getattr(structure, field).offset == offset


def test_bytes_of_another_length_are_refused() -> None:
    assert structs.from_bytes(structs.MpState, b"\x03\0\0\0").mp_state == 3
    with pytest.raises(ValueError, match="MpState has 4 bytes"):
        structs.from_bytes(structs.MpState, b"\x03")


def test_an_error_names_the_call_the_errno_and_the_firmware() -> None:
    error = call.KernelError(5, "KVM_MEMORY_ENCRYPT_OP LAUNCH_START", firmware=7)
    assert (error.errno, error.number, error.firmware) == (5, 5, 7)
    assert "LAUNCH_START: EIO" in str(error) and "firmware status 7" in str(error)


def test_a_refused_call_is_measured() -> None:
    with call.timed() as watch, pytest.raises(call.KernelError, match="EBADF"):
        call.ioctl(-1, Ioctl.KVM_RUN)
    assert 0 < watch.began <= watch.ended


def test_a_measurement_spans_the_first_and_the_last_call() -> None:
    with call.timed() as watch:
        call.attempt(-1, Ioctl.KVM_RUN)
        first = watch.began
        with call.timed() as inner:
            call.attempt(-1, Ioctl.KVM_RUN)
        call.attempt(-1, Ioctl.KVM_RUN)
    assert watch.began == first and watch.ended > inner.ended


def test_exits_have_names() -> None:
    assert exit_name(8) == "KVM_EXIT_SHUTDOWN"
    assert exit_name(999) == "KVM_EXIT 999"


def test_a_descriptor_is_closed_once() -> None:
    fd = OwnedFd(os.memfd_create("x"))
    number = fd.number
    fd.close()
    fd.close()
    assert not fd.is_open
    with pytest.raises(InternalError):
        fd.fileno()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_a_stolen_descriptor_is_the_thiefs() -> None:
    with OwnedFd(os.memfd_create("x")) as fd:
        number = fd.steal()
    os.fstat(number)
    os.close(number)


def test_a_mapping_is_shared_and_has_bounds() -> None:
    with OwnedFd(os.memfd_create("x")) as fd:
        os.truncate(fd.number, 8192)
        one, other = Mapping(fd.number, 8192), Mapping(fd.number, 8192)
        one.write(4096, b"seen")
        assert other.read(4096, 4) == b"seen"
        with pytest.raises(InternalError):
            one.write(8190, b"four")
        with pytest.raises(InternalError):
            one.read(-1, 4)
        one.close()
        one.close()
        other.close()
        with pytest.raises(InternalError):
            one.read(0, 1)


def test_what_cannot_be_mapped_says_so() -> None:
    with pytest.raises(OSError, match="mmap"):
        Mapping(-1, 4096)
