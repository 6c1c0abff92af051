# SPDX-License-Identifier: Apache-2.0
"""What a fault is given to strike: the run as `chaos.fault.Scene` describes it."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from errno import EBUSY, ENODEV, ENOENT
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.errors import HostLacks, Unsupported
from chaos.history.records import Done, Value
from chaos.kvm.numbers import IOCTL_NAMES
from chaos.linux.kfault import Kfault
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.netns.link import End
from chaos.runner.guests import Stage
from chaos.runner.holds.failpoints import Failpoints
from chaos.runner.vmms import Pending, StepFailed, Vmm
from chaos.safety.warden import Warden
from chaos.seed import split
from chaos.vmm.messages import Close, Create, CreateVcpu, Init, LoseFd, MayLock, Question, SetMemory

# Where the lab has the module; on a machine of somebody's own it is theirs to load.
MODULE = Path("/lab/kfault.ko")
LOADED_WITHIN = 60.0


@dataclass(slots=True)
class Scene:
    """What is opened for faults and holds is closed when `stack` is. `seed` is the run's."""

    stage: Stage
    stack: ExitStack
    firmware: Failpoints
    warden: Warden
    shared: bool = False
    seed: int = 0
    _drawn: int = 0
    _kfault: Kfault | None = None
    _soft: dict[int, int] = field(default_factory=dict)

    def chance(self) -> int:
        self._drawn += 1
        return split(self.seed, f"fault-{self._drawn}")

    def vmm(self, name: str) -> Vmm:
        return self.stage.fleet.vmms[name]

    def vmm_of(self, vm: str) -> Vmm:
        return self.stage.guests[vm].vmm

    @property
    def vmms(self) -> tuple[Vmm, ...]:
        return tuple(vmm for vmm in self.stage.fleet.vmms.values() if vmm.recorded and vmm.alive)

    def cgroup(self, name: str) -> Cgroup:
        return self.stage.groups[name]

    def below(self, cgroup: str) -> tuple[str, ...]:
        return self.stage.groups.below(cgroup)

    def home(self, vmm: str) -> str:
        return self.stage.groups.home(self.vmm(vmm))

    def living_in(self, cgroup: str) -> tuple[Vmm, ...]:
        return self.stage.groups.living_in(cgroup)

    def enter(self, vmm: str, cgroup: str) -> None:
        self.stage.groups.enter(self.vmm(vmm), cgroup)

    def limit(self, cgroup: str, key: str, number: int | None) -> None:
        self.stage.groups.limit(cgroup, key, number)

    def add_cgroup(self, cgroup: str) -> None:
        self.stage.groups.add(cgroup)

    def remove_cgroup(self, cgroup: str) -> None:
        self.stage.groups.remove(cgroup)

    def disable_misc(self, cgroup: str) -> None:
        self.stage.groups.disable_misc(cgroup)

    def enable_misc(self, cgroup: str) -> None:
        self.stage.groups.enable_misc(cgroup)

    def take(self, vmm: str, vm: str, key: str) -> Done:
        memory = next(iter(self.stage.memories))
        create = Create(vm=vm, kind=key.replace("_", "-"), vcpus=0, memory=memory)
        fleet, victim = self.stage.fleet, self.vmm(vmm)
        created = fleet.do(victim, create, fds=(self.stage.memories[memory].number,))
        return created if created.outcome != "ok" else fleet.do(victim, Init(vm=vm, key=key))

    def close(self, vmm: str, vm: str) -> None:
        self.stage.fleet.do(self.vmm(vmm), Close(vm=vm))

    def lose_fd(self, vm: str, fd: str) -> Done:
        return self.stage.fleet.do(self.vmm_of(vm), LoseFd(vm=vm, fd=fd))

    def set_memory(self, vm: str, there: bool) -> Done:
        return self.stage.fleet.do(self.vmm_of(vm), SetMemory(vm=vm, there=there))

    def memlock(self, vmm: str, size: int | None) -> None:
        victim = self.vmm(vmm)
        given = "max" if size is None else size
        self.stage.fleet.record("memlock", lambda: self._memlock(victim, size), victim, bytes=given)

    def _memlock(self, victim: Vmm, size: int | None) -> None:
        """The soft limit alone: the way back is the process's own."""
        self.ask(victim.name, MayLock(allowed=size is None))
        _, hard = resource.prlimit(victim.pid, resource.RLIMIT_MEMLOCK)
        soft = self._soft.setdefault(victim.pid, resource.prlimit(victim.pid, resource.RLIMIT_MEMLOCK)[0])
        resource.prlimit(victim.pid, resource.RLIMIT_MEMLOCK, (soft if size is None else size, hard))

    def add_vcpu(self, vm: str, id: int, then: Callable[[], None]) -> Pending:
        pending = self.stage.fleet.invoke(self.vmm_of(vm), CreateVcpu(vm=vm, id=id, bare=True), aside=True)
        pending.then = then
        return pending

    def moves(self, vm: str) -> tuple[Pending, ...]:
        return tuple(move for move in self.stage.fleet.moves if vm in (move.args["vm"], move.args.get("source")))

    def ask(self, vmm: str, question: Question) -> Mapping[str, Value] | None:
        victim = self.vmm(vmm)
        if not victim.alive:
            return None
        try:
            return self.stage.fleet.ask(victim, question).value
        except StepFailed:
            if victim.alive:
                raise
            return None

    def enable(self, cgroup: str, controller: str) -> None:
        for path in reversed(self.cgroup(cgroup).path.parents):
            above = Cgroup.at(path)
            if (path / "cgroup.controllers").exists() and not above.divides(controller):
                self.remember(path / "cgroup.subtree_control", f"-{controller}")
                self.stack.callback(self._disable, above, controller)
                above.enable(controller)

    def _disable(self, group: Cgroup, controller: str) -> None:
        try:
            group.disable(controller)
        except OSError as error:
            # The run's own cgroups are gone by now, or somebody else has it from this one.
            if error.errno not in (ENOENT, ENODEV, EBUSY):
                raise
        self.forget(group.path / "cgroup.subtree_control", f"-{controller}")

    def remember(self, path: Path, text: str) -> None:
        self.warden.remember(path, text)

    def forget(self, path: Path, text: str) -> None:
        self.warden.forget(path, text)

    def kfault(self) -> Kfault:
        if self._kfault is None:
            self._kfault = _open_kfault()
            self.stack.callback(self._kfault.close)
        return self._kfault

    def memory(self, vm: str) -> int:
        return self.stage.memories[self.stage.guests[vm].spec.memory].number

    def links(self, vmm: str) -> tuple[tuple[End, End, Vmm], ...]:
        ends = self.stage.network.interfaces
        return tuple((ends[at].end, ends[at[::-1]].end, self.vmm(at[1])) for at in ends if at[0] == vmm)

    def wait(self, happened: Callable[[], bool], within: float, what: str) -> bool:
        try:
            self.stage.fleet.loop.wait(happened, within, what, look=LOOK_AGAIN)
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
