# SPDX-License-Identifier: Apache-2.0
"""A cgroup, and what the misc controller says about it.

Which files there are depends on the kernel: 6.1 has no `misc.peak` and no `misc.events.local`, and shows no
`misc.current` at the root. What is missing is left out of an answer, never made up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from chaos.cgroup.nodes import UnifiedNode, path_of, read_keyed, read_list, write
from chaos.errors import CleanupFailed, HostLacks

# The misc controller's files, by the names under which an observation has them.
MISC_FILES = {
    "current": "misc_current",
    "max": "misc_max",
    "peak": "misc_peak",
    "events": "misc_events",
    "events.local": "misc_events_local",
}


def find_hierarchy(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path:
    """Where the unified hierarchy is mounted. Raises `HostLacks`."""
    for line in mountinfo.read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.split(" ", 1)[0] == "cgroup2":
            return Path(fields.split(" ")[4].replace("\\040", " "))
    raise HostLacks(
        "no unified cgroup hierarchy is mounted", remedy="mount -t cgroup2 cgroup /sys/fs/cgroup, or boot with it"
    )


class Cgroup:
    def __init__(self, node: UnifiedNode) -> None:
        self._node = node
        self.path = path_of(node)

    @classmethod
    def at(cls, path: Path) -> Cgroup:
        """The cgroup at a path of the file system; it need not exist yet."""
        return cls(UnifiedNode(str(path)))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    # -- the tree -----------------------------------------------------------------------------------------

    def create(self, name: str) -> Cgroup:
        """Raises FileExistsError or another OSError."""
        return Cgroup(self._node.create_cgroup(name))

    def make(self) -> None:
        """Make this one, which was removed or is to be. Raises FileExistsError or another OSError."""
        self.path.mkdir()

    def child(self, name: str) -> Cgroup:
        return Cgroup(UnifiedNode(name, parent=self._node))

    def children(self) -> tuple[Cgroup, ...]:
        """Those directly below, by name."""
        names = sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir(follow_symlinks=False))
        return tuple(self.child(name) for name in names)

    def walk(self) -> Iterator[Cgroup]:
        """This and everything below it, parents first."""
        yield self
        for child in self.children():
            yield from child.walk()

    def enable(self, controller: str) -> None:
        """Let the children of this cgroup have `controller`. Raises OSError: ENOENT if the kernel has no such one."""
        if not self.divides(controller):
            write(self._node, "subtree_control", f"+{controller}")

    def disable(self, controller: str) -> None:
        """Take `controller` from the children. Raises OSError: EBUSY if children of theirs have it from them."""
        write(self._node, "subtree_control", f"-{controller}")

    def divides(self, controller: str) -> bool:
        """Whether its children have the controller."""
        return controller in read_list(self._node, "subtree_control")

    def has(self, controller: str) -> bool:
        """Whether this cgroup has the controller, so that its children may."""
        return controller in read_list(self._node, "controllers")

    # -- processes ----------------------------------------------------------------------------------------

    def open_procs(self) -> int:
        """A descriptor, the caller's; a process that writes "0" to it is in this cgroup from then on."""
        return os.open(self.path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def admit(self, pid: int) -> None:
        """Put a process, with all its threads, into this cgroup. Raises OSError."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def processes(self) -> tuple[int, ...]:
        return tuple(int(pid) for pid in self._node.controller.procs)

    def threads(self) -> frozenset[int]:
        """Every thread in it, also of a process whose first one has ended: `processes` has that where it ended."""
        return frozenset(map(int, read_list(self._node, "threads")))

    @property
    def populated(self) -> bool:
        """Whether any process lives in it or below."""
        events = read_keyed(self._node, "events") or {}
        return bool(events.get("populated", 0))

    def kill(self) -> None:
        """SIGKILL to every process in it and below, also to those being forked right now; as far as the kernel does it:
        6.1, and 6.12 before 6.12.117, pass over a process whose first thread has ended (finding 0012)."""
        write(self._node, "kill", True)

    def kill_each(self) -> None:
        """SIGKILL to every process in it and below by itself, until none is there that was not sent it: one that was
        may have forked before. Raises OSError."""
        sent: frozenset[int] = frozenset()
        while fresh := self._inhabitants() - sent:
            with contextlib.ExitStack() as stack:
                handles = {pid: handle for pid in fresh if (handle := _open_pidfd(pid, stack)) is not None}
                # A number that is still listed is the process's own that was opened, or that one is gone.
                still = self._inhabitants()
                for handle in (handle for pid, handle in handles.items() if pid in still):
                    with contextlib.suppress(ProcessLookupError, PermissionError):  # who stays will be named
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
            sent |= fresh

    def _inhabitants(self) -> frozenset[int]:
        """The processes with a thread in it or below. One whose first thread had ended when it came is in no
        `processes`. Raises OSError."""
        found: set[int] = set()
        for group in self.walk():
            found |= {*group.processes(), *map(_process_of, group.threads())}
        return frozenset(pid for pid in found if pid > 0)  # 0 stands for those of another pid namespace

    def freeze(self, on: bool) -> None:
        """Stop every process in it and below where it next leaves the kernel, or let them go on."""
        write(self._node, "freeze", on)

    @property
    def frozen(self) -> bool:
        """Whether every process in it and below is stopped."""
        return bool((read_keyed(self._node, "events") or {}).get("frozen", 0))

    def limit_memory(self, size: int | None) -> None:
        """Set memory.max in bytes, None for no limit; with one there is no swap either. Raises OSError."""
        if (self.path / "memory.swap.max").exists():  # not without swap accounting
            write(self._node, "memory_swap_max", None if size is None else 0)
        write(self._node, "memory_max", size)

    def slow_memory(self, above: int | None) -> None:
        """Set memory.high in bytes, None for none: who uses more is made to wait for it. Raises OSError."""
        write(self._node, "memory_high", above)

    def memory_used(self) -> int:
        """In bytes. Raises OSError, FileNotFoundError without the controller."""
        used: int = self._node.controller.memory_current
        return used

    def memory_events(self, name: str) -> int:
        """How often this happened here and below ("oom_kill", "high"); 0 without the controller."""
        return (read_keyed(self._node, "memory_events") or {}).get(name) or 0

    def limit_cpu(self, quota: int | None, period: int = 100_000) -> None:
        """Set cpu.max: the microseconds of every period that all in it and below may run, None for no limit. Raises
        OSError."""
        write(self._node, "cpu_max", (quota, period))

    def throttled(self) -> tuple[int, int]:
        """In how many periods it had to stand still, and how many microseconds in all; nothing without the
        controller."""
        stat = read_keyed(self._node, "cpu_stat") or {}
        return stat.get("nr_throttled") or 0, stat.get("throttled_usec") or 0

    def wait_empty(self, within: float) -> None:
        """Wait for the last process to go. Raises `CleanupFailed` after `within` seconds."""
        deadline = time.monotonic() + within
        with (self.path / "cgroup.events").open("rb", buffering=0) as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while b"populated 1" in events.read():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CleanupFailed(
                        f"{self.path}: processes {_listed(self)} are still there {within:g} s after they were killed",
                        remedy="look at /proc/PID/stack; one that sleeps in the kernel for good needs a reboot",
                    )
                poll.poll(left * 1000)
                events.seek(0)

    def remove(self) -> None:
        """Raises OSError: EBUSY while anything lives in it or below."""
        self.path.rmdir()

    def destroy(self, within: float = 10.0) -> None:
        """Kill what lives in it and below, and remove it all. Raises `CleanupFailed`.

        cgroup.kill alone reaches those that are being forked, and a signal to each those that it passes over.
        """
        deadline = time.monotonic() + within
        while self.exists:
            try:
                self.kill()
                self.kill_each()
                self.wait_empty(within)
                for group in reversed(list(self.walk())):
                    group.remove()
            except OSError as error:
                # Somebody else may be removing it too: then parts of it are gone, or busy for a moment.
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EBUSY) or time.monotonic() > deadline:
                    raise CleanupFailed(
                        f"{self.path} cannot be removed: {error.strerror}", remedy="try `sevchaos clean`"
                    ) from error

    # -- what it says -------------------------------------------------------------------------------------

    def dying(self) -> int:
        """How many removed cgroups below this one something still refers to."""
        stat = read_keyed(self._node, "stat") or {}
        return stat.get("nr_dying_descendants") or 0

    def dying_of(self, controller: str) -> int | None:
        """How many groups of one controller, here and below, something still refers to though they are gone: with the
        cgroup, or because the controller was taken from it. None where the kernel does not say, before 6.12."""
        return (read_keyed(self._node, "stat") or {}).get(f"nr_dying_subsys_{controller}")

    def capacity(self) -> dict[str, int] | None:
        """The machine's, by key; None but at the root of its hierarchy. Keys without capacity are left out."""
        values = read_keyed(self._node, "misc_capacity")
        return None if values is None else _numbers(values)

    def misc(self) -> dict[str, dict[str, int]]:
        """File → key → value. The keys of `events` are the kernel's own: "sev.max". What reads "max" is left out."""
        read = {name: read_keyed(self._node, file) for name, file in MISC_FILES.items()}
        return {name: _numbers(values) for name, values in read.items() if values is not None}

    def current(self) -> dict[str, int] | None:
        """Charges by key; None where the kernel does not say, at the root before 6.12."""
        values = read_keyed(self._node, "misc_current")
        return None if values is None else _numbers(values)

    def limit(self, key: str, number: int | None) -> None:
        """Set misc.max of one key, None for no limit. Raises OSError: EINVAL for a key without capacity."""
        write(self._node, "misc_max", {key: number})


def _numbers(values: dict[str, int | None] | None) -> dict[str, int]:
    return {key: _signed(number) for key, number in (values or {}).items() if number is not None}


def _signed(number: int) -> int:
    """The kernel's counters are signed longs, which it prints as unsigned ones: one below zero reads 2^64 - 1."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _listed(group: Cgroup) -> str:
    try:
        return ", ".join(map(str, sorted(group._inhabitants()))) or "(hidden)"
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return "(just going)"


def _open_pidfd(pid: int, stack: contextlib.ExitStack) -> int | None:
    """A descriptor of the process, closed with the stack; None if it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # the last two: it is a thread's by now
            raise
        return None
    stack.callback(os.close, handle)
    return handle


def _process_of(tid: int) -> int:
    """The process of a thread, 0 if it is gone."""
    try:
        status = Path(f"/proc/{tid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Tgid:\s*(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else 0
