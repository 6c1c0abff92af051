# SPDX-License-Identifier: Apache-2.0
"""What the kernel shows of the VMs that there are, on the whole host, each by a count of its own.

KVM's debugfs has a folder for each VM, the slab allocator counts vCPUs and page tables' headers, a module those who
refer to it (each open descriptor of a VM, a vCPU or the device does), and the memory management the pages that KVM has
made page tables of. A VM that nobody can reach any more shows in all of them.

Only counts that read the same before and after a quiet run are here. Not used: the caches pte_list_desc and
kvm_async_pf, which the kernel merges with others' (struct pid, kernfs_node); nr_page_table_pages, which changes with
every process; file-nr, whose count each CPU keeps to itself in part; num_cgroups of /proc/cgroups, which is that of all
controllers together, and falls a grace period after the cgroup has gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

CACHES = ("kvm_vcpu", "x86_emulator", "kvm_mmu_page_header")
MODULES = ("kvm_amd", "ccp")
PROBES = 256


def vms(debug: Path) -> dict[str, int]:
    """VM → number of its vCPUs; a VM goes by its folder, PID-FD of who made it. Raises OSError."""
    found: dict[str, int] = {}
    with os.scandir(debug / "kvm") as entries:
        for entry in entries:
            if entry.is_dir():
                with contextlib.suppress(FileNotFoundError):  # it has gone since
                    found[entry.name] = sum(name.startswith("vcpu") for name in os.listdir(entry.path))  # noqa: PTH208
    return found


def objects(slab: Path) -> dict[str, int]:
    """Cache → objects in it, of those caches that are KVM's alone. Raises OSError if there is none.

    Of what each CPU keeps for itself all counts as used, so unless there is none at all the cache is told to give back
    what is free, for which it waits for those CPUs.
    """
    found: dict[str, int] = {}
    for cache in CACHES:
        with contextlib.suppress(FileNotFoundError):
            if int((slab / cache / "aliases").read_text()) == 0:
                if _objects_in(slab / cache):
                    (slab / cache / "shrink").write_text("1")
                found[cache] = _objects_in(slab / cache)
    return _any(found, slab)


def _objects_in(cache: Path) -> int:
    return int((cache / "objects").read_text().split()[0])


def references(modules: Path) -> dict[str, int]:
    """Module → references to it. Raises OSError if none of them is a module here."""
    found: dict[str, int] = {}
    for module in MODULES:
        with contextlib.suppress(FileNotFoundError):
            found[module] = int((modules / module / "refcnt").read_text())
    return _any(found, modules)


def _any(found: dict[str, int], where: Path) -> dict[str, int]:
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where))
    return found


def eventfds(proc: Path) -> int:
    """How many eventfds there are whose number is below that of the 256th which is free. A new one gets the lowest that
    is (`eventfd-id` of fdinfo, since 5.2). Raises OSError."""
    with contextlib.ExitStack() as stack:
        for _ in range(PROBES):
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, fd)
        told = (proc / "self" / "fdinfo" / str(fd)).read_text()
    found = re.search(r"^eventfd-id:\s*(\d+)$", told, re.MULTILINE)
    if found is None:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), "eventfd-id")
    return int(found[1]) + 1 - PROBES


def vmstat(proc: Path) -> dict[str, int]:
    """The kernel's counts of pages. Each CPU keeps a few of any to itself until vm.stat_refresh is read, as only root
    may. Raises OSError."""
    (proc / "sys/vm/stat_refresh").read_bytes()
    return {name: int(value) for name, value in (line.split() for line in (proc / "vmstat").read_text().splitlines())}


def pinned(stat: Mapping[str, int]) -> int | None:
    """How many pages are pinned on this host, by whomever; None if nobody can say.

    The kernel counts every pin that was ever taken and every one that was given back (since 5.8).
    """
    acquired, released = stat.get("nr_foll_pin_acquired"), stat.get("nr_foll_pin_released")
    return None if acquired is None or released is None else acquired - released


def tables(stat: Mapping[str, int]) -> int | None:
    """How many pages are page tables of KVM's, and of the IOMMU's; None before 6.1, which has no such count."""
    return stat.get("nr_sec_page_table_pages")


# -- kmemleak, where a kernel has it --------------------------------------------------------------------------

LEAK_AGE = 6.0  # seconds; it takes nothing for lost that is younger than five
_SHOWN_CALLERS = 8
# The first look at an object only remembers what is in it; by the second it has to be the same.
_LOOKS = 2
_FUNCTION = re.compile(r"^    (?:\[<[0-9a-f]+>\] )?([A-Za-z_][\w.]*)\+0x", re.MULTILINE)


class LeakWitness:
    """kmemleak, asked by one run after the other: at the end of each for what was lost in it. A look takes it seconds,
    many where KASAN looks on. So what the run before has asked for and had forgotten is not asked for again."""

    def __init__(self) -> None:
        self._forgotten = False

    def begin(self, kmemleak: Path) -> None:
        """Have what is lost so far not told again: what kmemleak has found, so it looks first. Raises OSError."""
        if not self._forgotten:
            _look(kmemleak)
            kmemleak.write_text("clear")
        self._forgotten = False

    def end(self, kmemleak: Path) -> tuple[str, ...]:
        """What was lost since. Raises OSError: EBUSY or EPERM if kmemleak has turned itself off."""
        found = leaks(kmemleak)
        kmemleak.write_text("clear")
        self._forgotten = True
        return found


def _look(kmemleak: Path) -> None:
    for _ in range(_LOOKS):
        kmemleak.write_text("scan")


def _objects(kmemleak: Path) -> list[str]:
    return kmemleak.read_text(errors="replace").split("unreferenced object ")[1:]


def leaks(kmemleak: Path, *, age: float = LEAK_AGE) -> tuple[str, ...]:
    """What nobody refers to: of each object by which functions it was allocated, as "a < b < c", the innermost first.
    What seems lost is looked at once more: something may be on its way from one place to another."""
    time.sleep(age)
    _look(kmemleak)
    if not (objects := _objects(kmemleak)):
        return ()
    kmemleak.write_text("scan")
    objects = _objects(kmemleak)
    return tuple(" < ".join(_FUNCTION.findall(each)[:_SHOWN_CALLERS]) or "(no backtrace)" for each in objects)
