# SPDX-License-Identifier: Apache-2.0
"""The lab's root file system: three cpio layers, each cached under the digest of what it is made from.

    system   per kernel: busybox, the modules and the order to load them in, the init script
    python   per interpreter and set of libraries: a trimmed CPython, its shared libraries, our dependencies
    code     per state of our sources

The kernel unpacks layers laid end to end, so a change of our code rebuilds the smallest only. Python sources of
others are left out in favour of their byte code: half the size to unpack, and nobody edits them in the lab.
Layers are written to unnamed files and linked when whole (`chaos.cache.wholefile`), so a killed build leaves nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import lzma
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import chaos
from chaos import fault
from chaos.cache import entries
from chaos.cache.wholefile import keep_newest, mark_used, whole_file
from chaos.errors import HostLacks, NoKernel
from chaos.lab.cpio import CpioWriter
from chaos.lab.kernel.find import LabKernel, build_module, find_busybox
from chaos.lab.kernel.kconfig import read_config
from chaos.native import library as native

_KEPT = 8  # layers of each name; the code layer changes with every line
OURS = ("chaos", "faults", "experiments", "reports")

# Loaded at boot, in this order, each after what it depends on. The shim must come after kvm and before the two
# drivers it dresses the machine up for.
LOADED = ("virtio_pci", "virtio_console", "kvm", "sevshim", "ccp", "kvm_amd")
# Not loaded, but there for modprobe: what network faults need.
AVAILABLE = ("veth", "tun", "dummy", "ifb", "sch_netem", "sch_tbf", "sch_prio", "sch_ingress", "act_mirred", "cls_u32")

# Parts of the standard library that nothing in the lab imports. unittest and sqlite3 stay: pyroute2 wants them.
_STDLIB_LEFT_OUT = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "distutils",
    "site-packages", "dist-packages", "__pycache__", "venv", "wsgiref", "xmlrpc", "dbm", "curses",
}  # fmt: skip
_EXTENSIONS_LEFT_OUT = ("_tkinter", "_curses", "_dbm", "_gdbm", "nis", "_crypt")
# Needed only by the software PSP, which runs outside the lab.
_LIBRARIES_LEFT_OUT = {"cryptography", "cffi", "pycparser"}


@dataclass(frozen=True, slots=True)
class Image:
    """Files to be laid end to end as the initial RAM disk; `identity` changes when any of them does."""

    layers: tuple[Path, ...]
    identity: str


def make_image(kernel: LabKernel, *, say: Callable[[str], None]) -> Image:
    """Find or build the layers for `kernel`.

    Raises `NoKernel` if the kernel lacks a module, `HostLacks` if a tool to build with is missing, `NoSpace`.
    """
    layers = (
        _layer("system", _system_key(kernel), lambda out: _write_system(out, kernel), say),
        _layer("python", _python_key(), _write_python, say),
        _layer("code", _code_key(), _write_code, say),
    )
    names = "\n".join(layer.name for layer in layers)
    return Image(layers=layers, identity=hashlib.sha256(names.encode()).hexdigest()[:16])


def _layer(name: str, key: str, write: Callable[[BinaryIO], None], say: Callable[[str], None]) -> Path:
    path = entries.entry_path("images", f"{name}-{key}.cpio")
    if not path.exists():
        say(f"building the {name} layer of the lab's root file system")
        with whole_file("images", path.name) as out:
            write(out)
        keep_newest("images", f"{name}-*.cpio", _KEPT)
    mark_used(path)
    return path


def _digest(parts: Iterable[bytes | str]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else part.encode())
        whole.update(b"\0")
    return whole.hexdigest()[:16]


# --- system ----------------------------------------------------------------------------------------------


def _own(path: str) -> Path:
    return Path(__file__).parent / path


def _system_key(kernel: LabKernel) -> str:
    sources = (path for path in _own("modules").rglob("*") if path.is_file())
    recipe = (Path(__file__), _own("guest/init"), *sorted(sources))
    return _digest([kernel.identity, *(part.read_bytes() for part in recipe)])


def _write_system(out: BinaryIO, kernel: LabKernel) -> None:
    archive = CpioWriter(out)
    for directory in ("/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/copy", "/usr/bin", "/etc"):
        archive.add_directory(directory)
    for link, target in (("/bin", "usr/bin"), ("/sbin", "usr/bin"), ("/usr/sbin", "bin")):
        archive.add_link(link, target)
    archive.add_device("/dev/console", 5, 1)
    archive.add_device("/dev/null", 1, 3, mode=0o666)
    archive.add_file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    archive.add_file("/etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    archive.add_file("/etc/hosts", b"127.0.0.1 localhost lab\n::1 localhost\n")
    archive.add_file("/init", _own("guest/init").read_bytes(), mode=0o755)
    archive.add_file("/usr/bin/sevchaos", b'#!/bin/sh\nexec python3 -m chaos.cli "$@"\n', mode=0o755)
    _add_busybox(archive)
    _add_modules(archive, kernel)
    archive.close()


def _add_busybox(archive: CpioWriter) -> None:
    busybox = find_busybox()
    archive.add_path("/usr/bin/busybox", busybox)
    listing = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=30, check=True).stdout
    for applet in listing.split():
        if applet != "busybox":
            archive.add_link(f"/usr/bin/{applet}", "busybox")


def _add_modules(archive: CpioWriter, kernel: LabKernel) -> None:
    tree = ModuleTree.read(kernel.modules)
    home = f"/lib/modules/{kernel.release}"
    order: list[str] = []
    for name in LOADED:
        if name == "sevshim":
            archive.add_path("/lab/sevshim.ko", build_module(kernel, "sevshim"))
            order.append("/lab/sevshim.ko")
            continue
        order += [f"{home}/{path}" for path in tree.closure(name) if f"{home}/{path}" not in order]
    wanted = dict.fromkeys(path for name in (*LOADED, *AVAILABLE) if tree.has(name) for path in tree.closure(name))
    for path in wanted:
        archive.add_file(f"{home}/{path}", tree.contents(path))
    archive.add_file(f"{home}/modules.dep", tree.dependencies(wanted).encode())
    archive.add_file(f"{home}/modules.alias", tree.aliases(wanted).encode())
    for listing in ("modules.builtin", "modules.order"):
        archive.add_path(f"{home}/{listing}", kernel.modules / listing)
    archive.add_file("/lab/modules", "".join(f"{path}\n" for path in order).encode())
    # Not loaded: a run that wants holds and failures inside the kernel says so (docs/kfault.md). A build tree may be
    # without the function tracer, which it needs.
    if read_config(kernel.build / ".config").get("KPROBES_ON_FTRACE") == "y":
        archive.add_path("/lab/kfault.ko", build_module(kernel, "kfault"))


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """What `modules.dep` and `modules.builtin` say. Paths are relative to the tree and lose their compression
    suffix: busybox's insmod takes plain modules only."""

    root: Path
    needs: dict[str, tuple[str, ...]]
    stored: dict[str, Path]
    builtin: frozenset[str]

    @classmethod
    def read(cls, root: Path) -> ModuleTree:
        needs: dict[str, tuple[str, ...]] = {}
        stored: dict[str, Path] = {}
        for line in (root / "modules.dep").read_text().splitlines():
            path, _, after = line.partition(":")
            needs[_plain(path)] = tuple(_plain(other) for other in after.split())
            stored[_plain(path)] = root / path
        builtin = frozenset(_module_name(line) for line in (root / "modules.builtin").read_text().split())
        return cls(root=root, needs=needs, stored=stored, builtin=builtin)

    def has(self, name: str) -> bool:
        return any(_module_name(path) == name for path in self.needs)

    def closure(self, name: str) -> list[str]:
        """Paths to load for `name`, in order, none for a built-in. Raises `NoKernel` if there is neither."""
        for path in self.needs:
            if _module_name(path) == name:
                return [*reversed(self.needs[path]), path]
        if name in self.builtin:
            return []
        raise NoKernel(
            f"the kernel under {self.root} has no module {name}, and it is not built in",
            remedy="choose a kernel that has it; `sevchaos doctor` lists what a lab kernel needs",
        )

    def contents(self, path: str) -> bytes:
        data = self.stored[path].read_bytes()
        match self.stored[path].suffix:
            case ".xz":
                return lzma.decompress(data)
            case ".zst":
                command = ["zstd", "-dc"]
                try:
                    return subprocess.run(command, input=data, capture_output=True, timeout=60, check=True).stdout
                except FileNotFoundError:
                    raise HostLacks("modules are compressed with zstd", remedy="install zstd") from None
        return data

    def dependencies(self, paths: Iterable[str]) -> str:
        return "".join(f"{path}: {' '.join(self.needs[path])}\n" for path in paths)

    def aliases(self, paths: Iterable[str]) -> str:
        """Lines of `modules.alias`: the names by which the kernel calls for these modules by itself."""
        file = self.root / "modules.alias"
        names = {_module_name(path) for path in paths}
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        return "".join(line for line in lines if line.startswith("alias ") and line.split()[-1] in names)


def _plain(path: str) -> str:
    return re.sub(r"\.(xz|zst|gz)$", "", path)


def _module_name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


# --- python ----------------------------------------------------------------------------------------------


def _libraries() -> list[importlib.metadata.Distribution]:
    """The distributions our own needs at run time, transitively."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = ["sevchaos"]
    while queue:
        name = queue.pop()
        distribution = importlib.metadata.distribution(name)
        for requirement in distribution.requires or []:
            if "extra ==" in requirement or re.search(r"(sys_platform|platform_system) *== *.(win|Win)", requirement):
                continue
            wanted = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()
            if wanted in found or wanted in _LIBRARIES_LEFT_OUT:
                continue
            try:
                found[wanted] = importlib.metadata.distribution(wanted)
            except importlib.metadata.PackageNotFoundError:
                continue  # asked for on another Python or platform only
            queue.append(wanted)
    return [found[name] for name in sorted(found)]


def _python_key() -> str:
    libraries = [f"{library.name}=={library.version}" for library in _libraries()]
    return _digest([Path(__file__).read_bytes(), sys.version, sys.base_prefix, *libraries])


def _write_python(out: BinaryIO) -> None:
    archive = CpioWriter(out)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = Path(sys.base_prefix) / "bin" / version
    archive.add_file("/usr/bin/python3", _stripped(interpreter), mode=0o755)
    archive.add_link("/usr/bin/python", "python3")
    binaries = [interpreter]
    for source, target in _stdlib_files():
        binaries += _add_python_file(archive, source, f"/usr/lib/{version}/{target}")
    for library in _libraries():
        for file in library.files or []:
            source = Path(str(library.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                binaries += _add_python_file(archive, source, f"/lab/site/{file}")
    for path in sorted(shared_libraries(binaries)):
        archive.add_file(str(path), _stripped(path), mode=0o755)
    archive.close()


def _stdlib_files() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(p in _STDLIB_LEFT_OUT or p.startswith("config-") for p in parts):
            continue
        if (
            path.suffix in {".py", ".so"}
            and "_test" not in path.name
            and not path.name.startswith(_EXTENSIONS_LEFT_OUT)
        ):
            yield path, str(path.relative_to(root))


def _add_python_file(archive: CpioWriter, source: Path, target: str) -> list[Path]:
    """Add one file, a Python source as byte code; returns it if it is a binary with libraries of its own."""
    if source.suffix == ".py":
        archive.add_file(target + "c", _byte_code(source, target))
    elif ".so" in source.suffixes:
        archive.add_file(target, _stripped(source), mode=0o755)
        return [source]
    elif source.suffix not in {".pyi", ".c", ".h", ".pyx"}:
        archive.add_path(target, source)
    return []


def _stripped(binary: Path) -> bytes:
    """Its contents without symbols for debuggers, a third of the size of an interpreter built from source."""
    with tempfile.NamedTemporaryFile() as out:
        command = ["strip", "--strip-unneeded", "-o", out.name, str(binary)]
        try:
            subprocess.run(command, capture_output=True, timeout=60, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return binary.read_bytes()
        return Path(out.name).read_bytes()


def _byte_code(source: Path, shown_as: str) -> bytes:
    # Unchecked: the lab's file times mean nothing, and nothing there changes a source.
    with tempfile.NamedTemporaryFile(suffix=".pyc") as compiled:
        py_compile.compile(
            str(source), compiled.name, dfile=shown_as, doraise=True, quiet=2,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
        return Path(compiled.name).read_bytes()


def shared_libraries(binaries: Iterable[Path]) -> set[Path]:
    """Absolute paths of the libraries (and the loader) that the dynamic linker would load for `binaries`."""
    found: set[Path] = set()
    for binary in binaries:
        output = subprocess.run(["ldd", binary], capture_output=True, text=True, timeout=30, check=False).stdout
        found |= {Path(match) for match in re.findall(r"(/\S+) \(0x", output)}
    return found


# --- code ------------------------------------------------------------------------------------------------


def _own_files() -> Iterator[tuple[Path, str]]:
    root = Path(chaos.__file__).parent.parent
    for package in OURS:
        yield from _package_files(root / package)
    yield native.find(), f"chaos/native/{native.NAME}"  # built: the lab has no compiler


def _package_files(place: Path) -> Iterator[tuple[Path, str]]:
    """The files of a package, or a module, by their path from where it is imported."""
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in {".py", ".yaml", ".json", ".j2"}:
            yield path, str(path.relative_to(place.parent))


def _faults_of_others() -> dict[str, importlib.metadata.Distribution]:
    """Distributions beside ours that bring faults of their own, by the package or module that these are in."""
    points = importlib.metadata.entry_points(group=fault.GROUP)
    return {point.module.split(".")[0]: point.dist for point in points if point.dist and point.dist.name != "sevchaos"}


def _code_files() -> Iterator[tuple[Path, str]]:
    yield from _own_files()
    for name in sorted(_faults_of_others()):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise HostLacks(f"{name}, which brings faults, cannot be found", remedy="install it again, or remove it")
        origin = Path(found.origin)
        yield from _package_files(origin.parent if origin.name == "__init__.py" else origin)


def _code_key() -> str:
    files = [part for path, name in _code_files() for part in (name, path.read_bytes())]
    return _digest([*files, *(part for pair in _metadata() for part in pair)])


def _metadata() -> Iterator[tuple[str, str]]:
    """What names versions and entry points. In a checkout it may be an egg-info, which calls the first PKG-INFO."""
    for distribution in (importlib.metadata.distribution("sevchaos"), *_faults_of_others().values()):
        folder = f"{distribution.name.replace('-', '_')}.dist-info"
        yield f"{folder}/METADATA", distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        yield f"{folder}/entry_points.txt", distribution.read_text("entry_points.txt") or ""


def _write_code(out: BinaryIO) -> None:
    archive = CpioWriter(out)
    tag = sys.implementation.cache_tag
    for path, name in _code_files():
        target = f"/lab/code/{name}"
        archive.add_path(target, path)  # sources too: a traceback without lines helps nobody
        if path.suffix == ".py":
            compiled = Path(target).parent / "__pycache__" / f"{path.stem}.{tag}.pyc"
            archive.add_file(str(compiled), _byte_code(path, target))
    for file, text in _metadata():
        archive.add_file(f"/lab/code/{file}", text.encode())
    archive.close()


def initial_ram_disk(image: Image) -> int:
    """All layers end to end in an anonymous memory file: a descriptor, the caller's to close."""
    whole = os.memfd_create("sevchaos-initrd")
    for layer in image.layers:
        with layer.open("rb") as part:
            size = layer.stat().st_size
            sent = 0
            while sent < size:
                sent += os.sendfile(whole, part.fileno(), sent, size - sent)
    return whole
