# SPDX-License-Identifier: Apache-2.0
"""Things that have one owner: a file descriptor, a mapping of memory.

Neither closes itself when it is forgotten. The moment a VM's last reference goes is the moment its ASID is given back,
and that may not depend on when Python collects its garbage.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType
from typing import Self

from chaos.errors import InternalError

_libc = ctypes.CDLL(None, use_errno=True)
# mmap by hand: Python's own duplicates the descriptor, and the copy would keep a VM alive after its close.
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munmap.restype = ctypes.c_int
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.restype = ctypes.c_int
_MADV_REMOVE = 9
_MAP_FAILED = ctypes.c_void_p(-1).value


class OwnedFd:
    """A file descriptor that is closed once, by its owner."""

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        if number < 0:
            raise InternalError(f"{number} is no file descriptor")
        self._number: int | None = number

    @property
    def number(self) -> int:
        if self._number is None:
            raise InternalError("a file descriptor was used after it was closed or handed on")
        return self._number

    def fileno(self) -> int:
        return self.number

    @property
    def is_open(self) -> bool:
        return self._number is not None

    def steal(self) -> int:
        """Hand the descriptor on: the caller owns it now."""
        number = self.number
        self._number = None
        return number

    def close(self) -> None:
        """Close it, if it is still here."""
        if self._number is not None:
            os.close(self.steal())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Mapping:
    """`size` bytes of `fd`, shared and writable, at `address`. The descriptor stays its owner's."""

    __slots__ = ("address", "size")

    @classmethod
    def private(cls, size: int) -> Self:
        """Of nothing: fresh memory, zeroed when first touched. Raises OSError."""
        return cls(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, fd: int, size: int, flags: int = mmap.MAP_SHARED) -> None:
        """Raises OSError."""
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, size, protection, flags, fd, 0)
        if address is None or address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"mmap: {os.strerror(number)}")
        self.address: int | None = address
        self.size = size

    @property
    def start(self) -> int:
        if self.address is None:
            raise InternalError("memory was used after it was unmapped")
        return self.address

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self.size:
            raise InternalError(f"{len(data)} bytes at {offset} are outside of a mapping of {self.size}")
        ctypes.memmove(self.start + offset, data, len(data))

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise InternalError(f"{length} bytes at {offset} are outside of a mapping of {self.size}")
        return ctypes.string_at(self.start + offset, length)

    def give_up(self, offset: int, length: int) -> None:
        """Have the file lose these pages (MADV_REMOVE): they read as zeros from now on. Raises OSError."""
        if _libc.madvise(self.start + offset, length, _MADV_REMOVE):
            number = ctypes.get_errno()
            raise OSError(number, f"madvise: {os.strerror(number)}")

    def close_off(self, offset: int, length: int) -> None:
        """Have nobody read or write these pages any more (PROT_NONE). Raises OSError."""
        self._protect(offset, length, 0)

    def make_read_only(self) -> None:
        """Have nobody write any of it any more. Raises OSError."""
        self._protect(0, self.size, mmap.PROT_READ)

    def _protect(self, offset: int, length: int, protection: int) -> None:
        if _libc.mprotect(self.start + offset, length, protection):
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect: {os.strerror(number)}")

    def close(self) -> None:
        if self.address is not None:
            _libc.munmap(self.address, self.size)
            self.address = None
