# SPDX-License-Identifier: Apache-2.0
"""A vCPU: its descriptor and the page it shares with its VMM."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping as Pairs
from collections.abc import Sequence
from typing import TypeVar

from chaos.kvm.call import attempt, close, ioctl
from chaos.kvm.numbers import Ioctl
from chaos.kvm.structs import (
    Cpuid,
    DebugRegs,
    DeviceAttr,
    Fpu,
    KvmRun,
    Lapic,
    MpState,
    Msrs,
    Regs,
    Sregs,
    VcpuEvents,
    Xcrs,
    Xsave,
)
from chaos.linux.fd import Mapping, OwnedFd

S = TypeVar("S", bound=ctypes.Structure)

# Registers of the local APIC, by their place in its page.
APIC_ENABLED_AT, APIC_ENABLED = 0xF1, 0x01  # bit 8 of the spurious vector's register
APIC_ISR, APIC_IRR = 0x100, 0x200


class KvmVcpu:
    def __init__(self, fd: OwnedFd, area: Mapping) -> None:
        self.fd = fd
        self._area = area
        self._run = KvmRun.from_address(area.start)

    @property
    def shared(self) -> KvmRun:
        """kvm_run. Not to be kept beyond `close`. Raises `InternalError` after it."""
        assert self._area.start
        return self._run

    def run(self) -> int:
        """Enter the guest until it leaves to the VMM: 0, or the errno (EINTR: a signal or `immediate_exit`)."""
        return attempt(self.fd.number, Ioctl.KVM_RUN)[1]

    def set_cpuid(self, cpuid: Cpuid) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_CPUID2, ctypes.byref(cpuid))

    def regs(self) -> Regs:
        return self._get(Ioctl.KVM_GET_REGS, Regs)

    def set_regs(self, regs: Regs) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_REGS, ctypes.byref(regs))

    def sregs(self) -> Sregs:
        return self._get(Ioctl.KVM_GET_SREGS, Sregs)

    def set_sregs(self, sregs: Sregs) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_SREGS, ctypes.byref(sregs))

    def fpu(self) -> Fpu:
        return self._get(Ioctl.KVM_GET_FPU, Fpu)

    def set_fpu(self, fpu: Fpu) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_FPU, ctypes.byref(fpu))

    def mp_state(self) -> MpState:
        return self._get(Ioctl.KVM_GET_MP_STATE, MpState)

    def set_mp_state(self, state: MpState) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_MP_STATE, ctypes.byref(state))

    def events(self) -> VcpuEvents:
        return self._get(Ioctl.KVM_GET_VCPU_EVENTS, VcpuEvents)

    def set_events(self, events: VcpuEvents) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_VCPU_EVENTS, ctypes.byref(events))

    def debug_regs(self) -> DebugRegs:
        return self._get(Ioctl.KVM_GET_DEBUGREGS, DebugRegs)

    def set_debug_regs(self, registers: DebugRegs) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_DEBUGREGS, ctypes.byref(registers))

    def xsave(self, size: int = 0) -> bytes:
        """The extended state. `size` is what KVM_CAP_XSAVE2 says, 0 where there is no such thing."""
        length = max(size, ctypes.sizeof(Xsave))
        area = ctypes.create_string_buffer(length)
        number = Ioctl.KVM_GET_XSAVE2 if length > ctypes.sizeof(Xsave) else Ioctl.KVM_GET_XSAVE
        ioctl(self.fd.number, number, ctypes.byref(area))
        return area.raw

    def set_xsave(self, area: bytes) -> None:
        """`area` is as long as `xsave` gave it: the kernel reads as much as it would have written."""
        ioctl(self.fd.number, Ioctl.KVM_SET_XSAVE, ctypes.byref(ctypes.create_string_buffer(area, len(area))))

    def xcrs(self) -> Xcrs:
        return self._get(Ioctl.KVM_GET_XCRS, Xcrs)

    def set_xcrs(self, registers: Xcrs) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_XCRS, ctypes.byref(registers))

    def lapic(self) -> Lapic:
        return self._get(Ioctl.KVM_GET_LAPIC, Lapic)

    def set_lapic(self, lapic: Lapic) -> None:
        ioctl(self.fd.number, Ioctl.KVM_SET_LAPIC, ctypes.byref(lapic))

    def enable_apic(self) -> None:
        """Have the local APIC take interrupts, which after a reset it does not."""
        lapic = self.lapic()
        if not lapic.bytes[APIC_ENABLED_AT] & APIC_ENABLED:
            lapic.bytes[APIC_ENABLED_AT] |= APIC_ENABLED
            self.set_lapic(lapic)

    def requested(self) -> tuple[int, ...]:
        """The vectors that the local APIC has been sent and the guest has not done with: requested, or in service."""
        page = bytes(self.lapic().bytes)
        return tuple(vector for vector in range(256) if any(_bit(page, at, vector) for at in (APIC_ISR, APIC_IRR)))

    def tsc_offset(self) -> int:
        """How far the guest's time-stamp counter is ahead of the host's, in 64 bits without a sign."""
        value = ctypes.c_uint64()
        self._tsc_offset(Ioctl.KVM_GET_DEVICE_ATTR, value)
        return value.value

    def set_tsc_offset(self, offset: int) -> None:
        self._tsc_offset(Ioctl.KVM_SET_DEVICE_ATTR, ctypes.c_uint64(offset))

    def _tsc_offset(self, number: Ioctl, value: ctypes.c_uint64) -> None:
        """KVM_VCPU_TSC_OFFSET of KVM_VCPU_TSC_CTRL, which are 0 both."""
        ioctl(self.fd.number, number, ctypes.byref(DeviceAttr(addr=ctypes.addressof(value))))

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Those of the MSRs that can be read. The call stops at the first that cannot, and is made again behind it."""
        found: dict[int, int] = {}
        left = list(indices)
        while left:
            request = Msrs(nmsrs=len(left))
            for entry, index in zip(request.entries, left, strict=False):
                entry.index = index
            count = ioctl(self.fd.number, Ioctl.KVM_GET_MSRS, ctypes.byref(request))
            found |= {int(entry.index): int(entry.data) for entry in request.entries[:count]}
            left = left[count + 1 :]
        return found

    def set_msrs(self, values: Pairs[int, int]) -> tuple[int, ...]:
        """Set them; those that could not be."""
        refused: list[int] = []
        left = list(values.items())
        while left:
            request = Msrs(nmsrs=len(left))
            for entry, (index, value) in zip(request.entries, left, strict=False):
                entry.index, entry.data = index, value
            count = ioctl(self.fd.number, Ioctl.KVM_SET_MSRS, ctypes.byref(request))
            refused += [index for index, _ in left[count : count + 1]]
            left = left[count + 1 :]
        return tuple(refused)

    def _get(self, number: Ioctl, structure: type[S]) -> S:
        value = structure()
        ioctl(self.fd.number, number, ctypes.byref(value))
        return value

    def close(self) -> None:
        """Close the descriptor and unmap the page: the mapping alone would keep the VM alive."""
        self._area.close()
        close(self.fd)


def _bit(page: bytes, at: int, vector: int) -> bool:
    """Of a register of 256 bits: 32 of them each 16 bytes."""
    return bool(page[at + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1)
