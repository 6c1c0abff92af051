# SPDX-License-Identifier: Apache-2.0
"""Files that appear in the cache whole or not at all.

They are written without a name (O_TMPFILE) and linked when complete: a writer that is killed leaves nothing that
anybody would have to find and remove.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from chaos.cache import entries
from chaos.errors import HostLacks, NoSpace


@contextlib.contextmanager
def whole_file(kind: str, name: str) -> Iterator[BinaryIO]:
    """A file to write and read; it gets its name in the cache when the block ends well.

    Whoever comes second with the same name wins nothing: names carry the digest of the contents' recipe, so the
    first one is as good. Raises `NoSpace` for a full disk, `HostLacks` if the file system has no unnamed files.
    """
    path = entries.entry_path(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
        raise HostLacks(
            f"the file system of the cache directory {path.parent} cannot hold unnamed files (O_TMPFILE)",
            remedy="set SEVCHAOS_CACHE to a directory on ext4, xfs, btrfs or tmpfs",
        ) from error
    with os.fdopen(fd, "w+b") as file:
        try:
            yield file
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoSpace(
                f"the disk of the cache directory {path.parent} is full",
                remedy="free some space (`sevchaos lab clean`, `kernel clean`), or set SEVCHAOS_CACHE to another",
            ) from error
        _link(fd, path)


def _link(fd: int, path: Path) -> None:
    # Given a directory descriptor, os.link calls linkat(2) with AT_SYMLINK_FOLLOW; without one, link(2), which
    # would link the symbolic link in /proc itself.
    directory = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(str(fd), path, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def keep_newest(kind: str, pattern: str, count: int) -> None:
    """Remove all but the `count` files of a kind that were used last. For files that can be made anew in seconds."""
    files = sorted(entries.entry_path(kind, "x").parent.glob(pattern), key=lambda path: path.stat().st_mtime)
    for path in files[:-count]:
        path.unlink(missing_ok=True)


def mark_used(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's cache, or a read-only one
        os.utime(path)
