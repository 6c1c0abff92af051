# SPDX-License-Identifier: Apache-2.0
"""A virtual machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from chaos.kvm.call import close, ioctl
from chaos.kvm.numbers import ROUTE_TO_MSI, Cap, DeviceType, Ioctl, IoeventfdFlag, IrqfdFlag, Sync
from chaos.kvm.structs import CreateDevice, EnableCap, EncRegion, Ioeventfd, Irqfd, IrqRoute, IrqRouting, MemoryRegion
from chaos.kvm.vcpu import KvmVcpu
from chaos.linux.fd import Mapping, OwnedFd


def enabling(cap: Cap, argument: int, flags: int) -> EnableCap:
    """What KVM_ENABLE_CAP is given for a capability that takes a number."""
    request = EnableCap(cap=cap, flags=flags)
    request.args[0] = argument % (1 << 64)
    return request


FIRST_APIC = 0xFEE0_0000
"""Where a message is written to for the local APIC of id 0."""


class KvmVm:
    def __init__(self, fd: OwnedFd, *, vcpu_area: int) -> None:
        self.fd = fd
        self._vcpu_area = vcpu_area

    def check_extension(self, cap: int) -> int:
        return ioctl(self.fd.number, Ioctl.KVM_CHECK_EXTENSION, cap)

    def set_memory(self, slot: int, guest_address: int, memory: Mapping) -> None:
        """Show `memory` to the guest at `guest_address`."""
        region = MemoryRegion(
            slot=slot, guest_phys_addr=guest_address, memory_size=memory.size, userspace_addr=memory.start
        )
        ioctl(self.fd.number, Ioctl.KVM_SET_USER_MEMORY_REGION, ctypes.byref(region))

    def remove_memory(self, slot: int) -> None:
        """Take from the guest what was shown to it in this slot. Raises `KernelError`: EINVAL if there is none."""
        ioctl(self.fd.number, Ioctl.KVM_SET_USER_MEMORY_REGION, ctypes.byref(MemoryRegion(slot=slot)))

    def create_irqchip(self) -> None:
        """Interrupt controllers in the kernel: before the first vCPU, each of which gets a local APIC."""
        ioctl(self.fd.number, Ioctl.KVM_CREATE_IRQCHIP)

    def route_to_first(self, vectors: Sequence[int]) -> None:
        """Have each of these GSIs raise the vector of its number at the APIC of id 0, and no other raise anything."""
        routing = IrqRouting(nr=len(vectors))
        for entry, vector in zip(routing.entries, vectors, strict=False):
            entry.gsi, entry.type, entry.address_lo, entry.data = vector, ROUTE_TO_MSI, FIRST_APIC, vector
        length = IrqRouting.entries.offset + ctypes.sizeof(IrqRoute) * len(vectors)
        head = ctypes.create_string_buffer(bytes(routing)[:length], length)
        ioctl(self.fd.number, Ioctl.KVM_SET_GSI_ROUTING, ctypes.byref(head))

    def irqfd(self, eventfd: int, gsi: int, *, assign: bool) -> None:
        """Have the eventfd raise the GSI from now on, or no more. Raises `KernelError`: EBUSY if it does already."""
        flags = 0 if assign else IrqfdFlag.DEASSIGN
        ioctl(self.fd.number, Ioctl.KVM_IRQFD, ctypes.byref(Irqfd(fd=eventfd, gsi=gsi, flags=flags)))

    def ioeventfd(self, eventfd: int, port: int, *, assign: bool) -> None:
        """Have the eventfd signalled when the guest writes a byte to the port, or no more. Raises `KernelError`: EEXIST
        if one is already, ENOENT if there is none to take away."""
        flags = IoeventfdFlag.PIO | (0 if assign else IoeventfdFlag.DEASSIGN)
        request = Ioeventfd(addr=port, len=1, fd=eventfd, flags=flags)
        ioctl(self.fd.number, Ioctl.KVM_IOEVENTFD, ctypes.byref(request))

    def create_vcpu(self, number: int) -> KvmVcpu:
        """Raises `KernelError`, or OSError if its page cannot be mapped."""
        fd = OwnedFd(ioctl(self.fd.number, Ioctl.KVM_CREATE_VCPU, number))
        try:
            vcpu = KvmVcpu(fd, Mapping(fd.number, self._vcpu_area))
        except OSError:
            fd.close()
            raise
        # None of a VM whose registers are encrypted: there KVM_RUN refuses to.
        vcpu.shared.valid_regs = self.check_extension(Cap.SYNC_REGS) & (Sync.REGS | Sync.SREGS)
        return vcpu

    def create_device(self) -> OwnedFd:
        """The device that every VM may have one of. Raises `KernelError`: ENODEV where the kernel has none."""
        request = CreateDevice(type=DeviceType.VFIO)
        ioctl(self.fd.number, Ioctl.KVM_CREATE_DEVICE, ctypes.byref(request))
        return OwnedFd(request.fd)

    def stats_fd(self) -> OwnedFd:
        """A descriptor to read KVM's statistics of the VM from."""
        return OwnedFd(ioctl(self.fd.number, Ioctl.KVM_GET_STATS_FD))

    def move_context_from(self, source: int, *, flags: int = 0) -> None:
        """Take over the encryption context of the VM whose descriptor is `source`. This VM is the destination.

        Raises `KernelError` with the errnos of `sev_vm_move_enc_context_from` (arch/x86/kvm/svm/sev.c).
        """
        self._enable(Cap.MOVE_ENC_CONTEXT_FROM, source, flags)

    def copy_context_from(self, owner: int, *, flags: int = 0) -> None:
        """Become a mirror of the VM whose descriptor is `owner`."""
        self._enable(Cap.COPY_ENC_CONTEXT_FROM, owner, flags)

    def _enable(self, cap: Cap, argument: int, flags: int) -> None:
        request = enabling(cap, argument, flags)
        ioctl(self.fd.number, Ioctl.KVM_ENABLE_CAP, ctypes.byref(request), call=f"KVM_ENABLE_CAP {cap.name}")

    def register_region(self, address: int, size: int) -> None:
        """Pin guest memory, given by its place in the VMM, as encrypted."""
        region = EncRegion(addr=address, size=size)
        ioctl(self.fd.number, Ioctl.KVM_MEMORY_ENCRYPT_REG_REGION, ctypes.byref(region))

    def unregister_region(self, address: int, size: int) -> None:
        """The reverse, with the same numbers."""
        region = EncRegion(addr=address, size=size)
        ioctl(self.fd.number, Ioctl.KVM_MEMORY_ENCRYPT_UNREG_REGION, ctypes.byref(region))

    def close(self) -> None:
        close(self.fd)
