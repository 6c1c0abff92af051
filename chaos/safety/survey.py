# SPDX-License-Identifier: Apache-2.0
"""What a host is and has, as seen from a process on it.

On a real host there are others. Before anything is taken the host is asked whether foreign SEV guests live on it, and
the run's cgroup gets a limit of its own that leaves a reserve for those who come later.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.cgroup.group import Cgroup, find_hierarchy
from chaos.errors import HostLacks, Unsupported
from chaos.kvm.call import KernelError
from chaos.kvm.numbers import Cap, VmType
from chaos.kvm.sev import Platform, enabled
from chaos.kvm.system import System
from chaos.linux.version import order

# On a real host a run takes at most this share of what is free of a key, but never less than two units if they are
# there: without a second one nothing can be moved between cgroups.
SHARE = 0.75
LEAST = 2
OURS = "sevchaos"


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the host's files are; tests have others."""

    kvm: Path = Path("/dev/kvm")
    sev: Path = Path("/dev/sev")
    kmsg: Path = Path("/dev/kmsg")
    proc: Path = Path("/proc")
    modules: Path = Path("/sys/module")
    debug: Path = Path("/sys/kernel/debug")
    slab: Path = Path("/sys/kernel/slab")


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A host as it presents itself: `asids` its capacity by key, `kernel` the full x.y.z, `release` uname's."""

    name: str
    release: str
    kernel: str
    asids: Mapping[str, int] = field(default_factory=dict)
    executes_es: bool = True  # whether SEV-ES guests can be entered

    @property
    def is_lab(self) -> bool:
        return self.name == "lab"


def full_version(release: str, version: str) -> str:
    """x.y.z of a kernel. Debian's and Ubuntu's releases name an ABI; their versions say what is inside.

    `version` is uname's, or Ubuntu's /proc/version_signature.
    """
    named = re.search(r"\bDebian (\d+\.\d+\.\d+)", version) or re.search(r"-\S+ (\d+\.\d+\.\d+)$", version.strip())
    if named:
        return named[1]
    plain = re.match(r"\d+\.\d+(\.\d+)?", release)
    return plain[0] if plain else release


def survey(name: str, paths: Paths, hierarchy: Cgroup | None) -> Surveyed:
    """What can be said of any host, however little it has."""
    uname = os.uname()
    signature = paths.proc / "version_signature"
    version = signature.read_text() if signature.exists() else uname.version
    asids = (hierarchy.capacity() if hierarchy is not None else None) or {}
    # Asked of the machine and not of the order: a lab's CPU is emulated and knows no encrypted registers, also for
    # a run with --host local inside it. The shim is what makes a machine a lab.
    executes_es = not (paths.modules / "sevshim").exists()
    kernel = full_version(uname.release, version)
    return Surveyed(name=name, release=uname.release, kernel=kernel, asids=asids, executes_es=executes_es)


def hierarchy(paths: Paths) -> Cgroup:
    """The root of the host's unified hierarchy, with the misc controller in it. Raises `HostLacks`."""
    root = Cgroup.at(find_hierarchy(paths.proc / "self" / "mountinfo"))
    contained = (root.path / "cgroup.type").exists()  # the host's root has none; a container may get no misc from it
    if not contained and not root.has("misc"):
        raise HostLacks(
            "the kernel's misc cgroup controller is not in the unified hierarchy",
            remedy="use a kernel with CONFIG_CGROUP_MISC, and take misc out of any version 1 hierarchy",
        )
    if contained or root.capacity() is None:
        raise HostLacks(
            f"{root.path} has no misc.capacity, so it is not the host's root but a container's, and tells neither how "
            "many ASIDs there are nor who has them",
            remedy="run on the host, or give the container the host's cgroups (docker run --cgroupns=host, read-write)",
        )
    return root


_BOOLEAN = {"Y": "1", "y": "1", "N": "0", "n": "0"}


def require_ccp(paths: Paths, wanted: Mapping[str, str]) -> None:
    """Raises `Unsupported` if the PSP's driver was not loaded with these parameters."""
    for name, value in wanted.items():
        try:
            have = (paths.modules / "ccp" / "parameters" / name).read_text().strip()
        except OSError:
            have = ""
        if _BOOLEAN.get(have, have) != _BOOLEAN.get(value, value):
            loaded = " ".join(f"{each}={wanted[each]}" for each in wanted)
            raise Unsupported(
                f"ccp was loaded with {name}={have or '(nothing)'}, and {value} is wanted",
                remedy=f"without any SEV guest: modprobe -r kvm_amd ccp; modprobe ccp {loaded}; modprobe kvm_amd",
            )


def require_kernel(kernel: str, since: str, before: str, why: str) -> None:
    """Raises `Unsupported` if this version is older than `since` or not older than `before`, "" for no such bound."""
    if since and order(kernel) < order(since):
        raise Unsupported(f"kernel {kernel} is older than {since}: {why}")
    if before and order(kernel) >= order(before):
        raise Unsupported(f"kernel {kernel} is not older than {before}: {why}")


def require(host: Surveyed, paths: Paths, keys: Iterable[str], types: Iterable[int] = ()) -> None:
    """Raises `HostLacks` if this host cannot do what is wanted, saying why, and `Unsupported` if what it lacks is ASIDs
    of one of `keys` or VMs of one of `types`."""
    try:
        system = System.open(paths.kvm)
    except OSError as error:
        raise HostLacks(f"{paths.kvm}: {error.strerror}", remedy="load kvm_amd, and run as root") from error
    try:
        vm = system.create_vm()
        able = enabled(vm.fd.number)
        vm.close()
        known = system.check_extension(Cap.VM_TYPES) | 1 << VmType.DEFAULT  # asked for only since there are others
    finally:
        system.close()
    if not able:
        raise HostLacks("KVM is here, SEV is not", remedy="enable SEV in the firmware setup, or use the lab")
    for vm_type in sorted(types):
        if not known >> vm_type & 1:
            raise Unsupported(
                f"kernel {host.kernel} has no VMs of type {vm_type} ({VmType(vm_type).name}): KVM_CAP_VM_TYPES names "
                f"{known:#x}",
                remedy="there are such since 6.10",
            )
    for key in keys:
        if not host.asids.get(key):
            raise Unsupported(
                f"the host has no ASIDs of key {key}", remedy="the firmware setup divides them between SEV and SEV-ES"
            )


def foreign_guests(root: Cgroup, platform: Platform | None) -> int:
    """How many encryption contexts on this host are not ours; all are taken for foreign where nothing tells.

    The kernel that shows charges at the root has counted everybody. Before that there are two witnesses and each sees
    a part: the cgroups below the root do not count a VMM in the root itself, and the firmware knows launched guests
    only, and not whose they are. The larger number stands. Raises `HostLacks` if the firmware cannot be asked.
    """
    ours = root.child(OURS)
    own = (ours.current() or {}) if ours.exists else {}
    charged = sum(taken(root).values()) - sum(own.values())
    if root.current() is not None:
        return charged
    if platform is None:
        raise HostLacks("nobody can say whether other SEV guests run here", remedy="make /dev/sev readable")
    try:
        return max(charged, int(platform.status().guest_count))
    except KernelError as error:
        raise HostLacks(f"the firmware does not say how many guests it has: {error}", remedy="see dmesg") from error


def taken(root: Cgroup) -> dict[str, int]:
    """How many ASIDs of each key are charged on this host, as far as cgroups say."""
    everybody = root.current()
    if everybody is not None:
        return everybody
    total: Counter[str] = Counter()
    for group in root.children():
        total.update(group.current() or {})
    return dict(total)


def refuse_others(root: Cgroup, platform: Platform | None) -> None:
    """Raises `HostLacks` if SEV guests that are not ours live here, or nobody can say."""
    foreign = foreign_guests(root, platform)
    if foreign:
        raise HostLacks(
            f"{foreign} SEV guest{'s' if foreign > 1 else ''} of other owners running on this host",
            remedy="use a host of its own or the lab, or pass --shared-host to limit faults to our own processes",
        )


def refuse_fragile(paths: Paths) -> None:
    """Raises `HostLacks` where a warning of the kernel takes the machine down: stock kernels warn at some moves."""
    try:
        panics = (paths.proc / "sys/kernel/panic_on_warn").read_text().strip() != "0"
    except OSError:
        panics = False
    if panics:
        raise HostLacks(
            "this machine panics when its kernel warns, as stock ones do at moves of SEV-ES guests (finding 0002)",
            remedy="say `sysctl kernel.panic_on_warn=0` if that may be, or use the lab",
        )


def allowance(host: Surveyed, root: Cgroup) -> dict[str, int]:
    """How many ASIDs of each key a run may take; nothing is withheld in the lab, where nobody else is."""
    return {} if host.is_lab else share(host, taken(root))


def share(host: Surveyed, used: Mapping[str, int]) -> dict[str, int]:
    """The same of a host that others may need."""
    free = {key: capacity - used.get(key, 0) for key, capacity in host.asids.items()}
    return {key: max(min(LEAST, number), int(number * SHARE)) for key, number in free.items()}
