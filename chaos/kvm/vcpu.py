# SPDX-License-Identifier: Apache-2.0
"""A vCPU: its descriptor and the page it shares with its VMM."""

from __future__ import annotations

import ctypes
import errno
from typing import TypeVar

from chaos.kvm.call import KernelError, attempt, ioctl
from chaos.kvm.fd import Mapping, OwnedFd
from chaos.kvm.numbers import Ioctl
from chaos.kvm.structs import Cpuid, Fpu, MpState, Regs, Run, Sregs, VcpuEvents

S = TypeVar("S", bound=ctypes.Structure)


class Vcpu:
    def __init__(self, fd: OwnedFd, area: Mapping) -> None:
        self.fd = fd
        self._area = area
        self._run = Run.from_address(area.start)

    @property
    def shared(self) -> Run:
        """kvm_run. Not to be kept beyond `close`."""
        return self._run

    def data(self, offset: int, length: int) -> bytes:
        """Bytes of the shared area, where KVM_EXIT_IO puts what the guest wrote."""
        return self._area.read(offset, length)

    def run(self) -> int:
        """Enter the guest until it leaves to the VMM: 0, or the errno (EINTR: a signal or `immediate_exit`)."""
        return attempt(self.fd.number, Ioctl.KVM_RUN)[1]

    def complete(self) -> None:
        """Finish the instruction the guest left with, without entering it; before this its registers are not whole.

        Raises `KernelError` if the kernel says anything but EINTR, which is how it says "done".
        """
        self._run.immediate_exit = 1
        try:
            error = self.run()
        finally:
            self._run.immediate_exit = 0
        if error not in (0, errno.EINTR):
            raise KernelError(error, "KVM_RUN")

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

    def _get(self, number: Ioctl, structure: type[S]) -> S:
        value = structure()
        ioctl(self.fd.number, number, ctypes.byref(value))
        return value

    def close(self) -> None:
        """Close the descriptor and unmap the page: the mapping alone would keep the VM alive."""
        self._area.close()
        self.fd.close()
