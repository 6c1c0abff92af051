# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Self

from chaos.kvm.call import ioctl
from chaos.kvm.numbers import Ioctl
from chaos.kvm.structs import CPUID_ENTRIES, MSR_ENTRIES, Cpuid, MsrList
from chaos.kvm.vm import KvmVm
from chaos.linux.fd import OwnedFd

API_VERSION = 12


class System:
    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd
        self._vcpu_area = 0
        self._cpuid: Cpuid | None = None
        self._msrs: tuple[int, ...] | None = None

    @classmethod
    def open(cls, path: Path = Path("/dev/kvm")) -> Self:
        """Raises OSError."""
        return cls(OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)))

    def api_version(self) -> int:
        return ioctl(self.fd.number, Ioctl.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        return ioctl(self.fd.number, Ioctl.KVM_CHECK_EXTENSION, cap)

    def create_vm(self, vm_type: int = 0) -> KvmVm:
        """A VM without anything in it. Raises `KernelError`."""
        fd = OwnedFd(ioctl(self.fd.number, Ioctl.KVM_CREATE_VM, vm_type))
        return KvmVm(fd, vcpu_area=self.vcpu_area())

    def vcpu_area(self) -> int:
        """Size in bytes of what a vCPU shares with its VMM."""
        if not self._vcpu_area:
            self._vcpu_area = ioctl(self.fd.number, Ioctl.KVM_GET_VCPU_MMAP_SIZE)
        return self._vcpu_area

    def supported_cpuid(self) -> Cpuid:
        if self._cpuid is None:
            cpuid = Cpuid(nent=CPUID_ENTRIES)
            ioctl(self.fd.number, Ioctl.KVM_GET_SUPPORTED_CPUID, ctypes.byref(cpuid))
            self._cpuid = cpuid
        return self._cpuid

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that a VMM has to carry when it carries a vCPU."""
        if self._msrs is None:
            found = MsrList(nmsrs=MSR_ENTRIES)
            ioctl(self.fd.number, Ioctl.KVM_GET_MSR_INDEX_LIST, ctypes.byref(found))
            self._msrs = tuple(found.indices[: found.nmsrs])
        return self._msrs

    def close(self) -> None:
        self.fd.close()
