# SPDX-License-Identifier: Apache-2.0
"""The memory of the machine as the PSP sees it: system-physical addresses in, bytes out.

Below 4 GiB an address is an offset into the file that backs the machine's RAM. A machine with more RAM than fits
under the PCI hole (QEMU's q35 leaves 2 GiB there once it has 2.75 GiB or more) has the rest from 4 GiB upwards, and in
the file that rest follows directly.
"""

from __future__ import annotations

import mmap
from typing import Final, Protocol

FOUR_GIB: Final = 1 << 32


class BadAddress(Exception):
    """A range that is not wholly memory. The firmware answers it with INVALID_ADDRESS."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"{length} bytes at {address:#x} are not in memory")
        self.address = address
        self.length = length


class Memory(Protocol):
    """What the firmware needs of the machine's memory. Both raise BadAddress, and then have changed nothing."""

    def read(self, address: int, length: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...


class Ram:
    """Memory over one writable buffer: an mmap of the file behind the machine's RAM, or a bytearray in tests."""

    def __init__(self, buffer: mmap.mmap | bytearray, *, below_4g: int | None = None) -> None:
        """`below_4g` is how many bytes lie under 4 GiB; the rest begins at 4 GiB. None: all of it lies under."""
        self._view = memoryview(buffer)
        self._size = len(self._view)
        self._below = self._size if below_4g is None else min(below_4g, self._size)

    def offset(self, address: int, length: int) -> int:
        """Where in the buffer `length` bytes at `address` are."""
        end = address + length
        if length >= 0 and end <= self._below:
            return address
        if length >= 0 and address >= FOUR_GIB and end <= FOUR_GIB + self._size - self._below:
            return address - FOUR_GIB + self._below
        raise BadAddress(address, length)

    def read(self, address: int, length: int) -> bytes:
        start = self.offset(address, length)
        return bytes(self._view[start : start + length])

    def write(self, address: int, data: bytes) -> None:
        start = self.offset(address, len(data))
        self._view[start : start + len(data)] = data
