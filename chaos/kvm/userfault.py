# SPDX-License-Identifier: Apache-2.0
"""userfaultfd: a page of memory that is not there until somebody puts it there.

Whoever touches it before that sleeps, the kernel too when it copies from or to it for a system call. That wants the
whole of userfaultfd: CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd set to 1. What everybody may have
(UFFD_USER_MODE_ONLY) lets no fault of the kernel's wait; it would fail with EFAULT instead.

Numbers and structures are those of linux/userfaultfd.h, x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from ctypes import c_int64, c_uint64
from errno import ENOSYS, EPERM
from typing import Final

from chaos.linux.fd import Mapping, OwnedFd

SIZE: Final = mmap.PAGESIZE

_SYS_USERFAULTFD: Final = 323
_API: Final = 0xAA
_MODE_MISSING: Final = 1
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_COPY: Final = 0xC028AA03

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.ioctl.restype = ctypes.c_int

_LACKS = {
    EPERM: "become root, or set vm.unprivileged_userfaultfd to 1",
    ENOSYS: "use a kernel with CONFIG_USERFAULTFD",
}


class _Api(ctypes.Structure):
    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class _Register(ctypes.Structure):
    _fields_ = [("start", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("ioctls", c_uint64)]


class _Copy(ctypes.Structure):
    _fields_ = [("dst", c_uint64), ("src", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("copy", c_int64)]


def lacking() -> tuple[str, str] | None:
    """Why there can be no such page here, and what would help; None if there can."""
    try:
        _open().close()
    except OSError as error:
        return f"userfaultfd: {os.strerror(error.errno or 0)}", _LACKS.get(error.errno or 0, "")
    return None


class MissingPage:
    """A page of this process that nobody gets past until it is put there, its owner no more than the kernel."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._fd = _open()
        self._memory: Mapping | None = None
        self.there = False
        try:
            self._memory = Mapping.private(SIZE)
            self._register(self._memory)
        except BaseException:
            self.close()
            raise

    def _register(self, memory: Mapping) -> None:
        self._ioctl(_UFFDIO_API, _Api(api=_API))
        self._ioctl(_UFFDIO_REGISTER, _Register(start=memory.start, len=SIZE, mode=_MODE_MISSING))

    @property
    def address(self) -> int:
        assert self._memory is not None
        return self._memory.start

    def put(self, content: bytes) -> None:
        """Put the page there, and let everybody go on who waits for it. Once is enough; later content is not taken."""
        source = ctypes.create_string_buffer(content, SIZE)
        with contextlib.suppress(FileExistsError):
            self._ioctl(_UFFDIO_COPY, _Copy(dst=self.address, src=ctypes.addressof(source), len=SIZE))
        self.there = True

    def read(self, length: int) -> bytes:
        """Of the page once it is there."""
        assert self.there and self._memory is not None
        return self._memory.read(0, length)

    def close(self) -> None:
        """Nobody may be waiting for it any more: they would find no memory at all."""
        self._fd.close()
        if self._memory is not None:
            self._memory.close()

    def _ioctl(self, number: int, argument: ctypes.Structure) -> None:
        if _libc.ioctl(self._fd.number, number, ctypes.byref(argument)) < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"userfaultfd: {os.strerror(error)}")


class ArgumentPage:
    """A page that is not there, for the arguments of one command.

    KVM reads the command itself (`struct kvm_sev_cmd`) before it takes the VM's lock, and what that points to after:
    so a command whose arguments are not there waits with the lock held (sev_mem_enc_ioctl, in 6.1 as in 6.12).
    LAUNCH_START, LAUNCH_UPDATE_DATA, LAUNCH_MEASURE and INIT2 wait before they have done anything, GUEST_STATUS when it
    has the firmware's answer and is to hand it over. The others have no arguments.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._page = MissingPage()
        self._arguments = b""
        self.used = False

    @contextlib.contextmanager
    def lend(self, data: ctypes.Structure) -> Iterator[int]:
        """The address that the command is to be given; afterwards `data` is what the kernel made of it."""
        self.used = True
        self._arguments = bytes(data)
        try:
            yield self._page.address
        finally:
            self.release()  # it may have been refused before it came here
            answer = self._page.read(len(self._arguments))
            ctypes.memmove(ctypes.addressof(data), answer, len(answer))
            self._page.close()

    def release(self) -> None:
        """Put the page there: whoever waits for it goes on. Raises OSError."""
        if not self._page.there:
            self._page.put(self._arguments)

    def discard(self) -> None:
        """One that no command has come to."""
        self._page.close()


def _open() -> OwnedFd:
    fd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"userfaultfd: {os.strerror(error)}")
    return OwnedFd(fd)
