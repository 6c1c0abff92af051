# SPDX-License-Identifier: Apache-2.0
"""Writing cpio archives in the "newc" format, which is what the kernel unpacks into its first root file system.

The standard library has no cpio and `cpio(1)` wants root for device nodes, hence these few lines. Archives may be
laid end to end: the kernel unpacks one after the other, later entries replacing earlier ones. The format is
described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_ALIGNMENT = 512  # of a whole archive; the format asks for 4, a block keeps hex dumps readable


class CpioWriter:
    """Appends entries to `out`; parents of an entry are made as they are needed. Call `close` for the trailer."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._made: set[PurePosixPath] = {PurePosixPath("/"), PurePosixPath(".")}
        self._written = 0

    def add_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        self._entry(path, stat.S_IFREG | mode, data)

    def add_link(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def add_directory(self, path: str, *, mode: int = 0o755) -> None:
        self._parents(PurePosixPath(path))
        if PurePosixPath(path) not in self._made:
            self._made.add(PurePosixPath(path))
            self._header(path, stat.S_IFDIR | mode, b"")

    def add_device(self, path: str, major: int, minor: int, *, mode: int = 0o600) -> None:
        """A character device node."""
        self._parents(PurePosixPath(path))
        self._header(path, stat.S_IFCHR | mode, b"", device=(major, minor))

    def add_path(self, path: str, source: Path) -> None:
        """The contents and the executable bit of `source`, symbolic links followed."""
        mode = 0o755 if source.stat().st_mode & 0o111 else 0o644
        self.add_file(path, source.read_bytes(), mode=mode)

    def close(self) -> None:
        self._header("TRAILER!!!", 0, b"")
        self._write(b"\0" * (-self._written % _ALIGNMENT))

    def _entry(self, path: str, mode: int, data: bytes) -> None:
        self._parents(PurePosixPath(path))
        self._header(path, mode, data)

    def _parents(self, path: PurePosixPath) -> None:
        for parent in reversed(path.parents):
            if parent not in self._made:
                self._made.add(parent)
                self._header(str(parent), stat.S_IFDIR | 0o755, b"")

    def _header(self, path: str, mode: int, data: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/").encode() + b"\0"
        self._inode += 1
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self._write(b"070701" + b"".join(b"%08x" % field for field in fields))
        self._write(name)
        self._pad()
        self._write(data)
        self._pad()

    def _pad(self) -> None:
        self._write(b"\0" * (-self._written % 4))

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._written += len(data)
