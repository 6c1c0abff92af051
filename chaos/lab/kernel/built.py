# SPDX-License-Identifier: Apache-2.0
"""Kernels that are built here, from Debian's sources or a tree of the user's, with what an experiment wants of them.

    debian:7.3+plain         from the project's own configuration (`fragments/base.config` on top of tinyconfig)
    debian:7.3+fixed         the same with the findings mended (`fixes/`): nothing but these differs from +plain
    debian:7.3+kasan         with whatever tells of memory and locks that were used wrongly, and fault injection
    debian:7.3+kcsan         with what tells of races
    debian:7.3+fixed+kasan   both
    PATH+kasan               of a tree of the user's, which is not changed

An entry of the cache is a source tree of its own with its build in `objects`, less what only a linker wants: the lab's
modules are built against it. As `objects` is inside, kbuild names every source relative to it, and so the objects that
ccache keeps of one kernel serve the next.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

import msgspec

from chaos.cache import command, entries
from chaos.cache.command import run, tool
from chaos.cache.entries import Say
from chaos.errors import HostLacks, NoKernel, UsageError
from chaos.lab.kernel import edits, fetched, sources
from chaos.lab.kernel.fetched import Found
from chaos.lab.kernel.kconfig import check_config, read_config
from chaos.lab.kernel.sources import Sources

FRAGMENTS = Path(__file__).parent / "fragments"
VARIANTS = {"fixed": "the findings mended", "kasan": "memory and locks", "kcsan": "races", "plain": "nothing added"}
_PACKAGES = {
    "make": "make", "gcc": "gcc", "ld": "binutils", "flex": "flex", "bison": "bison", "bc": "bc", "depmod": "kmod",
    "pahole": "pahole",
}  # fmt: skip
_LIBELF = Path("/usr/include/libelf.h")
_SPACE = 4 << 30  # bytes while it is built; what stays is a quarter
_HOUR = 3600.0
# Where KCOV says which code was reached. Instrumenting everything would cost a third more time at each step.
# arch/x86/kvm has the makefile of virt/kvm in it.
_COVERED = ("arch/x86/kvm", "drivers/crypto/ccp", "kernel/cgroup")
# What of somebody's environment would make another kernel, or write into a build of theirs.
_NOT_OURS = (
    "KBUILD_OUTPUT", "KCONFIG_CONFIG", "KCONFIG_ALLCONFIG", "LLVM", "CROSS_COMPILE", "KCFLAGS", "KCPPFLAGS", "KAFLAGS",
    "LOCALVERSION", "INSTALL_MOD_PATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "W", "V", "C",
)  # fmt: skip
_KEPT_STATES = 2  # of each kernel: today's, and the one before
_IMAGE = "arch/x86/boot/bzImage"
# What building a module reads of the objects; the rest is removed.
_KEPT = re.compile(
    r".*\.(?:h|lds|c|conf|order|symvers)|auto\.conf.*|kernel\.release|\.config|System\.map|Makefile|Module\.symvers|bzImage"
)
_KEPT_WHOLE = {"include", "scripts", "tools"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`base` is `debian:SERIES`, `debian:ABI`, or the path of a tree; `variants` are in the order of their names."""

    base: str
    variants: tuple[str, ...]

    def __str__(self) -> str:
        return "+".join((self.base, *self.variants))


class BuiltManifest(msgspec.Struct, frozen=True):
    """Written last. `source` is what it was asked for by; `seconds` is how long the compiler worked for it at last."""

    source: str
    release: str
    version: str
    identity: str
    seconds: int


def parse(source: str) -> Recipe | None:
    """The recipe that a name such as `debian:7.3+fixed+kasan` is of, None if it is of no kernel that is built here.

    Raises UsageError if its parts exclude each other.
    """
    base, *words = source.split("+")
    while words and words[0] not in VARIANTS:  # 6.12.117+deb12-amd64
        base += f"+{words.pop(0)}"
    if not words:
        return None
    return recipe(base, words)


def recipe(base: str, words: Sequence[str]) -> Recipe:
    """Of sources by a name of Debian's or by their path. Raises UsageError."""
    unknown = [word for word in words if word not in VARIANTS]
    if unknown or not base:
        raise UsageError(f"a kernel cannot be built with {'+'.join(words)}", remedy=f"there are {_told()}")
    chosen = set(words)
    if {"kasan", "kcsan"} <= chosen:
        raise UsageError("KASAN and KCSAN exclude each other", remedy="build two kernels")
    if "plain" in chosen and len(chosen) > 1:
        raise UsageError("+plain is a kernel without anything else", remedy="leave it out")
    named = base if base.startswith("debian:") else str(Path(base).expanduser().absolute())
    return Recipe(named, tuple(sorted(chosen)))


def _told() -> str:
    return ", ".join(f"{word} ({what})" for word, what in VARIANTS.items())


def find(wanted: Recipe, *, say: Say) -> Found:
    """The kernel, if it was built. Raises NoKernel, with what builds it."""
    entry = _entry(wanted, _sources(wanted, say))
    found = _use(entry)
    if found is None:
        why = (
            "is of an older state of these sources, its configuration or its fixes"
            if _states(entry)
            else "is not built"
        )
        raise NoKernel(f"{wanted} {why}", remedy=f"`{_how(wanted)}` builds it, in about 20 minutes of two CPUs")
    return found


def _how(wanted: Recipe) -> str:
    words = " ".join(f"--with {'fixes' if word == 'fixed' else word}" for word in wanted.variants if word != "plain")
    base = wanted.base if wanted.base.startswith("debian:") else f"--from {wanted.base}"
    return f"sevchaos kernel build {base} {words}".rstrip()


def _sources(wanted: Recipe, say: Say) -> Sources:
    if wanted.base.startswith("debian:"):
        return sources.of_debian(fetched.package_version(wanted.base.removeprefix("debian:"), say=say))
    return sources.of_tree(Path(wanted.base))


def _entry(wanted: Recipe, made_of: Sources) -> str:
    """A name that changes with whatever goes into the kernel."""
    digest = hashlib.sha256(sources.identity(made_of).encode())
    for path in (*_fragments(wanted), *(sorted(edits.FIXES.glob("*.edit")) if "fixed" in wanted.variants else ())):
        digest.update(path.read_bytes())
    return f"{made_of.name}_{'+'.join(wanted.variants)}_{digest.hexdigest()[:12]}"


def _fragments(wanted: Recipe) -> list[Path]:
    return [FRAGMENTS / "base.config", *(p for w in wanted.variants if (p := FRAGMENTS / f"{w}.config").is_file())]


def _states(entry: str) -> list[Path]:
    """The entries of the same kernel in whatever state of its sources, oldest first."""
    alike = f"{entry.rpartition('_')[0]}_"
    folder = entries.entry_path("built", "")
    there = [path for path in folder.iterdir() if path.name.startswith(alike)] if folder.is_dir() else []
    return sorted(there, key=lambda path: path.stat().st_mtime)


def read_manifest(entry: str) -> BuiltManifest | None:
    """What an entry of the cache says of itself, None if there is none."""
    try:
        text = (entries.entry_path("built", entry) / "manifest.json").read_bytes()
    except OSError:
        return None
    return msgspec.json.decode(text, type=BuiltManifest)


def _use(entry: str) -> Found | None:
    path, manifest = entries.entry_path("built", entry), read_manifest(entry)
    if manifest is None:
        return None
    return Found(
        release=manifest.release,
        version=manifest.version,
        image=path / "objects" / _IMAGE,
        modules=path / "installed" / "lib" / "modules" / manifest.release,
        build=path / "objects",
        identity=manifest.identity,
    )


# Building


def build(wanted: Recipe, *, say: Say) -> Found:
    """Build the kernel, unless it is there. One that was interrupted goes on where it was.

    Raises NoKernel, HostLacks, NoSpace.
    """
    _check_tools()
    made_of = _sources(wanted, say)
    entry = _entry(wanted, made_of)
    if found := _use(entry):
        return found
    sources.fetch(made_of, say=say)
    with entries.locked("built", entry, say=say) as lock, entries.space_guard(f"building {wanted}", _SPACE):
        if found := _use(entry):
            return found
        staging = entries.staging("built", entry)
        build = _Build(staging, lock, say)
        if not build.has("prepared"):
            entries.check_space(_SPACE, f"building {wanted}")
            say(f"preparing the sources of Linux {made_of.version}")
            entries.discard(staging)
            _prepare(wanted, made_of, entries.staging("built", entry), build)
        build.configure(wanted)
        build.compile(wanted)
        build.finish(str(wanted), made_of.version)
        entries.publish(staging, "built", entry)
        for older in _states(entry)[:-_KEPT_STATES]:
            entries.discard(older)
    found = _use(entry)
    assert found is not None
    return found


def _check_tools() -> None:
    lacking = [package for program, package in _PACKAGES.items() if command.find(program) is None]
    if not _LIBELF.is_file():
        lacking.append("libelf-dev")
    if lacking:
        raise HostLacks(
            f"to build a kernel this machine lacks {', '.join(lacking)}",
            remedy=f"apt-get install {' '.join(lacking)} (Fedora has libelf's headers in elfutils-libelf-devel, Arch "
            "in libelf); ccache as well, if you build more than one",
        )


def _prepare(wanted: Recipe, made_of: Sources, tree: Path, build: _Build) -> None:
    """A clean source tree that is ours to change, changed as the variants want it."""
    sources.take(made_of, tree)
    if not made_of.package:
        build.make("mrproper", objects=False)
    if "fixed" in wanted.variants:
        edits.apply(edits.fixes(), tree, made_of.series)
    if "kasan" in wanted.variants:
        for folder in _COVERED:
            _instrument(tree / folder / "Makefile")
    build.is_done("prepared")


def _instrument(makefile: Path) -> None:
    try:
        text = makefile.read_text()
    except OSError as error:
        raise NoKernel(f"{makefile}: {error.strerror}", remedy="give whole kernel sources") from error
    makefile.unlink()  # a link to the sources that others use too
    makefile.write_text(f"{text}\nKCOV_INSTRUMENT := y\n")


class _Build:
    """A tree, with its objects below it. What is done leaves a file, so that a build that was killed goes on after the
    last thing that was done."""

    def __init__(self, tree: Path, lock: entries.Lock, say: Say) -> None:
        self.tree, self._lock, self._say = tree, lock, say
        self.objects = tree / "objects"
        self.log = tree / "build.log"

    def has(self, what: str) -> bool:
        return (self.tree / f".{what}").exists()

    def is_done(self, what: str, text: str = "") -> None:
        entries.write_whole(self.tree / f".{what}", text.encode())

    def make(self, *arguments: str, objects: bool = True, timeout: float = _HOUR) -> str:
        """What it said. Raises HostLacks with the end of that."""
        ccache = shutil.which("ccache")
        words = [
            "env", *(word for name in _NOT_OURS for word in ("-u", name)),
            tool("make", package="make", purpose="to build a kernel"), "-C", str(self.tree),
            *(["O=objects"] if objects else []), *([f"CC={ccache} gcc"] if ccache else []),
            f"-j{os.cpu_count() or 1}", *arguments,
        ]  # fmt: skip
        env = {
            "ARCH": "x86", "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
            "KBUILD_BUILD_USER": "sevchaos", "KBUILD_BUILD_HOST": "lab",
            "CCACHE_DIR": str(entries.entry_path("ccache", "objects")), "CCACHE_NOHASHDIR": "1",
            "CCACHE_MAXSIZE": "2G",
        }  # fmt: skip
        script = 'log=$1; shift; exec "$@" >>"$log" 2>&1'
        argv = ["bash", "-c", script, "make", str(self.log), *words]
        before = self.log.stat().st_size if self.log.exists() else 0
        done = run(argv, timeout=timeout, keep=(self._lock.fd,), env=env, watch=self._progress, every=15.0)
        said = self.log.read_bytes()[before:].decode(errors="replace")
        if done.status:
            lines = [line for line in said.splitlines() if not re.match(r"make|  [A-Z]+ ", line)]
            wrong = [line for line in lines if re.search(r"error|can't|No space", line)]
            shown = "\n".join((wrong or lines)[-12:] or said.splitlines()[-2:])
            if "No space left" in said:
                raise OSError(ENOSPC, "the compiler found no space")
            raise NoKernel(f"building the kernel failed:\n{shown}", remedy=f"the whole log is {self.log}")
        return said

    def _progress(self) -> None:
        with self.log.open("rb") as file:
            compiled = sum(1 for line in file if line.startswith((b"  CC", b"  AS", b"  LD")))
        self._say(f"  {compiled} files compiled")

    def configure(self, wanted: Recipe) -> None:
        """tinyconfig, the fragments, and whatever follows. Raises NoKernel if a line of these did not take effect."""
        if self.has("configured"):
            return
        self.objects.mkdir(exist_ok=True)
        self.make("tinyconfig")
        config = self.objects / ".config"
        own = [f'CONFIG_LOCALVERSION="-{"-".join(wanted.variants)}"\n']
        config.write_text(config.read_text() + "".join([path.read_text() for path in _fragments(wanted)] + own))
        self.make("olddefconfig")
        have = read_config(config)
        missed = [line for path in _fragments(wanted) for line in _not_taken(path.read_text(), have)]
        if missed:
            raise NoKernel(
                f"these sources did not take of the configuration of {wanted}: {', '.join(missed)}",
                remedy="this is a fault of ours, please report it with the kernel's version",
            )
        check_config(have, str(wanted))
        self.is_done("configured")

    def compile(self, wanted: Recipe) -> None:
        """And install what was compiled below the tree."""
        if self.has("compiled"):
            return
        cpus = os.cpu_count() or 1
        self._say(f"building {wanted} with {cpus} CPUs; what was compiled is kept if you interrupt this")
        began = time.monotonic()
        self.make("bzImage", "modules", timeout=6 * _HOUR)
        installed = self.tree / "installed"
        shutil.rmtree(installed, ignore_errors=True)
        self.make(f"INSTALL_MOD_PATH={installed}", "INSTALL_MOD_STRIP=1", "modules_install")
        for link in (*installed.glob("lib/modules/*/build"), *installed.glob("lib/modules/*/source")):
            link.unlink()
        self.is_done("compiled", f"{round(time.monotonic() - began)}")

    def finish(self, source: str, version: str) -> None:
        """Remove what only a linker wants, have the build find itself wherever it is moved, and say what it is."""
        for folder, _, files in os.walk(self.objects):
            here = Path(folder)
            if _KEPT_WHOLE & {*here.relative_to(self.objects).parts}:
                continue
            for name in files:
                if not _KEPT.fullmatch(name):
                    (here / name).unlink()
        (self.objects / "source").unlink(missing_ok=True)
        itself = "$(dir $(abspath $(lastword $(MAKEFILE_LIST))))"
        text = f"export KBUILD_OUTPUT := {itself}\ninclude {itself}../Makefile\n"
        (self.objects / "Makefile").write_text(text)
        release = (self.objects / "include" / "config" / "kernel.release").read_text().strip()
        seconds = int((self.tree / ".compiled").read_text())
        manifest = BuiltManifest(source, release, version, self._identity(), seconds)
        entries.write_whole(self.tree / "manifest.json", msgspec.json.encode(manifest))

    def _identity(self) -> str:
        digest = hashlib.sha256()
        pieces = (self.objects / _IMAGE, self.objects / ".config", self.objects / "Module.symvers")
        for path in (*pieces, *sorted((self.tree / "installed").rglob("*.ko"))):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _not_taken(fragment: str, have: dict[str, str]) -> Iterator[str]:
    for option, value in re.findall(r"^CONFIG_(\w+)=(.*)$", fragment, re.MULTILINE):
        if have.get(option) != value:
            yield f"{option}={value} (it is {have.get(option, 'not set')})"
    for option in re.findall(r"^# CONFIG_(\w+) is not set$", fragment, re.MULTILINE):
        if option in have:
            yield f"{option} not set (it is {have[option]})"
