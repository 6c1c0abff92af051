# SPDX-License-Identifier: Apache-2.0
"""What is there while a script runs: its VMMs, its VMs and what the runner knows of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from chaos.experiment.model import Experiment, Vm
from chaos.history.reading import explained
from chaos.history.records import Done
from chaos.kinds import Kind
from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import memory_file
from chaos.runner.cgroups import Groups
from chaos.runner.network import Network
from chaos.runner.storms import Storm
from chaos.runner.vmms import Fleet, Pending, StepFailed, Vmm
from chaos.vmm import guest, messages
from chaos.vmm.messages import Close, Create, Operation, Pause, Run


@dataclass(slots=True, eq=False)
class Guest:
    """A VM of the experiment. `every` is how often its guest leaves while it runs, None while it does not."""

    name: str
    spec: Vm
    vmm: Vmm
    created: bool = False
    lane: int = 0
    every: int | None = None

    @property
    def running(self) -> bool:
        return self.every is not None and self.vmm.alive


@dataclass(slots=True)
class Stage:
    """`groups` are the cgroups below the run's by path, `network` is what VMMs hand guests over on; both are there once
    they are made. `under_way` are operations that the script has not waited for, by the VM that they are on. `lanes` is
    how many vCPUs count in each memory, a page each."""

    experiment: Experiment
    fleet: Fleet
    groups: Groups
    executes_es: bool
    network: Network = field(default_factory=Network)
    guests: dict[str, Guest] = field(default_factory=dict)
    memories: dict[str, OwnedFd] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)
    under_way: dict[str, Pending] = field(default_factory=dict)

    def spawn(self, name: str) -> Vmm:
        """Start a VMM where the experiment wants it. Raises `StepFailed`."""
        cgroup = self.experiment.vmms[name].cgroup
        return self.fleet.spawn(name, self.groups[cgroup], network=self.network.space(name), label=cgroup)

    def people(self) -> None:
        """Start the experiment's VMMs; put its VMs, not yet created, and their memory on the stage."""
        vmms = {name: self.spawn(name) for name in self.experiment.vmms}
        for name, spec in self.experiment.vms.items():
            self.guests[name] = Guest(name, spec, vmms[spec.vmm])
            if spec.memory not in self.memories:
                self.memories[spec.memory] = memory_file(f"guest-{spec.memory}", guest.MEMORY)
                self.lanes[spec.memory] = 0
            if spec.kind is not Kind.MIRROR:  # those take turns on one guest, so they share its pages
                self.lanes[spec.memory] = max(self.lanes[spec.memory], self.experiment.vcpus(name))
        for mirror in (found for found in self.guests.values() if found.spec.kind is Kind.MIRROR):
            mirror.lane = self.lanes[mirror.spec.memory]
            self.lanes[mirror.spec.memory] += self.experiment.vcpus(mirror.name)
        full = next((memory for memory, lanes in self.lanes.items() if lanes > guest.LANES), None)
        if full is not None:
            raise StepFailed(f"the vCPUs in memory {full!r} are more than {guest.LANES}, mirrors included")

    def restart(self, name: str) -> None:
        """Start a VMM that has died again, where it was; its VMs went with it. Raises `StepFailed`."""
        vmm = self.spawn(name)
        for vm in self.guests.values():
            if vm.vmm.name == name:
                vm.vmm, vm.created, vm.every = vmm, False, None

    def guest(self, name: str) -> Guest:
        """A VM that was launched. Raises `StepFailed`."""
        found = self.guests[name]
        if not found.created:
            raise StepFailed(f"VM {name} was not launched")
        return found

    def create(self, guest: Guest) -> None:
        """Raises `StepFailed`."""
        spec = guest.spec
        users = [vm for vm in self.guests.values() if vm.spec.memory == spec.memory]
        # Where nobody encrypts the memory the program is plain too. It is written once: a guest may run there already.
        ordinary = all(vm.spec.kind is Kind.PLAIN and not vm.created for vm in users)
        create = Create(
            vm=guest.name, kind=spec.kind.value, vcpus=spec.vcpus, memory=spec.memory, type=spec.type, lane=guest.lane,
            lanes=self.lanes[spec.memory] if ordinary else 0,
        )  # fmt: skip
        self.must(guest, create, fds=(self.memories[spec.memory].number,))
        guest.created = True

    def do(self, guest: Guest, operation: Operation, *, phase: str = "", fds: tuple[int, ...] = ()) -> Done:
        return self.fleet.do(guest.vmm, operation, phase=phase, fds=fds)

    def must(self, guest: Guest, operation: Operation, *, phase: str = "", fds: tuple[int, ...] = ()) -> Done:
        """An operation without which the script makes no sense. Raises `StepFailed` if it does not succeed."""
        done = self.do(guest, operation, phase=phase, fds=fds)
        if done.outcome != "ok":
            raise StepFailed(f"{operation_name(operation)} of {guest.name}: {explained(done)}")
        return done

    def enter(self, guest: Guest, every: int, *, phase: str = "") -> Done:
        """Raises `StepFailed` if a storm wants its vCPUs to stay out of the guest."""
        storm = guest.vmm.storms.get(guest.name)
        if storm is not None and storm.wants_still:
            raise StepFailed(f"the calls of the storm on {guest.name} want its vCPUs out of the guest")
        boards = guest.vmm.watch(guest.name, guest.spec.vcpus)
        done = self.do(guest, Run(vm=guest.name, every=every), phase=phase, fds=boards)
        if done.outcome == "ok":
            guest.every = every
        return done

    def leave(self, guest: Guest, *, phase: str = "") -> Done:
        done = self.do(guest, Pause(vm=guest.name), phase=phase)
        guest.every = None
        guest.vmm.unwatch(guest.name)
        return done

    def storm(self, guest: Guest, calls: tuple[str, ...], threads: int) -> None:
        """Let a storm begin. Raises `StepFailed`."""
        if guest.name in guest.vmm.storms:
            raise StepFailed(f"there is a storm on {guest.name} already")
        storm = Storm.prepare(guest.name, calls, threads)
        if storm.wants_still and guest.running:
            storm.memory.close()
            raise StepFailed(f"{guest.name} runs, and these calls want its vCPUs out of the guest")
        guest.vmm.storms[guest.name] = storm  # if the process ends now, what came of it is told with its end
        try:
            self.must(guest, messages.Storm(vm=guest.name, threads=threads, calls=calls), fds=(storm.memory.number,))
        except StepFailed:
            if guest.vmm.storms.pop(guest.name, None):
                storm.memory.close()
            raise

    def calm(self, guest: Guest) -> None:
        """End the storm on a VM, and record what came of it. Raises `StepFailed`."""
        if guest.name not in guest.vmm.storms:
            raise StepFailed(f"there is no storm on {guest.name}")
        self.must(guest, messages.Calm(vm=guest.name))
        self.fleet.storm_over(guest.vmm, guest.name)

    def close_aside(self, guest: Guest) -> None:
        """Let it be closed and go on. Its agent knows no such VM from then on. Raises `StepFailed` as `close` does."""
        if guest.name in guest.vmm.storms:
            self.calm(guest)
        self.under_way[guest.name] = self.fleet.invoke(guest.vmm, Close(vm=guest.name), aside=True)
        guest.created, guest.every = False, None
        guest.vmm.unwatch(guest.name)

    def close(self, guest: Guest) -> Done:
        """Raises `StepFailed` if a storm on it does not end."""
        if guest.name in guest.vmm.storms:
            self.calm(guest)
        done = self.do(guest, Close(vm=guest.name))
        guest.created = done.outcome != "ok"
        guest.every = None
        guest.vmm.unwatch(guest.name)
        return done

    def may_run(self, guest: Guest) -> bool:
        """Whether the CPU can enter it at all."""
        return self.executes_es or not self.is_es(guest)

    def is_es(self, guest: Guest) -> bool:
        """Whether the guest behind this VM is a SEV-ES one; a migration's destination takes after its source."""
        kinds = {vm.kind for vm in self.experiment.vms.values() if vm.memory == guest.spec.memory}
        return Kind.SEV_ES in kinds

    def clear(self) -> None:
        """Give up what is not the VMMs' own, once they have ended. Raises `CleanupFailed`."""
        for memory in self.memories.values():
            memory.close()
        self.memories.clear()
        self.network.give_up()


def operation_name(operation: Operation) -> str:
    return str(operation.__struct_config__.tag)
