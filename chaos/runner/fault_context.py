# SPDX-License-Identifier: Apache-2.0
"""What a fault is given: `chaos.fault.FaultContext`, of the run's own objects."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EBUSY, ENODEV, ENOENT
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.errors import HostLacks, Unsupported
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.linux import fail_nth
from chaos.linux.kfault import Kfault
from chaos.linux.loop import LOOK_AGAIN, Loop, TimedOut
from chaos.netns.link import LinkEnd
from chaos.runner.cgroups import CgroupTree
from chaos.runner.entries import EntryWitness
from chaos.runner.guests import Guests
from chaos.runner.holds.failpoints import RunFailpoints
from chaos.runner.storage import StateFile
from chaos.runner.vmms import VmmProcess, VmmProcesses
from chaos.safety.warden import Warden
from chaos.seed import split

# Where the lab has the module; on a machine of somebody's own it is theirs to load.
MODULE = Path("/lab/kfault.ko")
LOADED_WITHIN = 60.0


@dataclass(slots=True)
class RunContext:
    """What is opened for faults and holds is closed when `stack` is. `seed` is the run's."""

    vmms: VmmProcesses
    vms: Guests
    cgroups: CgroupTree
    host: Warden
    firmware: RunFailpoints
    storage: StateFile
    entries: EntryWitness
    loop: Loop
    stack: ExitStack
    shared: bool = False
    seed: int = 0
    _drawn: int = 0
    _kfault: Kfault | None = None

    def chance(self) -> int:
        self._drawn += 1
        return split(self.seed, f"fault-{self._drawn}")

    def enable_controller(self, cgroup: str, controller: str) -> None:
        for path in reversed(self.cgroups[cgroup].path.parents):
            above = Cgroup.at(path)
            if (path / "cgroup.controllers").exists() and not above.divides(controller):
                self.host.remember(path / "cgroup.subtree_control", f"-{controller}")
                self.stack.callback(self._disable, above, controller)
                above.enable(controller)

    def _disable(self, group: Cgroup, controller: str) -> None:
        try:
            group.disable(controller)
        except OSError as error:
            # The run's own cgroups are gone by now, or somebody else has it from this one.
            if error.errno not in (ENOENT, ENODEV, EBUSY):
                raise
        self.host.forget(group.path / "cgroup.subtree_control", f"-{controller}")

    def kfault(self) -> Kfault:
        if self._kfault is None:
            self._kfault = _open_kfault()
            self.stack.callback(self._kfault.close)
        return self._kfault

    def count_entries(self, cpu: int) -> None:
        self.stack.callback(self.entries.end, cpu)
        self.entries.begin(cpu)

    def let_points_fail(self) -> None:
        if self.shared:
            raise Unsupported(
                "the kernel's fault injection has settings for all, and this host is shared with others",
                remedy="use a host of its own, or the lab",
            )
        if lacking := fail_nth.lacking():
            raise Unsupported(
                f"this kernel lets no fault point fail: it lacks {lacking}",
                remedy="`sevchaos kernel build KERNEL --with kasan` makes one that does",
            )
        for path, text in fail_nth.SETTINGS.items():
            before = path.read_text().strip()
            if before != text:
                self.host.remember(path, before)
                self.stack.callback(self._set_back, path, before)
                path.write_text(text)

    def _set_back(self, path: Path, text: str) -> None:
        path.write_text(text)
        self.host.forget(path, text)

    def links(self, vmm: str) -> tuple[tuple[LinkEnd, LinkEnd, VmmProcess], ...]:
        ends = self.vms.network.interfaces
        return tuple((ends[at].end, ends[at[::-1]].end, self.vmms[at[1]]) for at in ends if at[0] == vmm)

    def wait(self, happened: Callable[[], bool], within: float, what: str) -> bool:
        try:
            self.loop.wait(happened, within, what, look=LOOK_AGAIN)
        except TimedOut:
            return False
        return True


def _open_kfault() -> Kfault:
    try:
        return Kfault.open(ioctls=IOCTL_NAMES)
    except HostLacks as lacking:
        if not MODULE.exists():
            raise Unsupported(lacking.message, remedy=lacking.remedy) from lacking
    loaded = subprocess.run(["insmod", MODULE], capture_output=True, text=True, timeout=LOADED_WITHIN, check=False)
    if loaded.returncode:
        raise HostLacks(f"{MODULE} cannot be loaded: {loaded.stderr.strip()}", remedy="see the kernel's log")
    return Kfault.open(ioctls=IOCTL_NAMES)
