# SPDX-License-Identifier: Apache-2.0
"""What a machine holds, by kind, in words that can be compared. What was not there before is a leak.

Files of the kernel are read, contexts are taken until they are refused, and network namespaces are counted by how many
more may be made: those without a process or a name are in no list.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chaos.cgroup.group import Cgroup
from chaos.errors import HostLacks
from chaos.kvm.call import KernelError
from chaos.kvm.sev import Platform, Sev
from chaos.kvm.system import System
from chaos.netns.netlink import inside
from chaos.netns.space import Namespace
from chaos.runner import kernel_objects
from chaos.safety.survey import Paths

Things = dict[str, frozenset[str]]

CGROUPS, PROC, TRACING = Path("/sys/fs/cgroup"), Path("/proc"), Path("/sys/kernel/tracing")
CPUS = Path("/sys/devices/system/cpu/online")
WITHIN = 30.0
_KTHREADD = "2"
_INODE = {"unix": 6, "tcp": 9, "tcp6": 9, "udp": 9, "udp6": 9, "raw": 9, "packet": 8, "netlink": 9}  # its column
_NOT_OURS = frozenset({"proc", "sys", "dev", "usr", "lib", "lab", "copy", "bin", "sbin"})
_MAY_BE_MADE = PROC / "sys/user/max_net_namespaces"


def look(spared: Path) -> Things:
    """Everything but what lies below the directory `spared`, and this process itself."""
    stat, paths = kernel_objects.vmstat(PROC), Paths()
    return {
        "process": frozenset(_processes()),
        "cgroup": frozenset(_cgroups()),
        "namespace": frozenset(_namespaces()),
        "qdisc": frozenset(_qdiscs()),
        "socket": frozenset(_sockets()),
        "file": frozenset(_files(Path("/"), spared)),
        "tracing": frozenset(_tracing()),
        "setting": frozenset(_settings()),
        "page": _each("is pinned", kernel_objects.pinned(stat)),
        "vm": frozenset(f"{name} with {n} vCPUs" for name, n in kernel_objects.vms(paths.debug).items()),
        "object": _each_of(kernel_objects.objects(paths.slab)),
        "reference": _each_of(kernel_objects.references(paths.modules)),
        "table": _each("is a page table of KVM's", kernel_objects.tables(stat)),
        "group": _each("of misc is gone and referred to", Cgroup.at(CGROUPS).dying_of("misc")),
    }


def _each(what: str, count: int | None) -> frozenset[str]:
    return frozenset(f"{n} {what}" for n in range(1, 1 + (count or 0)))


def _each_of(counts: Mapping[str, int]) -> frozenset[str]:
    return frozenset(word for name, count in counts.items() for word in _each(f"of {name}", count))


def contexts() -> Things:
    """Contexts that somebody has: by ASIDs that cannot be taken, by the charges, and by the firmware's count."""
    return {"asid": frozenset(_asids()), "charge": frozenset(_charges())}


def leaked(before: Things, spared: Path, within: float = WITHIN) -> dict[str, list[str]]:
    """By kind what there is that was not there before, and what is set otherwise; for good, or for so many seconds."""
    deadline = time.monotonic() + within
    while True:
        found = _more(before, look(spared) | contexts())
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _more(before: Things, now: Things) -> dict[str, list[str]]:
    more = {kind: sorted(now[kind] - before[kind]) for kind in now}
    return {kind: words for kind, words in more.items() if words}


def _processes() -> Iterator[str]:
    """Those that are not the kernel's own, dead ones that nobody has reaped included."""
    for directory in _directories():
        with contextlib.suppress(OSError):
            name, _, rest = Path(directory, "stat").read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if _KTHREADD not in (Path(directory).name, parent) and int(Path(directory).name) != os.getpid():
                yield f"{name}) {'dead' if state == 'Z' else ''}".strip()


def _directories() -> list[str]:
    return [entry.path for entry in os.scandir(PROC) if entry.name.isdigit()]


def _cgroups() -> Iterator[str]:
    for path, _, _ in os.walk(CGROUPS):
        yield path
    counted = _keyed(CGROUPS / "cgroup.stat")
    yield from (f"one that was removed and is still held ({n + 1})" for n in range(counted["nr_dying_descendants"]))


def _namespaces() -> Iterator[str]:
    """Every one that a process is in, and of the others how many there are."""
    for process in _processes():
        with contextlib.suppress(OSError):
            for entry in os.scandir(PROC / process.split()[0] / "ns"):
                yield os.readlink(entry)  # noqa: PTH115 - there are many
    yield from (f"a network's ({n + 1})" for n in range(_networks()))


def _networks() -> int:
    before = _MAY_BE_MADE.read_text()
    try:
        for number in range(1, 1000):
            _MAY_BE_MADE.write_text(str(number))
            with contextlib.suppress(HostLacks):
                Namespace.create().close()
                return number - 1
    finally:
        _MAY_BE_MADE.write_text(before)
    raise AssertionError("a thousand network namespaces")


def _qdiscs() -> tuple[str, ...]:
    """Links, and the qdiscs on them, of the namespace that this process is in."""

    def listed(route: Any) -> tuple[str, ...]:
        links = {message["index"]: str(message.get_attr("IFLA_IFNAME")) for message in route.get_links()}
        qdiscs = (f"{q.get_attr('TCA_KIND')} {q['handle']:x} on {links.get(q['index'])}" for q in route.get_qdiscs())
        return (*links.values(), *qdiscs)

    return inside(None, listed, what="list links and qdiscs")


def _sockets() -> Iterator[str]:
    """Those that this process does not have open itself."""
    mine = set()
    for path in PROC.glob("self/fd/*"):
        with contextlib.suppress(OSError):
            mine.add(str(path.readlink()))
    for family, column in _INODE.items():
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / family).read_text().splitlines()[1:]:
                fields = line.split()
                if f"socket:[{fields[column]}]" not in mine:
                    yield f"{family} {' '.join(fields[column:])}"


def _files(top: Path, spared: Path) -> Iterator[str]:
    """Below `top`, but for what is the kernel's or came with the lab. Of the devices those in shared memory."""
    for path in (*(p for p in top.iterdir() if p.name not in _NOT_OURS), Path("/dev/shm"), Path("/dev/mqueue")):
        yield str(path)
        for directory, below, names in os.walk(path):
            below[:] = [name for name in below if Path(directory, name) != spared]
            yield from (str(Path(directory, name)) for name in (*below, *names))


def _tracing() -> Iterator[str]:
    yield from (path.name for path in (TRACING / "instances").iterdir())
    yield from (TRACING / "kprobe_events").read_text().splitlines()


def _settings() -> Iterator[str]:
    """What a fault may have left set otherwise for the whole machine."""
    yield f"CPUs online: {CPUS.read_text().strip()}"
    for path, _, _ in os.walk(CGROUPS):
        with contextlib.suppress(OSError):
            yield f"controllers below {path}: {Path(path, 'cgroup.subtree_control').read_text().strip()}"
    modules = (line.split()[0] for line in (PROC / "modules").read_text().splitlines())
    yield from (f"module {name}" for name in modules if name == "kfault")  # what the kernel loads by itself may stay
    yield from (f"mount {' '.join(line.split()[4:])}" for line in (PROC / "self/mountinfo").read_text().splitlines())


def _asids() -> Iterator[str]:
    for key, capacity in _keyed(CGROUPS / "misc.capacity").items():
        yield from (f"{key}: {n} cannot be had" for n in range(1, capacity - _can_be_had(key) + 1))


def _can_be_had(key: str) -> int:
    """They are given back side by side: each waits for grace periods of RCU."""
    with ThreadPoolExecutor() as closers, ExitStack() as stack:
        system, platform = System.open(), Platform.open()
        stack.callback(system.close)
        stack.callback(platform.close)
        for count in range(1 << 16):
            try:
                vm = system.create_vm()
                stack.callback(closers.submit, vm.close)
                sev = Sev(vm.fd.number, platform.fd.number)
                sev.es_init() if key == "sev_es" else sev.init()
            except KernelError:
                return count
    raise AssertionError("there is no end to the contexts")


def _charges() -> Iterator[str]:
    """Of every cgroup, and where the root shows none (before 6.12) at least of those below."""
    for path, _, _ in os.walk(CGROUPS):
        for key, number in _keyed(Path(path) / "misc.current").items():
            yield from (f"{key} {n} in {path}" for n in range(1, number + 1))
    platform = Platform.open()
    guests = platform.status().guest_count
    platform.close()
    yield from (f"guest {n} in the firmware" for n in range(1, guests + 1))


def _keyed(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    return {key: int(number) for key, number in (line.split() for line in lines) if number != "max"}
