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


class State(StrEnum):
    GOOD = "good"
    POOR = "poor"  # works, with a limit worth knowing
    MISSING = "missing"


class Check(msgspec.Struct, frozen=True):
    """One thing looked at: what it is, what was seen, and what to do if that is not good."""

    what: str
    state: State
    seen: str
    remedy: str = ""


_GIB = 1 << 30


def examine_lab() -> tuple[Check, ...]:
    return tuple(_lab())


def examine_local() -> tuple[Check, ...]:
    return tuple(_local())


# -- lab --------------------------------------------------------------------------------------------------


def _lab() -> Iterator[Check]:
    yield _qemu()
    for tool, package, what_for in (
        ("gcc", "gcc", "to build the lab's kernel modules"),
        ("make", "make", "to build the lab's kernel modules"),
        ("depmod", "kmod", "to index a kernel's modules"),
        ("ldd", "libc-bin", "to find the libraries of programs that go into the lab"),
    ):
        path = shutil.which(tool) or shutil.which(tool, path="/sbin:/usr/sbin")
        if path:
            yield Check(tool, State.GOOD, path)
        else:
            yield Check(tool, State.MISSING, f"not found; it is needed {what_for}", f"install {package}")
    yield _memory()
    yield _disk()
    yield from _kernels()
    yield Check("acceleration", State.GOOD, "TCG, which needs nothing of this machine")


def _qemu() -> Check:
    from chaos.lab.qemu import find_qemu

    try:
        qemu = find_qemu()
    except SevchaosError as error:
        return Check("QEMU", State.MISSING, error.message, error.remedy)
    seen = f"{'.'.join(map(str, qemu.version))} at {qemu.path}, {qemu.threads}-threaded TCG"
    if qemu.threads == "multi":
        return Check("QEMU", State.GOOD, seen)
    return Check(
        "QEMU", State.POOR, seen, "QEMU 10 or newer runs the lab's CPUs in parallel; bookworm-backports has it"
    )


def _memory() -> Check:
    available = int(_field(Path("/proc/meminfo"), "MemAvailable:") or 0) * 1024
    seen = f"{available / _GIB:.1f} GiB available"
    if available < _GIB // 2:
        return Check("memory", State.MISSING, seen, "a lab of 1 GiB touches about half of it; end something")
    return Check("memory", State.GOOD, seen)


def _disk() -> Check:
    from chaos.cache import entries

    try:
        root = entries.root()
    except SevchaosError as error:
        return Check("cache", State.MISSING, error.message, error.remedy)
    free = shutil.disk_usage(root).free
    seen = f"{root}, {free / _GIB:.1f} GiB free"
    if free < 2 * _GIB:
        return Check("cache", State.POOR, seen, "a kernel takes half a GiB, a saved lab a quarter: free some space")
    return Check("cache", State.GOOD, seen)


def _kernels() -> Iterator[Check]:
    from chaos.cache import entries

    there = [entry.name for entry in entries.entries() if entry.kind == "kernels" and not entry.leftover]
    if there:
        yield Check("kernels", State.GOOD, "fetched: " + ", ".join(there))
    elif shutil.which("apt-get"):
        yield Check("kernels", State.GOOD, "none fetched yet; the first run fetches one")
    else:
        yield Check(
            "kernels", State.POOR, "none fetched, and this is no Debian to fetch them from",
            "give --kernel running, installed:RELEASE, or the path of a build tree",
        )  # fmt: skip


# -- local ------------------------------------------------------------------------------------------------


def _local() -> Iterator[Check]:
    if os.geteuid() == 0:
        yield Check("privilege", State.GOOD, "root")
    else:
        yield Check("privilege", State.MISSING, "not root: no cgroups, no /dev/sev", "become root")
    yield _kvm()
    for key, name in (("sev", "SEV"), ("sev_es", "SEV-ES")):
        yield _parameter(key, name)
    yield _device(Path("/dev/sev"), "the PSP's device", "load ccp; the firmware setup must allow SEV")
    yield _cgroups()
    yield _capacity()
    yield _network()
    yield _fence()


def _kvm() -> Check:
    path = Path("/dev/kvm")
    if not path.exists():
        return Check(
            "KVM", State.MISSING, "no /dev/kvm", "load kvm_amd; virtualisation must be on in the firmware setup"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return Check("KVM", State.MISSING, "/dev/kvm may not be opened", "become root, or join the group kvm")
    return Check("KVM", State.GOOD, "/dev/kvm may be opened, which says nothing about SEV")


def _parameter(key: str, name: str) -> Check:
    path = Path("/sys/module/kvm_amd/parameters") / key
    text = _text(path)
    if text is None:
        return Check(
            name, State.MISSING, "kvm_amd is not loaded", "load kvm_amd on an AMD EPYC host, or use --host lab"
        )
    if text.strip() in ("Y", "1"):
        return Check(name, State.GOOD, "enabled in kvm_amd")
    state = State.MISSING if key == "sev" else State.POOR
    return Check(
        name, state, "off in kvm_amd", f"see `dmesg | grep -i sev`; kvm_amd.{key}=1 and ASIDs in the firmware setup"
    )


def _device(path: Path, what: str, remedy: str) -> Check:
    if not path.exists():
        return Check(what, State.MISSING, f"no {path}", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return Check(what, State.MISSING, f"{path} may not be opened", "become root")
    return Check(what, State.GOOD, str(path))


def _cgroups() -> Check:
    controllers = _text(Path("/sys/fs/cgroup/cgroup.controllers"))
    if controllers is None:
        return Check("cgroups", State.MISSING, "no unified hierarchy at /sys/fs/cgroup",
                     "boot with systemd.unified_cgroup_hierarchy=1")  # fmt: skip
    if "misc" not in controllers.split():
        return Check("cgroups", State.MISSING, "no misc controller", "a kernel with CONFIG_CGROUP_MISC=y")
    return Check("cgroups", State.GOOD, "unified hierarchy with the misc controller")


def _capacity() -> Check:
    text = _text(Path("/sys/fs/cgroup/misc.capacity"))
    if text is None:
        return Check("ASIDs", State.MISSING, "no misc.capacity", "see the line on cgroups")
    seen = ", ".join(line for line in text.splitlines() if line.startswith("sev")) or "none"
    if seen == "none":
        return Check("ASIDs", State.MISSING, "misc.capacity lists no sev", "see the lines on SEV")
    return Check("ASIDs", State.GOOD, seen)


def _network(modules: Path | None = None, device: Path = Path("/dev/net/tun")) -> Check:
    """What impairs packets; files are looked at, since an attempt would load a module."""
    what, tree = "network faults", modules or Path("/lib/modules") / os.uname().release
    listed = "".join(_text(tree / name) or "" for name in ("modules.builtin", "modules.dep"))
    if "/sch_netem.ko" in listed:
        return Check(what, State.GOOD, "by the kernel's netem")
    if device.exists():
        return Check(what, State.GOOD, f"by a relay in user space ({device}); {tree} lists no netem")
    return Check(what, State.POOR, f"{tree} lists no netem, and there is no {device}: what impairs packets is skipped",
                 "a kernel with CONFIG_NET_SCH_NETEM or CONFIG_TUN")  # fmt: skip


def _fence() -> Check:
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
        return Check("fence", State.MISSING, f"nobody can say whether others need this host: {error}",
                     "see the lines above")  # fmt: skip
    finally:
        if platform is not None:
            platform.close()
    host = survey("local", paths, root)
    may = share(host, taken(root))
    seen = ", ".join(f"{number} of {host.asids[key]} {key}" for key, number in sorted(may.items())) or "no ASID"
    if foreign:
        return Check("fence", State.POOR, f"{foreign} SEV guests of others live here; a run could take {seen}",
                     "runs are refused without --shared-host")  # fmt: skip
    return Check("fence", State.GOOD, f"no SEV guest of others; a run takes at most {seen}, and dies as a whole")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _field(path: Path, name: str) -> str | None:
    lines = (_text(path) or "").splitlines()
    return next((line.split()[1] for line in lines if line.startswith(name)), None)
