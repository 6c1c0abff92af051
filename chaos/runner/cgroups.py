# SPDX-License-Identifier: Apache-2.0
"""The cgroups of a run, and what is done to them as it is recorded.

A limit that is set in the middle, a cgroup that is removed while it is charged, a controller that is taken away: what
the kernel may answer afterwards hangs on each, so they are operations of the history, which nobody's VMM makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.experiment.model import Group
from chaos.fault import Victim
from chaos.linux.task import parse_state
from chaos.runner.operations import OperationLog
from chaos.runner.vmms import VmmProcess, VmmProcesses

RUN = "."
"""The path of the run's own cgroup."""
ATTENDANT = "kvm-nx-lpage-recovery"


@dataclass(slots=True)
class CgroupTree:
    """`run` is the run's own cgroup. The others go by their path below it, also one that was removed. What changes
    something raises OSError if it fails."""

    run: Cgroup
    log: OperationLog
    vmms: VmmProcesses
    _below: dict[str, Cgroup] = field(default_factory=dict)

    def make(self, wanted: Mapping[str, Group]) -> None:
        """Make the cgroups of an experiment, parents first, each with its limits from the start."""
        for path, spec in wanted.items():
            self._below[path] = self._at(path)
            self[path].make()
            for key, number in spec.max.items():
                self[path].limit(key, number)
            if any(other.startswith(f"{path}/") for other in wanted) and self[path].has("misc"):
                if spec.misc:
                    self[path].enable("misc")
                else:
                    self.disable_misc(path)

    def __getitem__(self, path: str) -> Cgroup:
        return self.run if path == RUN else self._below[path]

    def below(self, path: str) -> tuple[str, ...]:
        """The paths of those below it that there are now, parents first."""
        inside = (other for other in sorted(self._below) if path == RUN or other.startswith(f"{path}/"))
        return tuple(other for other in inside if self[other].exists)

    def home(self, vmm: Victim) -> str:
        """The path of the cgroup that it lives in, every thread of it; the run's own if there is none such."""
        threads = _threads(vmm.pid)
        return next((path for path in self.below(RUN) if threads and threads <= self[path].threads()), RUN)

    def living_in(self, path: str) -> tuple[VmmProcess, ...]:
        """The VMMs of the experiment that live in it or below."""
        inside = {path, *self.below(path)}
        return tuple(vmm for vmm in self.vmms.living if self.home(vmm) in inside)

    def enter(self, vmm: Victim, path: str) -> None:
        """Put the process, all of it, into another cgroup."""

        def go() -> None:
            for pid in (vmm.pid, *attendants(vmm.pid, self[self.home(vmm)])):
                self[path].admit(pid)

        self.log.record("enter", go, vmm, cgroup=path)

    def limit(self, path: str, key: str, number: int | None) -> None:
        """Set misc.max, None for none."""
        given = "max" if number is None else number
        self.log.record("limit", lambda: self[path].limit(key, number), cgroup=path, key=key, max=given)

    def add(self, path: str) -> None:
        """Make one again that was removed."""
        self.log.record("add_cgroup", self[path].make, cgroup=path)

    def remove(self, path: str) -> None:
        self.log.record("remove_cgroup", self[path].remove, cgroup=path)

    def disable_misc(self, path: str) -> None:
        """Take the misc controller from the cgroups below."""
        self.log.record("disable_misc", lambda: self[path].disable("misc"), cgroup=path)

    def enable_misc(self, path: str) -> None:
        self.log.record("enable_misc", lambda: self[path].enable("misc"), cgroup=path)

    def _at(self, path: str) -> Cgroup:
        above, _, name = path.rpartition("/")
        return self[above or RUN].child(name)


def attendants(pid: int, home: Cgroup, proc: Path = Path("/proc")) -> Iterator[int]:
    """The kernel's own threads that live with the process: before 6.13 (and its stable kernels) KVM starts one for each
    VM, kvm-nx-lpage-recovery-TID, and puts it into the cgroup of whoever made the VM."""
    names = {f"{ATTENDANT}-{tid}" for tid in (pid, *_threads(pid, proc))}
    for other in home.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (proc / str(other) / "comm").read_text().strip() in names:
                yield other


def _threads(pid: int, proc: Path = Path("/proc")) -> frozenset[int]:
    """The threads of the process that have not ended: a cgroup does not take a zombie along."""
    found: set[int] = set()
    for stat in (proc / str(pid) / "task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if parse_state(stat.read_text()) not in ("Z", "X"):
                found.add(int(stat.parent.name))
    return frozenset(found)
