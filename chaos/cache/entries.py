# SPDX-License-Identifier: Apache-2.0
"""The cache: what was fetched or built once. All of it may be thrown away at any time.

    ROOT/KIND/NAME               a published entry: complete, never changed again
    ROOT/KIND/.NAME.partial      an entry being made; belongs to the holder of its lock
    ROOT/KIND/.NAME.PID.trash    an entry being removed
    ROOT/locks/KIND.NAME         held (flock) while an entry is made or removed

An entry appears by one rename and disappears by one rename, so no reader ever sees half of one. The kernel
drops a lock with the last process that holds it, so a killed process leaves a `.partial` behind but never a
locked entry: the next holder resumes or removes it.

ROOT is `$SEVCHAOS_CACHE`, else `$XDG_CACHE_HOME/sevchaos`, else `~/.cache/sevchaos`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos.errors import HostLacks, NoSpace, SevchaosError, UsageError

Say = Callable[[str], None]
ExcInfo = tuple[type[BaseException], BaseException, object]

# What lives in the cache, in words for people. A kind not named here is "other".
KINDS = {
    "apt": "Debian's package lists",
    "kernels": "kernel fetched from Debian, unpacked",
    "sources": "kernel sources, unpacked",
    "built": "kernel built from source",
    "ccache": "what a compiler made of kernel sources",
    "trees": "modules gathered from a kernel build tree",
    "modules": "the lab's kernel modules, built",
    "tools": "program fetched from Debian for the lab",
    "native": "the engine's native loops, built",
    "images": "layer of the lab's root file system",
    "snapshots": "booted lab, ready to be restored",
}
# Of these kinds is what `sevchaos lab` keeps: made anew within seconds, without a network.
LABS = frozenset({"images", "native", "snapshots"})
# And these are the kernels themselves. All else is what fetching and building kernels leaves.
KERNELS = frozenset({"kernels", "built"})
_LOCKS = "locks"
_PARTIAL = ".partial"
_TRASH = ".trash"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    kind: str
    name: str
    path: Path
    size: int  # bytes on disk
    what: str
    leftover: bool  # of a process that was killed, or that is at work right now


@dataclass(frozen=True, slots=True)
class Cleaned:
    removed: tuple[CacheEntry, ...]
    busy: tuple[CacheEntry, ...]  # in the hands of another process, and left to it


@dataclass(frozen=True, slots=True)
class Lock:
    """A held lock. `fd` is passed to child processes, which then hold it too should we be killed."""

    fd: int


def root() -> Path:
    """The cache directory, made when it is not there. Raises UsageError or HostLacks."""
    path = _chosen_root()
    if any(c in ": \t\n" for c in str(path)):
        raise UsageError(
            f"the cache directory {str(path)!r} has a space or a colon in its name,"
            " which the kernel's makefiles cannot handle",
            remedy="set SEVCHAOS_CACHE to a directory without",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostLacks(
            f"the cache directory {path} cannot be made: {error.strerror}",
            remedy="set SEVCHAOS_CACHE to a directory that you may write to",
        ) from error
    return path


def _chosen_root() -> Path:
    if own := os.environ.get("SEVCHAOS_CACHE"):
        return Path(own).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg.startswith("/"):  # the XDG specification: relative paths are to be ignored
        return Path(xdg) / "sevchaos"
    try:
        return Path.home() / ".cache" / "sevchaos"
    except RuntimeError as error:
        raise UsageError("no home directory is known", remedy="set SEVCHAOS_CACHE to a directory") from error


def entry_path(kind: str, name: str) -> Path:
    return root() / kind / name


def staging(kind: str, name: str) -> Path:
    """Where to make an entry. Only for the holder of its lock; what a killed process left may be in it."""
    path = root() / kind / f".{name}{_PARTIAL}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    return path


def publish(staged: Path, kind: str, name: str) -> Path:
    """Make `staged` (a file or directory below the cache) the entry, in one rename."""
    final = entry_path(kind, name)
    final.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(final)
    return final


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, whenever this process is killed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.rename(path)


def discard(path: Path) -> None:
    """Remove a file or directory of the cache: first out of sight, then for good."""
    trash = path.parent / f".{path.name.lstrip('.')}.{os.getpid()}{_TRASH}"
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    if trash.is_dir() and not trash.is_symlink():
        # Kernel build trees hold read-only directories now and then; rmtree needs to write to them.
        shutil.rmtree(trash, onerror=_writable_and_again)
    else:
        trash.unlink()


def _writable_and_again(function: Callable[..., object], path: str, failure: ExcInfo) -> None:
    if isinstance(failure[1], FileNotFoundError):  # another `clean` was faster
        return
    Path(path).parent.chmod(0o700)
    if Path(path).is_dir() and not Path(path).is_symlink():
        Path(path).chmod(0o700)
    function(path)


# Locks


@contextlib.contextmanager
def locked(kind: str, name: str, *, say: Say) -> Iterator[Lock]:
    """Hold the lock of one entry. Waits for another process that has it, and says so.

    There is no deadline: the holder is alive by definition, and each of its steps has one.
    """
    fd = _lock(kind, name, wait=True, say=say)
    assert fd is not None
    try:
        yield Lock(fd)
    finally:
        os.close(fd)  # not LOCK_UN: a child that still runs keeps the lock


def _lock(kind: str, name: str, *, wait: bool, say: Say) -> int | None:
    """An open, locked descriptor; None when somebody else has the lock and `wait` is off."""
    path = root() / _LOCKS / f"{kind}.{name}"
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _not_writable(path, error) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(fd)
                return None
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            who = f"process {holder}" if holder else "another process"
            say(f"waiting for {who}, which is at work on {kind}/{name} in the cache")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
        if _still_there(fd, path):
            os.ftruncate(fd, 0)
            with contextlib.suppress(OSError):  # a full disk: the number is only for messages
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        os.close(fd)  # `clean` removed the file while we waited; begin again with the new one


def _still_there(fd: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _not_writable(path: Path, error: OSError) -> SevchaosError:
    if error.errno in _FULL:
        return _full(path, "")
    return HostLacks(
        f"the cache cannot be written to: {path}: {error.strerror}",
        remedy="set SEVCHAOS_CACHE to a directory of your own; one that `sudo` filled belongs to root",
    )


# Space


def check_space(needed: int, what: str) -> None:
    """Raise NoSpace unless the cache's disk has `needed` bytes, and a little more, free."""
    place = root()
    free = shutil.disk_usage(place).free
    needed += 16 << 20  # directories, manifests, and not filling a disk to its last byte
    if free < needed:
        raise NoSpace(
            f"{what} needs {megabytes(needed)} in {place}, and {megabytes(free)} are free there",
            remedy="free some space, or set SEVCHAOS_CACHE to a directory on a larger disk",
        )


@contextlib.contextmanager
def space_guard(what: str, needed: int) -> Iterator[None]:
    """Turn a full disk, wherever it shows, into NoSpace with what is needed."""
    hint = f"{what} needs {megabytes(needed)}"
    try:
        yield
    except NoSpace as error:
        if hint in error.message:
            raise
        raise NoSpace(f"{error.message}; {hint} in {root()}", remedy=error.remedy) from error
    except (OSError, shutil.Error) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _full(root(), hint) from error
        raise


def _full(path: Path, hint: str) -> NoSpace:
    return NoSpace(
        f"the disk of {path} is full" + (f"; {hint}" if hint else ""),
        remedy="free some space, or set SEVCHAOS_CACHE to a directory on a larger disk, then try again",
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size >= 10e6 else f"{size / 1e6:.1f} MB"


# Listing and cleaning


def entries() -> tuple[CacheEntry, ...]:
    """Everything in the cache, by kind and name."""
    found = []
    for kind_dir in sorted(p for p in root().iterdir() if p.is_dir() and p.name != _LOCKS):
        kind = kind_dir.name
        for path in sorted(kind_dir.iterdir()):
            leftover = path.name.startswith(".") and path.name.endswith((_PARTIAL, _TRASH))
            if path.name.startswith(".") and not leftover:
                continue
            name = _entry_name(path) if leftover else path.name
            what = KINDS.get(kind, "other") + (", unfinished" if leftover else "")
            found.append(CacheEntry(kind, name, path, size_on_disk(path), what, leftover))
    return tuple(found)


def _entry_name(leftover: Path) -> str:
    bare = leftover.name[1:]
    if bare.endswith(_PARTIAL):
        return bare.removesuffix(_PARTIAL)
    return bare.removesuffix(_TRASH).rpartition(".")[0]  # without the process number


def size_on_disk(path: Path) -> int:
    """Bytes on disk; a sparse file counts what it occupies."""
    total = 0
    stack = [path]
    while stack:
        here = stack.pop()
        with contextlib.suppress(OSError):  # another process may be removing it
            stat = here.lstat()
            total += stat.st_blocks * 512
            if here.is_dir() and not here.is_symlink():
                stack.extend(here.iterdir())
    return total


def clean(*, kinds: Collection[str] | None = None, say: Say) -> Cleaned:
    """Remove all entries, or those of `kinds`, with what killed processes left of them."""
    return remove((entry for entry in entries() if kinds is None or entry.kind in kinds), say=say)


def remove(doomed: Iterable[CacheEntry], *, say: Say) -> Cleaned:
    """Remove these. What another process holds the lock of stays, and is named in `busy`."""
    removed: list[CacheEntry] = []
    busy: list[CacheEntry] = []
    for entry in doomed:
        (removed if _remove(entry, say) else busy).append(entry)
    return Cleaned(tuple(removed), tuple(busy))


def _remove(entry: CacheEntry, say: Say) -> bool:
    fd = _lock(entry.kind, entry.name, wait=False, say=say)
    if fd is None:
        return False
    try:
        say(f"removing {entry.kind}/{entry.path.name} ({megabytes(entry.size)})")
        discard(entry.path)
        # Whoever waits for this lock finds it gone and takes the new one, see `_lock`.
        (root() / _LOCKS / f"{entry.kind}.{entry.name}").unlink(missing_ok=True)
    finally:
        os.close(fd)
    return True
