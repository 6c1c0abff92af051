# SPDX-License-Identifier: Apache-2.0
"""The encryption context of a VM, and the platform that holds all of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Self

from chaos.kvm.call import KernelError, attempt
from chaos.kvm.numbers import FIRMWARE_INVALID_LEN, PAGE, Ioctl, PlatformCommand, SevCommand
from chaos.kvm.structs import (
    AddressLength,
    DebugData,
    GuestStatusData,
    IssueCmd,
    LaunchStartData,
    PlatformStatusData,
    SevCmd,
    SevInit,
)
from chaos.kvm.userfault import ArgumentPage
from chaos.linux.fd import Mapping, OwnedFd

DEVICE = Path("/dev/sev")
BLOB_MAX = 0x4000  # SEV_FW_BLOB_MAX_SIZE of include/linux/psp-sev.h
_NAMES = {int(command): command.name for command in SevCommand}


class Sev:
    """What can be asked of the encryption context behind a VM's descriptor, which stays its owner's.

    `sev_fd` is /dev/sev, through which the firmware is reached. Every method raises `KernelError`; its `firmware` is
    the PSP's status. `page`, if there is one, is where the next command that has arguments has them.
    """

    def __init__(self, vm_fd: int, sev_fd: int, page: ArgumentPage | None = None) -> None:
        self._vm_fd = vm_fd
        self._sev_fd = sev_fd
        self._page = page

    def init(self) -> None:
        """Take an ASID for a SEV guest; charges the caller's misc cgroup. Before the first vCPU."""
        self._command(SevCommand.INIT)

    def es_init(self) -> None:
        """The same for a SEV-ES guest."""
        self._command(SevCommand.ES_INIT)

    def init2(self, *, flags: int = 0, features: int = 0, ghcb: int = 0) -> None:
        """The same for a VM whose type says what guest it is for (`VmType`), which the other two refuse.

        `features` are those of its VMSAs, `ghcb` the version of the GHCB protocol, 0 for the kernel's own choice.
        """
        self._command(SevCommand.INIT2, SevInit(vmsa_features=features, flags=flags, ghcb_version=ghcb))

    def launch_start(self, policy: int, *, read_only: bool = False) -> int:
        """Create the context in the firmware and bind it to the ASID: its handle, which cannot be told, 0, if the
        arguments are to lie where nobody can write."""
        start = LaunchStartData(policy=policy)
        if read_only:
            with contextlib.closing(Mapping.private(PAGE)) as page:
                page.write(0, bytes(start))
                page.make_read_only()
                self._issue(SevCommand.LAUNCH_START, page.start)
        else:
            self._command(SevCommand.LAUNCH_START, start)
        return int(start.handle)

    def launch_update_data(self, address: int, length: int) -> None:
        """Encrypt memory in place; both numbers are multiples of 16."""
        self._command(SevCommand.LAUNCH_UPDATE_DATA, AddressLength(uaddr=address, len=length))

    def launch_update_vmsa(self) -> None:
        """Encrypt the registers of every vCPU."""
        self._command(SevCommand.LAUNCH_UPDATE_VMSA)

    def launch_measure(self) -> bytes:
        measure = AddressLength()
        try:  # the first call is for the length, which it says while it fails
            self._command(SevCommand.LAUNCH_MEASURE, measure)
        except KernelError as error:
            if error.firmware != FIRMWARE_INVALID_LEN or not measure.len:
                raise
        blob = ctypes.create_string_buffer(min(measure.len, BLOB_MAX))  # KVM refuses to write more
        measure.uaddr = ctypes.addressof(blob)
        self._command(SevCommand.LAUNCH_MEASURE, measure)
        return blob.raw[: measure.len]

    def launch_finish(self) -> None:
        self._command(SevCommand.LAUNCH_FINISH)

    def guest_status(self) -> GuestStatusData:
        status = GuestStatusData()
        self._command(SevCommand.GUEST_STATUS, status)
        return status

    def status_request(self) -> tuple[SevCmd, GuestStatusData]:
        """What KVM_MEMORY_ENCRYPT_OP is given to ask the same, and where the answer goes: both must live as long as it
        is asked."""
        status = GuestStatusData()
        return SevCmd(id=SevCommand.GUEST_STATUS, data=ctypes.addressof(status), sev_fd=self._sev_fd), status

    def debug_decrypt(self, source: int, destination: int, length: int) -> None:
        """Decrypt so many bytes of the guest's memory into that of the caller; both are addresses of the caller's."""
        self._command(SevCommand.DBG_DECRYPT, DebugData(src_uaddr=source, dst_uaddr=destination, len=length))

    def debug_encrypt(self, source: int, destination: int, length: int) -> None:
        """Encrypt so many bytes of the caller's memory into that of the guest."""
        self._command(SevCommand.DBG_ENCRYPT, DebugData(src_uaddr=source, dst_uaddr=destination, len=length))

    def command(self, number: int) -> None:
        """Any command, known or not, without data."""
        self._command(number)

    def _command(self, command: int, data: ctypes.Structure | None = None) -> None:
        page, self._page = (self._page, None) if data is not None else (None, self._page)
        if page is not None and data is not None:
            with page.lend(data) as address:
                self._issue(command, address)
        else:
            self._issue(command, ctypes.addressof(data) if data is not None else 0)

    def _issue(self, command: int, address: int) -> None:
        request = SevCmd(id=command, data=address, sev_fd=self._sev_fd)
        error = attempt(self._vm_fd, Ioctl.KVM_MEMORY_ENCRYPT_OP, ctypes.byref(request))[1]
        if error:
            name = f"KVM_MEMORY_ENCRYPT_OP {_NAMES.get(command, command)}"
            raise KernelError(error, name, firmware=int(request.error))


def enabled(vm_fd: int) -> bool:
    """Whether KVM can do SEV here at all. The capabilities of the move and the mirror say nothing about that."""
    return attempt(vm_fd, Ioctl.KVM_MEMORY_ENCRYPT_OP, None)[1] == 0


class Platform:
    """/dev/sev."""

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd

    @classmethod
    def open(cls, path: Path = DEVICE) -> Self:
        """Raises OSError."""
        return cls(OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)))

    def status(self) -> PlatformStatusData:
        """Raises `KernelError`. `guest_count` is how many contexts the firmware knows."""
        status = PlatformStatusData()
        self._issue(PlatformCommand.PLATFORM_STATUS, ctypes.addressof(status))
        return status

    def factory_reset(self) -> None:
        """Shut the platform down and have it forget whose it is. The next guest initialises it anew.

        Raises `KernelError`: EBUSY while it has guests.
        """
        self._issue(PlatformCommand.FACTORY_RESET)

    def command(self, command: PlatformCommand, data: int) -> None:
        """Any command, with its structure at this address. Raises `KernelError`."""
        self._issue(command, data)

    def _issue(self, command: PlatformCommand, data: int = 0) -> None:
        request = IssueCmd(cmd=command, data=data)
        error = attempt(self.fd.number, Ioctl.SEV_ISSUE_CMD, ctypes.byref(request))[1]
        if error:
            raise KernelError(error, f"SEV_ISSUE_CMD {command.name}", firmware=int(request.error))

    def close(self) -> None:
        self.fd.close()

    def reopen(self, path: Path = DEVICE) -> None:
        """After `close`. Raises OSError."""
        self.fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
