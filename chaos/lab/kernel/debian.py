# SPDX-License-Identifier: Apache-2.0
"""Packages from Debian's archive, unpacked and never installed.

apt does what it is good at: it knows which packages there are, fetches them, resumes an interrupted download,
and verifies what came. `apt-get download` works without root. What is ours: which packages make up a kernel,
taking only what the lab needs out of them, giving all of them one layout, and making headers work outside /usr/src.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.cache.command import CommandResult, must, run, tool
from chaos.cache.entries import Lock, Say, megabytes
from chaos.errors import HostLacks, NoKernel
from chaos.lab.kernel import archive
from chaos.lab.kernel.archive import HOW_OTHERWISE

# An ABI name without a flavour: 6.1.0-47-amd64, 6.12.100+deb12-amd64, 6.12.90+deb12.1-amd64.
_PLAIN_ABI = re.compile(r"\d+\.\d+\.\d+(?:-\d+|\+deb\d+(?:\.\d+)?)(?:\+bpo)?-amd64")

_LIBRARY = re.compile(r"\b(?:lib[a-z0-9.+-]+|zlib1g)\b")
_LOADER = "ld-linux-x86-64.so.2"
RUNTIME = Path("usr/lib/runtime")  # in a kernel's tree: what kbuild's programs run with where the machine's is older

# Drivers of hardware that no lab has. They are two thirds of what Debian's image package weighs unpacked.
NOT_IN_A_LAB = (
    "sound",
    "drivers/bluetooth",
    "drivers/comedi",
    "drivers/gpu",
    "drivers/hwmon",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/isdn",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/usb",
    "drivers/net/wireless",
    "drivers/scsi",
    "drivers/staging",
    "drivers/usb",
    "drivers/video",
    "net/bluetooth",
    "net/mac80211",
    "net/wireless",
)


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    download: int  # bytes
    unpacked: int  # bytes, as the package says
    depends: str

    @property
    def file(self) -> str:
        """The start of the name that `apt-get download` gives it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_"


def is_plain(abi: str) -> bool:
    """Whether this is the ordinary kernel, not a flavour such as cloud or rt."""
    return _PLAIN_ABI.fullmatch(abi) is not None


def newest_abi(series: str, *, say: Say) -> tuple[str, str]:
    """The (ABI, package version) that a series such as "6.12" means: the newest of this machine's own Debian, or, where
    that has none, of any. Raises NoKernel."""
    there = whole_kernels(say=say)
    mine = [abi for abi in there if abi.startswith(f"{series}.")]
    if not mine:
        raise _unknown(f"no {series} kernel", tuple(there))
    abi = max(mine, key=own_and_newest)
    return abi, there[abi]


def known_abis(*, say: Say) -> tuple[str, ...]:
    """The ABI names of the kernels in the archive, oldest first. Of some the headers are gone."""
    answer = archive.ask("pkgnames", "linux-image-", say=say)
    names = {line.removeprefix("linux-image-") for line in answer.split()}
    return tuple(sorted((n for n in names if is_plain(n)), key=by_number))


def whole_kernels(*, say: Say) -> dict[str, str]:
    """The version of the image package, by ABI, oldest first, of the kernels of which image and headers are both in the
    archive: a name may outlive its packages."""
    known = known_abis(say=say)
    # `show` would take a name without a package for a pattern, and try it on every name there is: 20 seconds in all.
    names = (f"linux-{part}-{abi}" for abi in known for part in ("image", "headers"))
    answer = archive.ask("madison", *names, say=say)
    versions: dict[str, str] = {}
    for name, version, _ in re.findall(r"^ *(\S+) \| *(\S+) \| (.*)$", answer, flags=re.MULTILINE):
        versions.setdefault(name, version)  # the newest comes first
    return {
        abi: versions[f"linux-image-{abi}"]
        for abi in known
        if f"linux-headers-{abi}" in versions and f"linux-image-{abi}" in versions
    }


def kernel_packages(abi: str, *, say: Say) -> tuple[Package, ...]:
    """The packages of one kernel: image, headers, kbuild, and what each of these is divided into; and the libraries of
    kbuild's programs, where this machine's C library is too old for them. Raises NoKernel."""
    image, headers = f"linux-image-{abi}", f"linux-headers-{abi}"
    found = {p.name: p for p in _show([image, headers], say=say)}
    for name in (image, headers):
        if name not in found:
            raise _unknown(f"no package {name}", known_abis(say=say))
    # From 7.2 on the image is empty and depends on its parts. The name of kbuild follows the series in 6.1 and the ABI
    # later: the headers say which.
    parts = re.findall(rf"linux-(?:base|binary|modules)-{re.escape(abi)}(?![^\s,|()])", found[image].depends)
    parts += re.findall(r"linux-(?:headers|kbuild)-[^\s,|()]+", found[headers].depends)
    more = _show_all([part for part in dict.fromkeys(parts) if part not in found], say=say)
    return found[image], found[headers], *more, *_runtime(more, say=say)


def _runtime(kernel: Sequence[Package], *, say: Say) -> tuple[Package, ...]:
    """The libraries that kbuild's programs want, where this machine's own are older than those want."""
    kbuild = next((p for p in kernel if p.name.startswith("linux-kbuild-")), None)
    wanted = re.search(r"\blibc6 \(>= (\d+)\.(\d+)", kbuild.depends) if kbuild is not None else None
    name, here = platform.libc_ver()
    if kbuild is None or wanted is None:
        return ()
    if name == "glibc" and tuple(map(int, here.split(".")[:2])) >= tuple(map(int, wanted.groups())):
        return ()
    found: dict[str, Package] = {}
    todo = [kbuild]
    while todo:
        names = _LIBRARY.findall(todo.pop().depends)
        more = _show_all([name for name in names if name not in found], say=say)
        found |= {p.name: p for p in more}
        todo += more
    return tuple(found.values())


def versions(name: str, *, say: Say) -> list[Package]:
    """Every version of a package in the archive, newest first. Raises NoKernel if there is none."""
    found = _show([name], say=say, every=True)
    if not found:
        raise _unknown(f"no package {name}", ())
    return found


def _show_all(names: Sequence[str], *, say: Say) -> tuple[Package, ...]:
    found = {p.name: p for p in _show(names, say=say)} if names else {}
    for name in names:
        if name not in found:
            raise _unknown(f"no package {name}", ())
    return tuple(found[name] for name in names)


def _show(names: Sequence[str], *, say: Say, every: bool = False) -> list[Package]:
    """What apt would install of these packages, or every version, newest first; those that it does not know are left
    out."""
    answer = archive.ask("show", *([] if every else ["--no-all-versions"]), *names, say=say)
    shown = []
    for paragraph in answer.split("\n\n"):
        field = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, flags=re.MULTILINE))
        if "Filename" not in field:  # installed, but no longer in any archive that apt knows
            continue
        shown.append(
            Package(
                name=field["Package"],
                version=field["Version"],
                download=int(field["Size"]),
                unpacked=int(field.get("Installed-Size", "0")) << 10,
                depends=field.get("Depends", ""),
            )
        )
    return shown


def by_number(abi: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", abi.removesuffix("-amd64")))


def own_and_newest(abi: str) -> tuple[bool, tuple[int, ...]]:
    own = f"+deb{_debian()}" in abi if "+deb" in abi else True
    return own, by_number(abi)


def _debian() -> str:
    """The number of this machine's Debian, "" if it is another distribution."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    return release.get("VERSION_ID", "") if release.get("ID") == "debian" else ""


def _unknown(what: str, known: Sequence[str]) -> NoKernel:
    there = f"; it has {', '.join(known)}" if known else ""
    return NoKernel(
        f"Debian's archive has {what}{there}",
        remedy="`sevchaos kernel list --refresh` fetches newer lists; old kernels leave Debian's archive."
        f" Or {HOW_OTHERWISE}",
    )


# Fetching

_BROKEN_OFF = (
    "is there a network? What has come is kept, and the next try goes on from it. If the archive has moved on, "
    "`sevchaos kernel list --refresh` first"
)
STALLED = 30.0
"""After how many seconds without a byte that is said."""
_DAMAGED = (
    "what came is not what Debian signed, and none of it is used: the mirror or a proxy damaged it. Try again, or take "
    "another mirror"
)


def download(wanted: Sequence[Package], into: Path, *, lock: Lock, say: Say) -> list[Path]:
    """Fetch the packages into a directory, resuming what is there. Gives their archives, in order.

    apt compares each file with the signed hash, a complete one that was there before as well.
    """
    versions = (f"{p.name}={p.version}" for p in wanted)
    done = run(
        archive.apt("apt-get", "download", "-q", *versions, say=say),
        timeout=3600,
        cwd=into,
        keep=(lock.fd,),
        watch=_progress(into, sum(p.download for p in wanted), say),
    )
    what = "fetching " + ", ".join(p.name for p in wanted)
    damaged = re.findall(r"/([^/\s_]+)_[^/\s]*\.deb +Hash Sum mismatch", done.output)
    for name in damaged:  # apt leaves it, and would go on from it
        for archive_ in into.glob(f"{name}_*.deb"):
            archive_.unlink()
    must(_errors_alone(done), what, error=NoKernel, remedy=_DAMAGED if damaged else _BROKEN_OFF)
    return [_archive_of(package, into) for package in wanted]


def _errors_alone(done: CommandResult) -> CommandResult:
    """Without the lines in which apt says what it is trying, if it says what went wrong."""
    errors = done.output[found.start() :] if (found := re.search(r"^E: ", done.output, re.MULTILINE)) else done.output
    return CommandResult(done.argv, done.status, errors)


def _progress(into: Path, total: int, say: Say) -> Callable[[], None]:
    """Says how much has come, and if nothing comes any more, now and then, for how long that has been so."""
    last, since, told = -1, time.monotonic(), 0.0

    def tell() -> None:
        nonlocal last, since, told
        here, now = sum(p.stat().st_size for p in into.glob("*.deb")), time.monotonic()
        stalled = now - since
        if here != last:
            last, since, told = here, now, 0.0
            say(f"  {megabytes(min(here, total))} of {megabytes(total)}")
        elif stalled - told >= STALLED:
            told = stalled
            say(f"  {megabytes(min(here, total))} of {megabytes(total)}, and nothing more for {stalled:.0f} s")

    return tell


def _archive_of(package: Package, where: Path) -> Path:
    found = [p for p in where.iterdir() if p.name.startswith(package.file) and p.suffix == ".deb"]
    if len(found) != 1:
        raise HostLacks(
            f"apt-get download said it was done, but {package.file}*.deb is not there",
            remedy="`sevchaos kernel clean`, then try again",
        )
    return found[0]


def unpack(archive: Path, into: Path, *, lock: Lock, leave: Sequence[str] = ()) -> None:
    """Unpack an archive, leaving out what matches the patterns of `leave` (tar's)."""
    dpkg_deb = tool("dpkg-deb", package="dpkg", purpose="to unpack Debian's packages")
    if not leave:
        done = run([dpkg_deb, "-x", str(archive), str(into)], timeout=600, keep=(lock.fd,))
    else:
        # dpkg-deb cannot leave things out, tar can. pipefail, or a truncated archive would pass.
        script = 'set -o pipefail; "$1" --fsys-tarfile "$2" | tar -x -C "$3" "${@:4}"'
        excludes = [f"--exclude={pattern}" for pattern in leave]
        done = run(
            ["bash", "-c", script, "unpack", dpkg_deb, str(archive), str(into), *excludes],
            timeout=600,
            keep=(lock.fd,),
        )
    remedy = "`sevchaos kernel clean` removes the damaged copy; then try again"
    must(done, f"unpacking {archive.name}", remedy=remedy)


def unpack_kernel(archives: Sequence[Path], tree: Path, abi: str, *, lock: Lock) -> None:
    """Make a tree of boot/, lib/modules/, usr/src/ and usr/lib/ that works where it stands."""
    modules = tree / "lib" / "modules" / abi
    kept = (f"./{place}/{abi}/kernel/" for place in ("lib/modules", "usr/lib/modules"))
    leave = ["./usr/share", *(f"{kernel}{part}" for kernel in kept for part in NOT_IN_A_LAB)]
    tree.mkdir(parents=True)
    for package in archives:
        into = tree if package.name.startswith("linux-") else tree / RUNTIME
        into.mkdir(parents=True, exist_ok=True)
        unpack(package, into, lock=lock, leave=leave)
    _lay_out(tree, abi)
    if (tree / RUNTIME).is_dir():
        _give_runtime(tree)
    depmod = tool("depmod", package="kmod", purpose="to index a kernel's modules")
    must(
        run([depmod, "-b", str(tree), abi], timeout=300, keep=(lock.fd,)),
        f"indexing the modules of {abi}",
        remedy="`sevchaos kernel clean`, then try again",
    )
    _localise(tree, modules, abi)


def _lay_out(tree: Path, abi: str) -> None:
    """Debian 13 has its modules below usr/lib, and 7.2 brought what was in boot to them."""
    if (tree / "usr" / "lib" / "modules").is_dir() and not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    modules, boot = tree / "lib" / "modules" / abi, tree / "boot"
    boot.mkdir(exist_ok=True)
    for name in ("vmlinuz", "config", "System.map"):
        if (modules / name).is_file() and not (boot / f"{name}-{abi}").exists():
            (modules / name).rename(boot / f"{name}-{abi}")


def _give_runtime(tree: Path) -> None:
    """Have each program of kbuild run with the libraries that came along, wherever the tree is moved."""
    libraries = tree / RUNTIME / "usr" / "lib" / "x86_64-linux-gnu"
    for path in [p for p in (tree / "usr" / "lib").glob("linux-kbuild-*/**/*") if p.is_file() and not p.is_symlink()]:
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
        program = path.with_name(f"{path.name}.elf")
        path.rename(program)
        up = "../" * (len(path.parent.relative_to(tree).parts))
        there = f'"${{0%/*}}/{up}{libraries.relative_to(tree)}'
        # The name that it was called by, for two of them look for others beside them.
        path.write_text(f'#!/bin/sh\nexec {there}/{_LOADER}" --library-path {there}" --argv0 "$0" "$0.elf" "$@"\n')
        path.chmod(0o755)


def _localise(tree: Path, modules: Path, abi: str) -> None:
    """Point what names /usr/src at the unpacked tree, relative to itself: it works wherever it is moved."""
    headers = tree / "usr" / "src" / f"linux-headers-{abi}"
    makefile = headers / "Makefile"
    text = makefile.read_text()
    here = "$(dir $(lastword $(MAKEFILE_LIST)))"
    local = re.sub(r"^include /usr/src/", lambda _: f"include {here}../", text, flags=re.MULTILINE)
    # From 7.3 on; at once, for the list of makefiles grows.
    local = local.replace(f"KBUILD_OUTPUT=/usr/src/{headers.name}\n", f"KBUILD_OUTPUT:=$(abspath {here})\n")
    if local == text or "/usr/src" in local:
        raise NoKernel(
            f"the headers of {abi} are not laid out as Debian's others are: {makefile} reads {text[:200]!r}",
            remedy="this is a fault of ours, please report it; meanwhile use a build tree (--kernel PATH)",
        )
    makefile.write_text(local)
    for link in (modules / "build", modules / "source"):
        if link.is_symlink():
            target = link.readlink()
            link.unlink()
            if target.is_relative_to("/usr/src"):
                link.symlink_to(os.path.relpath(tree / target.relative_to("/"), modules.resolve()))


def space_needed(wanted: Sequence[Package]) -> int:
    """Bytes of disk that fetching and unpacking take at their highest."""
    return sum(p.download + p.unpacked for p in wanted)
