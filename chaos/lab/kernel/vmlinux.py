# SPDX-License-Identifier: Apache-2.0
"""The kernel out of its compressed image, for QEMU to start by the PVH entry.

A bzImage unpacks itself, which under emulation takes from half a second (zstd) to three (xz). Unpacked once outside,
the same ELF file is loaded as it is. Where that cannot be done, the bzImage boots as well, only later.

The image's layout is in the kernel's Documentation/arch/x86/boot.rst: `setup_sects` at 0x1f1, and from protocol 2.08
on `payload_offset` at 0x248 and `payload_length` at 0x24c.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from chaos.cache import entries
from chaos.cache.wholefile import whole_file
from chaos.lab.kernel.find import LabKernel

_NOTE_TYPE_PVH = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_DECOMPRESS_DEADLINE = 60.0


def bootable(kernel: LabKernel) -> Path:
    """What to give QEMU as the kernel: the unpacked one if it can be had, else the image as it is."""
    path = entries.entry_path("images", f"vmlinux-{kernel.identity[:16]}")
    if path.exists():
        return path
    unpacked = unpack(kernel.image.read_bytes())
    if unpacked is None or not has_pvh_entry(unpacked):
        return kernel.image
    with whole_file("images", path.name) as out:
        out.write(unpacked)
    return path


def unpack(image: bytes) -> bytes | None:
    """The ELF file inside a bzImage, None if it is packed in a way not known here."""
    if image[0x202:0x206] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    for magic, decompress in _DECOMPRESSORS.items():
        if payload.startswith(magic):
            try:
                data = decompress(payload)
            except (OSError, EOFError, lzma.LZMAError, subprocess.SubprocessError):
                return None
            return data if data.startswith(b"\x7fELF") else None
    return None


# The last four bytes of a payload are its size, not part of the compressed stream.
def _xz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)


def _gzip(payload: bytes) -> bytes:
    return gzip.decompress(payload[:-4])


def _zstd(payload: bytes) -> bytes:
    command = ["zstd", "-dcq"]
    done = subprocess.run(command, input=payload[:-4], capture_output=True, timeout=_DECOMPRESS_DEADLINE, check=True)
    return done.stdout


_DECOMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\xfd7zXZ\0": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\x1f\x8b": _gzip,
}


def has_pvh_entry(elf: bytes) -> bool:
    """Whether an x86-64 ELF file carries the note that QEMU looks for."""
    offset, size, count = struct.unpack_from("<Q", elf, 0x20)[0], *struct.unpack_from("<HH", elf, 0x36)
    for index in range(count):
        kind, start, length = _segment(elf, offset + index * size)
        if kind == 4 and _note_in(elf[start : start + length]):  # PT_NOTE
            return True
    return False


def _segment(elf: bytes, at: int) -> tuple[int, int, int]:
    kind, _, start, _, _, length = struct.unpack_from("<IIQQQQ", elf, at)
    return kind, start, length


def _note_in(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name, size, kind = struct.unpack_from("<III", notes, position)
        if kind == _NOTE_TYPE_PVH and notes[position + 12 : position + 16] == b"Xen\0":
            return True
        position += 12 + -(-name // 4) * 4 + -(-size // 4) * 4
    return False
