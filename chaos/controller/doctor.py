# SPDX-License-Identifier: Apache-2.0
"""Examining this machine: a list of checks for each kind of host, none of which changes anything."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from chaos.errors import SevchaosError


class DoctorState(StrEnum):
    GOOD = "good"
    POOR = "poor"  # works, with a limit worth knowing
    MISSING = "missing"


class DoctorCheck(msgspec.Struct, frozen=True):
    """One thing looked at: what it is, what was seen, and what to do if that is not good."""

    what: str
    state: DoctorState
    seen: str
    remedy: str = ""


_GIB = 1 << 30


def examine_lab() -> tuple[DoctorCheck, ...]:
    return tuple(_lab())


def examine_local() -> tuple[DoctorCheck, ...]:
    return tuple(_local())


# -- lab --------------------------------------------------------------------------------------------------


def _lab() -> Iterator[DoctorCheck]:
    yield _qemu()
    for tool, package, what_for in (
        ("gcc", "gcc", "to build the lab's kernel modules"),
        ("make", "make", "to build the lab's kernel modules"),
        ("depmod", "kmod", "to index a kernel's modules"),
        ("ldd", "libc-bin", "to find the libraries of programs that go into the lab"),
    ):
        path = shutil.which(tool) or shutil.which(tool, path="/sbin:/usr/sbin")
        if path:
            yield DoctorCheck(tool, DoctorState.GOOD, path)
        else:
            yield DoctorCheck(tool, DoctorState.MISSING, f"not found; it is needed {what_for}", f"install {package}")
    yield _memory()
    yield _disk()
    yield from _kernels()
    yield DoctorCheck("acceleration", DoctorState.GOOD, "TCG, which needs nothing of this machine")


def _qemu() -> DoctorCheck:
    from chaos.lab.qemu import find_qemu

    try:
        qemu = find_qemu()
    except SevchaosError as error:
        return DoctorCheck("QEMU", DoctorState.MISSING, error.message, error.remedy)
    seen = f"{'.'.join(map(str, qemu.version))} at {qemu.path}, {qemu.threads}-threaded TCG"
    if qemu.threads == "multi":
        return DoctorCheck("QEMU", DoctorState.GOOD, seen)
    return DoctorCheck(
        "QEMU", DoctorState.POOR, seen, "QEMU 10 or newer runs the lab's CPUs in parallel; bookworm-backports has it"
    )


def _memory() -> DoctorCheck:
    available = int(_field(Path("/proc/meminfo"), "MemAvailable:") or 0) * 1024
    seen = f"{available / _GIB:.1f} GiB available"
    if available < _GIB // 2:
        return DoctorCheck(
            "memory", DoctorState.MISSING, seen, "a lab of 1 GiB touches about half of it; end something"
        )
    return DoctorCheck("memory", DoctorState.GOOD, seen)


def _disk() -> DoctorCheck:
    from chaos.cache import entries

    try:
        root = entries.root()
    except SevchaosError as error:
        return DoctorCheck("cache", DoctorState.MISSING, error.message, error.remedy)
    free = shutil.disk_usage(root).free
    seen = f"{root}, {free / _GIB:.1f} GiB free"
    if free < 2 * _GIB:
        return DoctorCheck(
            "cache", DoctorState.POOR, seen, "a kernel takes half a GiB, a saved lab a quarter: free some space"
        )
    return DoctorCheck("cache", DoctorState.GOOD, seen)


def _kernels() -> Iterator[DoctorCheck]:
    from chaos.cache import entries

    there = [entry.name for entry in entries.entries() if entry.kind == "kernels" and not entry.leftover]
    if there:
        yield DoctorCheck("kernels", DoctorState.GOOD, "fetched: " + ", ".join(there))
    elif shutil.which("apt-get"):
        yield DoctorCheck("kernels", DoctorState.GOOD, "none fetched yet; the first run fetches one")
    else:
        yield DoctorCheck(
            "kernels", DoctorState.POOR, "none fetched, and this is no Debian to fetch them from",
            "give --kernel running, installed:RELEASE, or the path of a build tree",
        )  # fmt: skip


# -- local ------------------------------------------------------------------------------------------------


def _local() -> Iterator[DoctorCheck]:
    if os.geteuid() == 0:
        yield DoctorCheck("privilege", DoctorState.GOOD, "root")
    else:
        yield DoctorCheck("privilege", DoctorState.MISSING, "not root: no cgroups, no /dev/sev", "become root")
    yield _kvm()
    for key, name in (("sev", "SEV"), ("sev_es", "SEV-ES")):
        yield _parameter(key, name)
    yield _device(Path("/dev/sev"), "the PSP's device", "load ccp; the firmware setup must allow SEV")
    yield _cgroups()
    yield _capacity()
    yield _network()
    yield _fence()


def _kvm() -> DoctorCheck:
    path = Path("/dev/kvm")
    if not path.exists():
        return DoctorCheck(
            "KVM", DoctorState.MISSING, "no /dev/kvm", "load kvm_amd; virtualisation must be on in the firmware setup"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return DoctorCheck(
            "KVM", DoctorState.MISSING, "/dev/kvm may not be opened", "become root, or join the group kvm"
        )
    return DoctorCheck("KVM", DoctorState.GOOD, "/dev/kvm may be opened, which says nothing about SEV")


def _parameter(key: str, name: str) -> DoctorCheck:
    path = Path("/sys/module/kvm_amd/parameters") / key
    text = _text(path)
    if text is None:
        return DoctorCheck(
            name, DoctorState.MISSING, "kvm_amd is not loaded", "load kvm_amd on an AMD EPYC host, or use --host lab"
        )
    if text.strip() in ("Y", "1"):
        return DoctorCheck(name, DoctorState.GOOD, "enabled in kvm_amd")
    state = DoctorState.MISSING if key == "sev" else DoctorState.POOR
    return DoctorCheck(
        name, state, "off in kvm_amd", f"see `dmesg | grep -i sev`; kvm_amd.{key}=1 and ASIDs in the firmware setup"
    )


def _device(path: Path, what: str, remedy: str) -> DoctorCheck:
    if not path.exists():
        return DoctorCheck(what, DoctorState.MISSING, f"no {path}", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return DoctorCheck(what, DoctorState.MISSING, f"{path} may not be opened", "become root")
    return DoctorCheck(what, DoctorState.GOOD, str(path))


def _cgroups() -> DoctorCheck:
    controllers = _text(Path("/sys/fs/cgroup/cgroup.controllers"))
    if controllers is None:
        return DoctorCheck("cgroups", DoctorState.MISSING, "no unified hierarchy at /sys/fs/cgroup",
                     "boot with systemd.unified_cgroup_hierarchy=1")  # fmt: skip
    if Path("/sys/fs/cgroup/cgroup.type").exists():  # the host's root has none
        return DoctorCheck("cgroups", DoctorState.MISSING, "these are a container's, not the host's",
                     "run on the host, or give the container the host's cgroups")  # fmt: skip
    if "misc" not in controllers.split():
        return DoctorCheck("cgroups", DoctorState.MISSING, "no misc controller", "a kernel with CONFIG_CGROUP_MISC=y")
    return DoctorCheck("cgroups", DoctorState.GOOD, "unified hierarchy with the misc controller")


def _capacity() -> DoctorCheck:
    text = _text(Path("/sys/fs/cgroup/misc.capacity"))
    if text is None:
        return DoctorCheck("ASIDs", DoctorState.MISSING, "no misc.capacity",
                     "see the line on cgroups; a cgroup namespace hides it")  # fmt: skip
    seen = ", ".join(line for line in text.splitlines() if line.startswith("sev")) or "none"
    if seen == "none":
        return DoctorCheck("ASIDs", DoctorState.MISSING, "misc.capacity lists no sev", "see the lines on SEV")
    return DoctorCheck("ASIDs", DoctorState.GOOD, seen)


def _network(modules: Path | None = None, device: Path = Path("/dev/net/tun")) -> DoctorCheck:
    """What impairs packets; files are looked at, since an attempt would load a module."""
    what, tree = "network faults", modules or Path("/lib/modules") / os.uname().release
    listed = "".join(_text(tree / name) or "" for name in ("modules.builtin", "modules.dep"))
    if "/sch_netem.ko" in listed:
        return DoctorCheck(what, DoctorState.GOOD, "by the kernel's netem")
    if device.exists():
        return DoctorCheck(what, DoctorState.GOOD, f"by a relay in user space ({device}); {tree} lists no netem")
    seen = f"{tree} lists no netem, and there is no {device}: what impairs packets is skipped"
    return DoctorCheck(what, DoctorState.POOR, seen, "a kernel with CONFIG_NET_SCH_NETEM or CONFIG_TUN")


def _fence() -> DoctorCheck:
    """What keeps runs from taking what others need."""
    from chaos.kvm.sev import Platform
    from chaos.safety.survey import Paths, foreign_guests, hierarchy, share, survey, taken

    paths = Paths()
    platform = None
    try:
        root = hierarchy(paths)
        with contextlib.suppress(OSError):
            platform = Platform.open(paths.sev)
        foreign = foreign_guests(root, platform)
    except (SevchaosError, OSError) as error:
        return DoctorCheck("fence", DoctorState.MISSING, f"nobody can say whether others need this host: {error}",
                     "see the lines above")  # fmt: skip
    finally:
        if platform is not None:
            platform.close()
    host = survey("local", paths, root)
    may = share(host, taken(root))
    seen = ", ".join(f"{number} of {host.asids[key]} {key}" for key, number in sorted(may.items())) or "no ASID"
    if foreign:
        others = f"{foreign} SEV guests of others live here; a run could take {seen}"
        return DoctorCheck("fence", DoctorState.POOR, others, "runs are refused without --shared-host")
    return DoctorCheck(
        "fence", DoctorState.GOOD, f"no SEV guest of others; a run takes at most {seen}, and dies as a whole"
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _field(path: Path, name: str) -> str | None:
    lines = (_text(path) or "").splitlines()
    return next((line.split()[1] for line in lines if line.startswith(name)), None)
