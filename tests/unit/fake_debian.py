# SPDX-License-Identifier: Apache-2.0
"""A Debian archive of tiny packages, and an apt that serves it: real .deb files, no network.

The packages have the traits that matter of the real ones: a headers Makefile of one line that names /usr/src,
kbuild under another name than the ABI's in one series, links that lead to /usr/src. Files in the archive's
directory steer the fake apt: `offline`, `full`, `full-for-lists`, `damaged`, `hang-after-first`; everything it is
asked goes to `log`.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.lab.kernel import archive

CONFIG = """#
# Automatically generated file; DO NOT EDIT.
# Linux/x86 {version} Kernel Configuration
#
CONFIG_MODULES=y
CONFIG_KVM_AMD=m
CONFIG_KVM_AMD_SEV=y
CONFIG_CRYPTO_DEV_CCP_DD=m
CONFIG_CRYPTO_DEV_SP_PSP=y
CONFIG_CGROUP_MISC=y
CONFIG_PARAVIRT_XXL=y
CONFIG_KPROBES=y
CONFIG_PCI_MSI=y
CONFIG_VIRTIO_PCI=m
CONFIG_VIRTIO_CONSOLE=m
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_DEVTMPFS=y
CONFIG_TMPFS=y
CONFIG_USERFAULTFD=y
# CONFIG_MODULE_SIG_FORCE is not set
"""

MAKEFILE = "include /usr/src/linux-headers-{common}/Makefile\n"

APT_CACHE = """#!{python}
import pathlib, sys
archive = pathlib.Path({archive!r})
words = sys.argv[1:]
while words[0] == "-o":
    words = words[2:]
with (archive / "log").open("a") as log:
    print("apt-cache", *words, file=log)
index = archive / "index"
if (archive / "full-for-lists").exists():
    sys.exit("E: Write error - write (28: No space left on device)\\nE: The package lists could not be parsed.")
if words[0] == "pkgnames":
    for line in (index / "names").read_text().split():
        if line.startswith(words[1]):
            print(line)
elif words[0] == "madison":
    for name in words[1:]:
        if (index / (name + ".control")).exists():
            text = (index / (name + ".control")).read_text()
            version = next(line for line in text.splitlines() if line.startswith("Version: ")).split()[1]
            print(name.rjust(10), version.rjust(10), "http://mirror.example bookworm/main amd64 Packages", sep=" | ")
elif words[0] == "show":
    for name in words[1:]:
        if (index / (name + ".control")).exists():
            print((index / (name + ".control")).read_text(), end="\\n\\n")
"""

APT_GET = """#!{python}
import os, pathlib, shutil, sys, time
archive = pathlib.Path({archive!r})
def log(*words):
    with (archive / "log").open("a") as file:
        print(*words, file=file)
words, options = sys.argv[1:], {{}}
while words[0] == "-o":
    options.update([words[1].split("=", 1)])
    words = words[2:]
if "--print-uris" in words:
    for place in (archive / "sources").read_text().split():
        print("'" + place + "/InRelease' somewhere 0 ")
    sys.exit()
if (archive / "offline").exists():
    sys.exit("E: Failed to fetch: Could not resolve the host")
if (archive / "full").exists():
    sys.exit("E: You don't have enough free space in /var/cache/apt/archives/.")
log("apt-get", *words)
if words[0] == "update":
    for line in pathlib.Path(options["Dir::Etc::SourceList"]).read_text().splitlines():
        *_, mirror, suite, component = line.split()
        if not (archive / ("no-" + suite)).exists():
            place = mirror.removeprefix("http://").replace("/", "_")
            name = place + "dists_" + suite + "_" + component + "_binary-amd64_Packages"
            (pathlib.Path(options["Dir::State::Lists"]) / name).touch()
    print("W: Some index files failed to download.")
    sys.exit()
wanted = [word for word in words if "=" in word]
(archive / "pid").write_text(str(os.getpid()))
for number, want in enumerate(wanted):
    name, version = want.split("=")
    source = archive / (name + ".deb")
    there = pathlib.Path(name + "_" + version.replace(":", "%3a") + "_amd64.deb")
    if (archive / "damaged").exists():
        there.write_bytes(b"damaged")
        url = "http://mirror.example/pool/" + name + "_" + version.partition(":")[2] + "_amd64.deb"
        print("Get:1 " + url)
        sys.exit("E: Failed to fetch " + url + "  Hash Sum mismatch")
    if there.exists() and there.read_bytes() == source.read_bytes():
        log("kept", name)
        continue
    shutil.copy(source, there)
    log("fetched", name)
    if number == 0 and (archive / "hang-after-first").exists():
        time.sleep(60)
"""

DEPMOD = """#!/bin/sh
# depmod -b TREE RELEASE
test "$1" = -b || exit 2
cd "$2/lib/modules/$3" && find kernel -name '*.ko' | sed 's/$/:/' >modules.dep
"""


def static_elf(*, interpreter: bool = False) -> bytes:
    """The smallest file that looks like a program, with one segment and perhaps a PT_INTERP."""
    kinds = [1, 3] if interpreter else [1]
    head = bytearray(64)
    head[:8] = bytes.fromhex("7f454c4602010100")
    head[32:40] = (64).to_bytes(8, "little")
    head[54:56] = (56).to_bytes(2, "little")
    head[56:58] = len(kinds).to_bytes(2, "little")
    total = 64 + 56 * len(kinds) + 100
    for kind in kinds:
        segment = bytearray(56)
        segment[:4] = kind.to_bytes(4, "little")
        segment[32:40] = total.to_bytes(8, "little")
        head += segment
    return bytes(head) + b"x" * 100


class FakeDebian:
    """The archive. Make one, `install` it in front of PATH, add kernels."""

    def __init__(self, where: Path) -> None:
        self.where = where
        (where / "index").mkdir(parents=True)
        (where / "bin").mkdir()
        (where / "keyring.gpg").touch()
        (where / "sources").write_text(
            "http://mirror.example/debian/dists/bookworm http://mirror.example/debian/dists/bookworm-updates"
        )
        (where / "index" / "names").touch()
        for name, text in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("depmod", DEPMOD)):
            program = where / "bin" / name
            program.write_text(text.format(python=sys.executable, archive=str(where)))
            program.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.where / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def log(self) -> list[str]:
        file = self.where / "log"
        return file.read_text().splitlines() if file.exists() else []

    def kill_apt(self) -> None:
        """Kill the apt-get that runs, as a power cut would, and anything but gently."""
        os.kill(int((self.where / "pid").read_text()), signal.SIGKILL)

    def switch(self, name: str, on: bool = True) -> None:
        if on:
            (self.where / name).touch()
        else:
            (self.where / name).unlink()

    def lists_changed(self) -> None:
        now = archive.fetched().stat().st_mtime_ns
        os.utime(archive.fetched(), ns=(now, now + 10**9))

    def add(self, name: str, version: str, files: dict[str, str | bytes], *, depends: str = "") -> None:
        root = self.where / "build" / name
        shutil.rmtree(root, ignore_errors=True)
        for path, content in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str) and content.startswith("-> "):
                target.symlink_to(content.removeprefix("-> "))
            elif isinstance(content, str):
                target.write_text(content)
            else:
                target.write_bytes(content)
                if content.startswith(b"\x7fELF"):
                    target.chmod(0o755)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <n@example>\n"
        control += f"Depends: {depends}\n" if depends else ""
        control += "Installed-Size: 64\nDescription: a package of the tests\n"
        (root / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (root / "DEBIAN" / "control").write_text(control)
        deb = self.where / f"{name}.deb"
        subprocess.run(
            ["dpkg-deb", "-Zgzip", "--root-owner-group", "-b", root, deb],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=30,
        )
        size = deb.stat().st_size
        (self.where / "index" / f"{name}.control").write_text(control + f"Filename: {deb.name}\nSize: {size}\n")
        self.add_name(name)

    def add_name(self, name: str) -> None:
        """A name without a package, as an archive that has moved on leaves them."""
        with (self.where / "index" / "names").open("a") as names:
            print(name, file=names)

    def remove(self, name: str) -> None:
        (self.where / "index" / f"{name}.control").unlink()

    def add_kernel(
        self,
        abi: str,
        version: str,
        *,
        kbuild: str = "",
        config: str = CONFIG,
        makefile: str = MAKEFILE,
        modules: str = "lib/modules",
        program: bytes = b"modpost",
        libraries: str = "libc6 (>= 2.34)",
    ) -> None:
        """As Debian 12 packages it; 13 has its `modules` below usr/lib."""
        files = self._headers(abi, version, kbuild or _kbuild(abi), config, makefile, modules, program, libraries)
        self.add(
            f"linux-image-{abi}",
            version,
            {
                f"boot/vmlinuz-{abi}": b"image of " + version.encode(),
                f"boot/config-{abi}": files["config"],
                f"boot/System.map-{abi}": "ffff T _text\n",
                **_modules(f"{modules}/{abi}"),
                f"{modules}/{abi}/modules.builtin": "",
                f"usr/share/doc/linux-image-{abi}/copyright": "words",
            },
        )

    def add_kernel_in_parts(
        self,
        abi: str,
        version: str,
        *,
        makefile: str = f"KBUILD_OUTPUT=/usr/src/linux-headers-{{abi}}\n{MAKEFILE}",
        program: bytes = b"modpost",
        libraries: str = "libc6 (>= 2.34)",
    ) -> None:
        """As it is packaged from 7.2 on, with the makefile of 7.3."""
        place = f"usr/lib/modules/{abi}"
        files = self._headers(
            abi, version, _kbuild(abi), CONFIG, makefile, "usr/lib/modules", program, libraries, links=False
        )
        base = {"config": files["config"], "System.map": "ffff T _text\n", "modules.builtin": ""}
        self.add(f"linux-base-{abi}", version, {f"{place}/{name}": text for name, text in base.items()})
        self.add(f"linux-binary-{abi}", version, {f"{place}/vmlinuz": b"image of " + version.encode()})
        self.add(f"linux-modules-{abi}", version, _modules(place))
        parts = ", ".join(f"linux-{part}-{abi} (= {version})" for part in ("base", "binary", "modules"))
        self.add(f"linux-image-{abi}", version, {}, depends=f"dracut | initramfs-tools (>= 0.120), {parts}")

    def _headers(
        self, abi: str, version: str, kbuild: str, config: str, makefile: str, modules: str, program: bytes,
        libraries: str, *, links: bool = True,
    ) -> dict[str, str]:  # fmt: skip
        common = abi.removesuffix("-amd64") + "-common"
        text = config.format(version=version.split("-", maxsplit=1)[0])
        headers = f"usr/src/linux-headers-{abi}"
        files: dict[str, str | bytes] = {
            f"{headers}/Makefile": makefile.format(common=common, abi=abi),
            f"{headers}/.config": text,
            f"{headers}/Module.symvers": "0x0\tsymbol\tvmlinux\tEXPORT_SYMBOL\n",
        }
        if links:
            files |= {
                f"{modules}/{abi}/build": f"-> /usr/src/linux-headers-{abi}",
                f"{modules}/{abi}/source": f"-> /usr/src/linux-headers-{common}",
            }
        depends = f"linux-headers-{common} (= {version}), {kbuild} (>= {version}), linux-compiler-gcc-12-x86"
        self.add(f"linux-headers-{abi}", version, files, depends=depends)
        self.add(f"linux-headers-{common}", version, {f"usr/src/linux-headers-{common}/Makefile": "all:\n"})
        self.add(kbuild, version, {f"usr/lib/{kbuild}/scripts/mod/modpost": program}, depends=f"pahole, {libraries}")
        return {"config": text}


def _kbuild(abi: str) -> str:
    return f"linux-kbuild-{abi.removesuffix('-amd64')}"


def _modules(place: str) -> dict[str, str | bytes]:
    return {
        f"{place}/kernel/arch/x86/kvm/kvm-amd.ko": b"kvm-amd " * 9,
        f"{place}/kernel/drivers/crypto/ccp/ccp.ko": b"ccp",
        f"{place}/kernel/drivers/gpu/drm/huge.ko": b"not in a lab",
    }


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeDebian, cache: Path) -> None:
    """Point the code under test at the archive and at a cache of its own."""
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("SEVCHAOS_CACHE", str(cache))
    monkeypatch.setattr(archive, "KEYRING", fake.where / "keyring.gpg")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_ID": "12"})
