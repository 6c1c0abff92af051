# SPDX-License-Identifier: Apache-2.0
"""Kernels and tools from Debian, in the cache.

A kernel's entry is `kernels/ABI_VERSION`, with a manifest written last: what was fetched, and the sizes of
what must be there. Using an entry costs reading that and a stat call for each module; one that does not match
is thrown away and fetched again, with a notice.

Which ABI "debian:6.12" is takes apt some seconds to say: the answer is kept until our lists of the archive change.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chaos.cache import entries
from chaos.cache.entries import Say, megabytes
from chaos.errors import InternalError, NoKernel, UsageError
from chaos.lab.kernel import archive, debian
from chaos.lab.kernel.kconfig import check_config, full_version, read_config

# Part of every identity: raise it when what is kept of a package, or how it is laid out, changes.
_LAYOUT = 2
_SERIES = re.compile(r"\d+\.\d+")
_ABI = re.compile(r"\d+\.\d+\.\d+[A-Za-z0-9.+~-]*-amd64")


@dataclass(frozen=True, slots=True)
class Found:
    """What a source knows of its kernel; `chaos.lab.kernel.find.LabKernel` without the user's words."""

    release: str
    version: str
    image: Path
    modules: Path
    build: Path
    identity: str


class Piece(msgspec.Struct, frozen=True):
    path: str  # below the entry
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    layout: int
    release: str
    version: str
    packages: dict[str, str]
    pieces: tuple[Piece, ...]
    modules: str  # digest of their names and sizes
    identity: str


class _FoundBefore(msgspec.Struct, frozen=True):
    stamp: int  # when our lists changed last, ns
    abi: str
    version: str


def find(name: str, *, say: Say) -> Found:
    """The kernel that `debian:NAME` names. Raises UsageError, NoKernel, NoSpace, HostLacks."""
    _check_name(name)
    if _SERIES.fullmatch(name):
        abi, version = _newest(name, say)
        return _use(_entry_name(abi, version), say) or _fetch_or_older(name, abi, say)
    for entry in sorted(_cached(f"{name}_"), key=_entry_age, reverse=True):
        if found := _use(entry, say):
            return found
    return _fetch(name, say)


def package_version(name: str, *, say: Say) -> str:
    """The version of the package of the kernel that `debian:NAME` names: "6.12.117-1~deb12u1". Raises as `find`."""
    _check_name(name)
    if _SERIES.fullmatch(name):
        return _newest(name, say)[1]
    here = max(_cached(f"{name}_"), key=_entry_age, default=None)
    return here.partition("_")[2] if here else debian.kernel_packages(name, say=say)[0].version


def _check_name(name: str) -> None:
    if not _SERIES.fullmatch(name) and not _ABI.fullmatch(name):
        raise UsageError(
            f"debian:{name} names no kernel of Debian's",
            remedy="name a series (debian:6.1, debian:6.12) or an ABI (debian:6.1.0-47-amd64); what was built here has"
            " +plain, +fixed, +kasan or +kcsan at the end",
        )


def _entry_name(abi: str, version: str) -> str:
    return f"{abi}_{version.replace(':', '.')}"


def _entry_age(entry: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", entry))


def _cached(prefix: str) -> list[str]:
    folder = entries.root() / "kernels"
    return [path.name for path in folder.glob("*_*") if path.name.startswith(prefix)]


def _newest_cached(series: str) -> str | None:
    """The newest entry of a series that could be meant by its number alone: no cloud or rt kernel."""
    plain = [name for name in _cached(f"{series}.") if debian.is_plain(name.partition("_")[0])]
    return max(plain, key=_entry_age, default=None)


# Which ABI


def _newest(series: str, say: Say) -> tuple[str, str]:
    record = entries.root() / "series.json"
    known = _known_answers(record)
    stamp = _lists_stamp()
    if (answer := known.get(series)) and (not stamp or answer.stamp == stamp):  # without lists it means what it meant
        return answer.abi, answer.version
    try:
        abi, version = debian.newest_abi(series, say=say)
    except NoKernel as error:
        # An emptied list, or an archive that dropped the series: what we have is still good.
        here = _newest_cached(series)
        if here is None:
            raise
        abi, _, version = here.partition("_")
        say(f"{error.message.split(';')[0]}; using {abi} from the cache")
        return abi, version
    known[series] = _FoundBefore(stamp=_lists_stamp(), abi=abi, version=version)
    with entries.space_guard("a note on kernel versions", 4096):
        entries.write_whole(record, msgspec.json.encode(known))
    return abi, version


def _known_answers(record: Path) -> dict[str, _FoundBefore]:
    try:
        return msgspec.json.decode(record.read_bytes(), type=dict[str, _FoundBefore])
    except (FileNotFoundError, msgspec.DecodeError):
        return {}


def _lists_stamp() -> int:
    try:
        return archive.fetched().stat().st_mtime_ns
    except OSError:
        return 0


# Fetching


def _fetch_or_older(series: str, abi: str, say: Say) -> Found:
    """Fetch the newest; where that cannot be had (no network), an older one of the series that is cached."""
    try:
        return _fetch(abi, say)
    except NoKernel as error:
        here = _newest_cached(series)
        older = _use(here, say) if here else None
        if older is None:
            raise
        say(f"{abi} cannot be had ({error.message.splitlines()[0]}); using {older.release} from the cache")
        return older


def _fetch(abi: str, say: Say) -> Found:
    wanted = debian.kernel_packages(abi, say=say)
    entry = _entry_name(abi, wanted[0].version)
    with entries.locked("kernels", entry, say=say) as lock, _space(f"kernel {abi}", wanted):
        if found := _use(entry, say):  # whoever had the lock before us fetched it
            return found
        entries.discard(entries.entry_path("kernels", entry))  # damaged, or not there
        staging = entries.staging("kernels", entry)
        archives = _download(f"kernel {abi}", wanted, staging, lock, say)
        tree = staging / "tree"
        say(f"unpacking kernel {abi}")
        debian.unpack_kernel(archives, tree, abi, lock=lock)
        manifest = _describe(tree, abi, wanted)
        check_config(read_config(tree / "boot" / f"config-{abi}"), f"debian:{abi}")
        (tree / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        entries.publish(tree, "kernels", entry)
        entries.discard(staging)
    return _found(entries.entry_path("kernels", entry), manifest)


def _download(what: str, wanted: tuple[debian.Package, ...], staging: Path, lock: entries.Lock, say: Say) -> list[Path]:
    """Fetch into `staging`/debs, going on from what a killed process has left there."""
    debs = staging / "debs"
    debs.mkdir(exist_ok=True)
    shutil.rmtree(staging / "tree", ignore_errors=True)
    here = sum(path.stat().st_size for path in debs.iterdir())
    total = sum(package.download for package in wanted)
    entries.check_space(debian.space_needed(wanted) - here, what)
    kept = f", {megabytes(here)} of them here already" if here else ""
    say(f"fetching {what}: {', '.join(p.name for p in wanted)} ({megabytes(total)}{kept})")
    return debian.download(wanted, debs, lock=lock, say=say)


@contextlib.contextmanager
def _space(what: str, wanted: tuple[debian.Package, ...]) -> Iterator[None]:
    with entries.space_guard(what, debian.space_needed(wanted)):
        yield


def _describe(tree: Path, abi: str, wanted: tuple[debian.Package, ...]) -> Manifest:
    image, config = f"boot/vmlinuz-{abi}", f"boot/config-{abi}"
    for path in (image, config):
        if not (tree / path).is_file():
            raise NoKernel(f"the package linux-image-{abi} holds no {path}", remedy="use another kernel")
    version = full_version(tree / config) or re.sub(r"^(\d+\.\d+\.\d+).*", r"\1", wanted[0].version)
    pieces = tuple(
        Piece(path, (tree / path).stat().st_size, _sha256(tree / path))
        for path in (
            image,
            config,
            f"boot/System.map-{abi}",
            f"lib/modules/{abi}/modules.dep",
            f"usr/src/linux-headers-{abi}/Makefile",
            f"usr/src/linux-headers-{abi}/Module.symvers",
        )
    )
    packages = {p.name: p.version for p in wanted}
    modules = _modules_digest(tree / "lib" / "modules" / abi)
    recipe = msgspec.json.encode((_LAYOUT, packages, pieces, modules))
    return Manifest(
        layout=_LAYOUT,
        release=abi,
        version=version,
        packages=packages,
        pieces=pieces,
        modules=modules,
        identity=hashlib.sha256(recipe).hexdigest(),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _modules_digest(modules: Path) -> str:
    """Over the names and sizes of all modules. Strings, not paths: this is done at every use."""
    top = str(modules / "kernel")
    digest = hashlib.sha256()
    for folder, subfolders, files in os.walk(top):
        subfolders.sort()
        for name in sorted(files):
            path = f"{folder}/{name}"
            digest.update(f"kernel{path.removeprefix(top)} {os.stat(path).st_size}\n".encode())  # noqa: PTH116
    return digest.hexdigest()


# Using


def _use(entry: str, say: Say) -> Found | None:
    """The kernel in a cache entry; None when there is none, or none that is whole."""
    path = entries.entry_path("kernels", entry)
    if not path.is_dir():
        return None
    try:
        manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
        damage = _damage(path, manifest)
    except (OSError, msgspec.DecodeError) as error:
        damage = f"its manifest cannot be read ({error})"
    if damage:
        # It is removed under its lock only, lest we remove what another process has just put there.
        say(f"the cached kernel {entry} is damaged: {damage}; it has to be fetched again")
        return None
    return _found(path, manifest)


def _damage(path: Path, manifest: Manifest) -> str:
    if manifest.layout != _LAYOUT:
        return f"it has layout {manifest.layout}, and this version wants {_LAYOUT}"
    for piece in manifest.pieces:
        try:
            size = (path / piece.path).stat().st_size
        except FileNotFoundError:
            return f"{piece.path} is missing"
        if size != piece.size:
            return f"{piece.path} has {size} bytes instead of {piece.size}"
    if _modules_digest(path / "lib" / "modules" / manifest.release) != manifest.modules:
        return "a module is missing or has another size"
    return ""


def _found(path: Path, manifest: Manifest) -> Found:
    release = manifest.release
    return Found(
        release=release,
        version=manifest.version,
        image=path / "boot" / f"vmlinuz-{release}",
        modules=path / "lib" / "modules" / release,
        build=path / "usr" / "src" / f"linux-headers-{release}",
        identity=manifest.identity,
    )


def find_busybox(*, say: Say) -> Path:
    """A static busybox: the cached one, else Debian's; without apt an installed one. Raises HostLacks."""
    for cached in sorted((entries.root() / "tools").glob("busybox_*"), reverse=True):
        if _is_static_elf(cached):
            return cached
        say(f"the cached {cached.name} is damaged; it has to be fetched again")
    if shutil.which("apt-get") is None:
        for name in ("busybox.static", "busybox-static", "busybox"):
            if (found := shutil.which(name)) and _is_static_elf(Path(found)):
                return Path(found)
        raise NoKernel(
            "the lab needs a statically linked busybox, and there is none here, nor an apt to fetch it with",
            remedy="install one; distributions call the package busybox-static or busybox",
        )
    wanted = (debian.versions("busybox-static", say=say)[-1],)  # the oldest moves on least
    entry = f"busybox_{wanted[0].version.replace(':', '.')}"
    with entries.locked("tools", entry, say=say) as lock, _space("busybox", wanted):
        final = entries.entry_path("tools", entry)
        if _is_static_elf(final):  # whoever had the lock before us fetched it
            return final
        entries.discard(final)
        staging = entries.staging("tools", entry)
        archives = _download("busybox", wanted, staging, lock, say)
        tree = staging / "tree"
        debian.unpack(archives[0], tree, lock=lock)
        program = next((path for path in tree.rglob("busybox") if _is_static_elf(path)), None)
        if program is None:
            raise InternalError(f"{archives[0].name} holds no static busybox")
        entries.publish(program, "tools", entry)
        entries.discard(staging)
    return final


def _is_static_elf(path: Path) -> bool:
    """Whether a file is a whole ELF program that asks for no interpreter (PT_INTERP)."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if data[:5] != b"\x7fELF\x02":
        return False
    offset = int.from_bytes(data[32:40], "little")
    size = int.from_bytes(data[54:56], "little")
    count = int.from_bytes(data[56:58], "little")
    headers = [data[offset + i * size : offset + (i + 1) * size] for i in range(count)]
    if not headers or any(len(h) < size for h in headers):
        return False
    ends = (int.from_bytes(h[8:16], "little") + int.from_bytes(h[32:40], "little") for h in headers)
    return all(int.from_bytes(h[:4], "little") != 3 for h in headers) and max(ends) <= len(data)
