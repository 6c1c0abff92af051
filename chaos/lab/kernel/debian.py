# SPDX-License-Identifier: Apache-2.0
"""Packages from Debian's archive, unpacked and never installed.

apt does what it is good at: it knows which packages there are, fetches them, resumes an interrupted download,
and verifies what came. `apt-get download` works without root. What is ours: which packages make up a kernel,
taking only what the lab needs out of them, and making headers work outside /usr/src.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.cache.command import must, run, tool
from chaos.cache.entries import Lock, Say, megabytes
from chaos.errors import HostLacks, NoKernel

APT_LISTS = Path("/var/lib/apt/lists")

# An ABI name without a flavour: 6.1.0-47-amd64, 6.12.100+deb12-amd64, 6.12.90+deb12.1-amd64.
_PLAIN_ABI = re.compile(r"\d+\.\d+\.\d+(?:-\d+|\+deb\d+(?:\.\d+)?)(?:\+bpo)?-amd64")
_HOW_OTHERWISE = (
    "name another kernel: --kernel running, --kernel installed:RELEASE, or --kernel PATH of a kernel build tree"
)

# Drivers of hardware that no lab has. They are two thirds of what Debian's image package weighs unpacked.
_NOT_IN_A_LAB = (
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
    def archive(self) -> str:
        """The start of the name that `apt-get download` gives the file."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_"


def is_plain(abi: str) -> bool:
    """Whether this is the ordinary kernel, not a flavour such as cloud or rt."""
    return _PLAIN_ABI.fullmatch(abi) is not None


def newest_abi(series: str) -> tuple[str, str]:
    """The newest (ABI, package version) of a series such as "6.12" that apt knows. Raises NoKernel."""
    known = known_abis()
    for abi in sorted((a for a in known if a.startswith(f"{series}.")), key=_by_number, reverse=True):
        # A name may outlive its packages: only one whose image and headers are both there will do.
        found = {p.name: p for p in _show([f"linux-image-{abi}", f"linux-headers-{abi}"])}
        if len(found) == 2:
            return abi, found[f"linux-image-{abi}"].version
    raise _unknown(f"no {series} kernel", known)


def known_abis() -> tuple[str, ...]:
    """The ABI names of the kernels that apt knows, oldest first."""
    done = run([_apt("apt-cache"), "pkgnames", "linux-image-"], timeout=60, merge=False)
    names = {line.removeprefix("linux-image-") for line in done.output.split()}
    return tuple(sorted((n for n in names if is_plain(n)), key=_by_number))


def kernel_packages(abi: str) -> tuple[Package, ...]:
    """The packages of one kernel: image, both headers, kbuild. Raises NoKernel."""
    image, headers = f"linux-image-{abi}", f"linux-headers-{abi}"
    found = {p.name: p for p in _show([image, headers])}
    for name in (image, headers):
        if name not in found:
            raise _unknown(f"no package {name}", known_abis())
    # The name of kbuild follows the series in 6.1 and the ABI in 6.12: the headers say which.
    more = [
        dep for dep in re.findall(r"linux-(?:headers|kbuild)-[^\s,|()]+", found[headers].depends) if dep not in found
    ]
    return found[image], found[headers], *_show_all(more)


def packages(*names: str) -> tuple[Package, ...]:
    """The newest version of each package. Raises HostLacks."""
    return _show_all(names)


def _show_all(names: Sequence[str]) -> tuple[Package, ...]:
    found = {p.name: p for p in _show(names)}
    for name in names:
        if name not in found:
            raise _unknown(f"no package {name}", ())
    return tuple(found[name] for name in names)


def _show(names: Sequence[str]) -> list[Package]:
    """What apt would install of these packages; those that it does not know are left out."""
    done = run([_apt("apt-cache"), "show", "--no-all-versions", *names], timeout=60, merge=False)
    shown = []
    for paragraph in done.output.split("\n\n"):
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


def _by_number(abi: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", abi.removesuffix("-amd64")))


def _apt(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise NoKernel("kernels named debian:… are fetched with apt, and this machine has none", remedy=_HOW_OTHERWISE)
    return found


def _unknown(what: str, known: Sequence[str]) -> NoKernel:
    if not any(APT_LISTS.glob("*_Packages*")):
        return NoKernel(
            f"apt knows {what}, because its package lists were never fetched here",
            remedy="run `apt-get update` as root once, then try again",
        )
    there = f"; it knows {', '.join(known)}" if known else ""
    return NoKernel(
        f"apt knows {what}{there}",
        remedy=f"`apt-get update`, as root, may bring new ones; old ones leave Debian's archive. Or {_HOW_OTHERWISE}",
    )


# Fetching


def download(wanted: Sequence[Package], into: Path, *, lock: Lock, say: Say) -> list[Path]:
    """Fetch the packages into a directory, resuming what is there. Gives their archives, in order.

    apt compares each file with the signed hash, a complete one that was there before as well.
    """
    argv = [_apt("apt-get"), "download", "-q"]
    if os.geteuid() == 0:
        # Root's apt drops to a user who cannot write to root's cache, warns, and goes on as root.
        argv += ["-o", "APT::Sandbox::User=root"]
    for option in ("Retries=3", "http::Timeout=30", "https::Timeout=30"):
        argv += ["-o", f"Acquire::{option}"]
    done = run(
        [*argv, *(f"{p.name}={p.version}" for p in wanted)],
        timeout=3600,
        cwd=into,
        keep=(lock.fd,),
        watch=_progress(into, sum(p.download for p in wanted), say),
    )
    what = "fetching " + ", ".join(p.name for p in wanted)
    must(
        done,
        what,
        error=NoKernel,
        remedy="is there a network? What has come is kept, and the next try goes on from it."
        " If the archive has moved on, run `apt-get update` as root first",
    )
    return [_archive_of(package, into) for package in wanted]


def _progress(into: Path, total: int, say: Say) -> Callable[[], None]:
    def tell() -> None:
        here = sum(p.stat().st_size for p in into.glob("*.deb"))
        say(f"  {megabytes(min(here, total))} of {megabytes(total)}")

    return tell


def _archive_of(package: Package, where: Path) -> Path:
    found = [p for p in where.iterdir() if p.name.startswith(package.archive) and p.suffix == ".deb"]
    if len(found) != 1:
        raise HostLacks(
            f"apt-get download said it was done, but {package.archive}*.deb is not there",
            remedy="`sevchaos lab clean`, then try again",
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
    remedy = "`sevchaos lab clean` removes the damaged copy; then try again"
    must(done, f"unpacking {archive.name}", remedy=remedy)


def unpack_kernel(archives: Sequence[Path], tree: Path, abi: str, *, lock: Lock) -> None:
    """Make a tree of boot/, lib/modules/, usr/src/ and usr/lib/ that works where it stands."""
    modules = tree / "lib" / "modules" / abi
    leave = ["./usr/share", *(f"./lib/modules/{abi}/kernel/{part}" for part in _NOT_IN_A_LAB)]
    tree.mkdir(parents=True)
    for archive in archives:
        unpack(archive, tree, lock=lock, leave=leave)
    depmod = tool("depmod", package="kmod", purpose="to index a kernel's modules")
    must(
        run([depmod, "-b", str(tree), abi], timeout=300, keep=(lock.fd,)),
        f"indexing the modules of {abi}",
        remedy="`sevchaos lab clean`, then try again",
    )
    _localise(tree, modules, abi)


def _localise(tree: Path, modules: Path, abi: str) -> None:
    """Point what names /usr/src at the unpacked tree, relative to itself: it works wherever it is moved."""
    headers = tree / "usr" / "src" / f"linux-headers-{abi}"
    makefile = headers / "Makefile"
    text = makefile.read_text()
    here = "$(dir $(lastword $(MAKEFILE_LIST)))../"
    local = re.sub(r"^include /usr/src/", lambda _: f"include {here}", text, flags=re.MULTILINE)
    if local == text or "/usr/src" in local:
        raise NoKernel(
            f"the headers of {abi} are not laid out as Debian 12's are: {makefile} reads {text[:200]!r}",
            remedy="this is a fault of ours, please report it; meanwhile use a build tree (--kernel PATH)",
        )
    makefile.write_text(local)
    for link in (modules / "build", modules / "source"):
        if link.is_symlink():
            target = link.readlink()
            link.unlink()
            if target.is_relative_to("/usr/src"):
                link.symlink_to(Path("../../..") / target.relative_to("/"))


def space_needed(wanted: Sequence[Package]) -> int:
    """Bytes of disk that fetching and unpacking take at their highest."""
    return sum(p.download + p.unpacked for p in wanted)
