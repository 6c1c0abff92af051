# SPDX-License-Identifier: Apache-2.0
"""Sources that a kernel is built from: Debian's, of the very version that one of its kernels was built from, or a copy
of a tree of the user's, which is never changed.

Debian's are in the cache, without the drivers of hardware that no lab has: what is left of those is what the
configuration reads.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EMLINK, EPERM, EXDEV
from pathlib import Path

from chaos.cache import entries
from chaos.cache.command import must, run, tool
from chaos.cache.entries import Say
from chaos.errors import NoKernel
from chaos.lab.kernel import debian

_UNPACKED = 700 << 20  # bytes
_NO_LAB_HAS = {*debian.NOT_IN_A_LAB, "drivers/accel", "drivers/clk", "drivers/pinctrl"} - {"drivers/video"}
_OTHER_CPUS = ("arm", "arm64", "m68k", "mips", "parisc", "powerpc", "riscv", "s390", "sh", "sparc")
_LEFT_OUT = (
    "*/Documentation/*/*",
    *(f"*/{place}/*.[chS]" for place in sorted(_NO_LAB_HAS)),
    *(f"*/arch/{name}/{what}" for name in _OTHER_CPUS for what in ("*.[chS]", "boot/*")),
    "*/tools/perf/*",
    "*/tools/testing/*",
)
_KEPT_NOW = hashlib.sha256("".join(_LEFT_OUT).encode()).hexdigest()[:6]  # part of the name: sources change with it
# Results of a build, which a tree of the user's may be full of. What is left of them, `make mrproper` removes.
_BUILT = re.compile(
    r".*\.(?:o|a|ko|cmd|mod|mod\.c|swp)|vmlinux(?:\.o|\.unstripped)?|\.config.*|\.git|bzImage|System\.map"
    r"|Module\.symvers|modules\.(?:order|builtin.*)|tags|TAGS|cscope\..*|\.version|\.tmp_.*"
)


@dataclass(frozen=True, slots=True)
class Sources:
    """A source tree. `name` is what it is called in the cache; `package` is the version of Debian's packages, "" if it
    is a tree of the user's."""

    name: str
    version: str  # x.y.z
    path: Path
    package: str = ""

    @property
    def series(self) -> str:
        return ".".join(self.version.split(".")[:2])


def of_debian(version: str) -> Sources:
    """The sources of the kernel packages of this version: "6.12.117-1~deb12u1"; they need not be here. Raises
    NoKernel."""
    number = re.match(r"\d+\.\d+\.\d+", version)
    if number is None:
        raise NoKernel(
            f"{version!r} is no version of a kernel of Debian's", remedy="name one of `sevchaos kernel list`"
        )
    name = f"linux-{version.replace(':', '.')}-{_KEPT_NOW}"
    return Sources(name, number[0], entries.entry_path("sources", name), version)


def fetch(sources: Sources, *, say: Say) -> None:
    """Have Debian's be here. Raises NoKernel, NoSpace, HostLacks."""
    if sources.package and not sources.path.is_dir():
        _fetch(f"linux-source-{sources.series}", sources.package, sources, say)


def _fetch(package: str, version: str, sources: Sources, say: Say) -> None:
    there = debian.versions(package, say=say)
    wanted = next((p for p in there if p.version == version), None)
    if wanted is None:
        known = ", ".join(p.version for p in there) or "none"
        raise NoKernel(
            f"Debian's archive has no {package} of version {version}; it has {known}",
            remedy="build one of these, by its ABI's name (`sevchaos kernel list --all`), or use --from PATH",
        )
    what = f"the sources of Linux {version}"
    with (
        entries.locked("sources", sources.name, say=say) as lock,
        entries.space_guard(what, wanted.download + _UNPACKED),
    ):
        if sources.path.is_dir():  # whoever had the lock before us fetched them
            return
        staging = entries.staging("sources", sources.name)
        entries.check_space(wanted.download + _UNPACKED, what)
        say(f"fetching {what} ({entries.megabytes(wanted.download)})")
        (archive,) = debian.download([wanted], staging, lock=lock, say=say)
        say("unpacking them")
        tree = staging / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of a process that was killed
        tree.mkdir()
        tool("xz", package="xz-utils", purpose="to unpack the kernel's sources")
        script = (
            'set -o pipefail; "$1" --fsys-tarfile "$2" | tar -xO --wildcards "./usr/src/$3.tar.*"'
            ' | xz -dc | tar -x -C "$4" --strip-components=1 "${@:5}"'
        )
        dpkg_deb = tool("dpkg-deb", package="dpkg", purpose="to unpack Debian's packages")
        argv = ["bash", "-c", script, "unpack", dpkg_deb, str(archive), package, str(tree)]
        done = run([*argv, *(f"--exclude={pattern}" for pattern in _LEFT_OUT)], timeout=1200, keep=(lock.fd,))
        remedy = "`sevchaos kernel clean` removes the damaged copy; then try again"
        must(done, f"unpacking {archive.name}", remedy=remedy)
        entries.publish(tree, "sources", sources.name)
        entries.discard(staging)


def of_tree(tree: Path) -> Sources:
    """A tree of the user's, as it is. Raises NoKernel."""
    if not (tree / "Kconfig").is_file() or not (tree / "arch" / "x86").is_dir():
        raise NoKernel(f"{tree} is no kernel source tree", remedy="give the directory that has Kconfig and arch/x86")
    version = ".".join(_make_variable(tree, word) for word in ("VERSION", "PATCHLEVEL", "SUBLEVEL"))
    digest = hashlib.sha256(str(tree).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", tree.name).strip(".-") or "tree"  # kbuild takes no spaces and colons
    return Sources(f"{name}-{digest}", version, tree)


def _make_variable(tree: Path, name: str) -> str:
    found = re.search(rf"^{name} = (\d+)$", (tree / "Makefile").read_text(), re.MULTILINE)
    if found is None:
        raise NoKernel(f"{tree}/Makefile has no {name}", remedy="give a kernel source tree")
    return found[1]


def take(sources: Sources, into: Path) -> None:
    """Have in a folder of the cache what a build reads of them. Of Debian's these are the same files once more, for the
    price of their names: whoever changes one makes it anew. Raises NoKernel if something cannot be read, or if a tree
    of the user's was changed meanwhile."""
    before = identity(sources)
    try:
        for path in _files(sources.path):
            target = into / path.relative_to(sources.path)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True)
            _take(path, target, link=bool(sources.package))
    except (PermissionError, FileNotFoundError, shutil.Error) as error:
        remedy = "let it be read, or do not change the tree meanwhile; then try again"
        raise NoKernel(f"{sources.path} cannot be copied: {error}", remedy=remedy) from error
    if identity(sources) != before:
        raise NoKernel(f"{sources.path} was changed while it was copied", remedy="try again when it is as you want it")


def _take(path: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(path, target, follow_symlinks=False)
            return
        except OSError as error:
            if error.errno not in (EXDEV, EPERM, EMLINK):  # another file system, or one that has no links
                raise
    shutil.copy2(path, target, follow_symlinks=False)


def identity(sources: Sources) -> str:
    """What a tree of the user's is now: over the names, sizes and times of its files. Of one of Debian's its name says
    all."""
    digest = hashlib.sha256(sources.name.encode())
    if not sources.package:
        for path in _files(sources.path):
            stat = path.lstat()
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(tree: Path) -> Iterable[Path]:
    """The files and links of a tree that a build reads, without those that it makes: as git tells them where it is one
    of git's, or else by their names."""
    if (tree / ".git").exists() and shutil.which("git"):
        listed = run(["git", "-C", str(tree), "ls-files", "-coz", "--exclude-standard"], timeout=120, merge=False)
        if listed.status == 0:
            paths = (tree / name for name in dict.fromkeys(listed.output.split("\0")) if name)
            return [path for path in paths if path.is_symlink() or path.is_file()]
    return _walk(tree)


def _walk(tree: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(tree):
        here = Path(folder)
        links = [name for name in subfolders if (here / name).is_symlink()]
        subfolders[:] = sorted(n for n in subfolders if n not in links and not _BUILT.fullmatch(n))
        if here in (tree / "include", tree / "arch" / "x86" / "include"):
            subfolders[:] = [name for name in subfolders if name not in ("config", "generated")]
        yield from (here / name for name in sorted((*links, *files)) if not _BUILT.fullmatch(name))
