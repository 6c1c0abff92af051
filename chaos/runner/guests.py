# SPDX-License-Identifier: Apache-2.0
"""The VMs of a run: what the runner knows of each, and what is done to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.experiment.model import Experiment, Vm
from chaos.history.reading import explained
from chaos.history.records import Answer, Asked, Done
from chaos.kinds import Kind
from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import memory_file
from chaos.runner.cgroups import CgroupTree
from chaos.runner.network import Network
from chaos.runner.vmms import PendingOperation, StepFailed, VmmProcess, VmmProcesses
from chaos.vmm import guest
from chaos.vmm.messages import (
    AddVcpu,
    Ask,
    Close,
    Create,
    Init,
    LoseDescriptor,
    Operation,
    Pause,
    RunVcpus,
    SetMemory,
    name_of,
)


@dataclass(slots=True, eq=False)
class Guest:
    """A VM of the experiment. `every` is how often its guest leaves while it runs, None while it does not. `kept_out`
    is why its vCPUs may not enter the guest now, "" if they may. `before_close` ends what uses its descriptors.
    `address` is where its memory lies in its VMM, once it was created. It is `paused` if it was taken out of its guest,
    or was handed one over that was, and nobody has let it in since."""

    name: str
    spec: Vm
    vmm: VmmProcess
    created: bool = False
    lane: int = 0
    every: int | None = None
    kept_out: str = ""
    before_close: Callable[[], None] | None = None
    address: int = 0
    paused: bool = False

    @property
    def running(self) -> bool:
        return self.every is not None and self.vmm.alive


@dataclass(slots=True)
class Guests:
    """`cgroups` are those below the run's by path, `network` is what VMMs hand guests over on; both are there once
    they are made. `under_way` are operations that the script has not waited for, by the VM that they are on. `lanes` is
    how many vCPUs count in each memory, a page each. `devices` are the VMs that are created with one. `eventfds` are
    those that a VM was bound to, by what and by number: there is one for each GSI, and one for each port."""

    experiment: Experiment
    vmms: VmmProcesses
    cgroups: CgroupTree
    executes_es: bool
    network: Network = field(default_factory=Network)
    vms: dict[str, Guest] = field(default_factory=dict)
    memories: dict[str, OwnedFd] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)
    under_way: dict[str, PendingOperation] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()
    eventfds: dict[tuple[str, int], OwnedFd] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Guest:
        """A VM of the experiment, launched or not."""
        return self.vms[name]

    @property
    def all(self) -> tuple[Guest, ...]:
        return tuple(self.vms.values())

    def spawn(self, name: str) -> VmmProcess:
        """Start a VMM where the experiment wants it. Raises `StepFailed`."""
        cgroup = self.experiment.vmms[name].cgroup
        return self.vmms.spawn(name, self.cgroups[cgroup], network=self.network.space(name), label=cgroup)

    def start(self) -> None:
        """Start the experiment's VMMs; its VMs have their memory then, and are not yet created."""
        vmms = {name: self.spawn(name) for name in self.experiment.vmms}
        for name, spec in self.experiment.vms.items():
            self.vms[name] = Guest(name, spec, vmms[spec.vmm])
            if spec.memory not in self.memories:
                self.memories[spec.memory] = memory_file(f"guest-{spec.memory}", guest.MEMORY)
                self.lanes[spec.memory] = 0
            if spec.kind is not Kind.MIRROR:  # those take turns on one guest, so they share its pages
                self.lanes[spec.memory] = max(self.lanes[spec.memory], self.experiment.vcpus(name))
        for mirror in (found for found in self.vms.values() if found.spec.kind is Kind.MIRROR):
            mirror.lane = self.lanes[mirror.spec.memory]
            self.lanes[mirror.spec.memory] += self.experiment.vcpus(mirror.name)
        full = next((memory for memory, lanes in self.lanes.items() if lanes > guest.LANES), None)
        if full is not None:
            raise StepFailed(f"the vCPUs in memory {full!r} are more than {guest.LANES}, mirrors included")

    def restart(self, name: str) -> None:
        """Start a VMM that has died again, where it was; its VMs went with it. Raises `StepFailed`."""
        vmm = self.spawn(name)
        for vm in self.vms.values():
            if vm.vmm.name == name:
                vm.vmm, vm.created, vm.every, vm.paused = vmm, False, None, False

    def launched(self, name: str) -> Guest:
        """A VM that was launched. Raises `StepFailed`."""
        found = self.vms[name]
        if not found.created:
            raise StepFailed(f"VM {name} was not launched")
        return found

    def create(self, guest: Guest) -> None:
        """Raises `StepFailed`."""
        spec = guest.spec
        users = [vm for vm in self.vms.values() if vm.spec.memory == spec.memory]
        # Where nobody encrypts the memory the program is plain too. It is written once: a guest may run there already.
        ordinary = all(vm.spec.kind is Kind.PLAIN and not vm.created for vm in users)
        create = Create(
            vm=guest.name, kind=spec.kind.value, vcpus=spec.vcpus, memory=spec.memory, type=spec.type, lane=guest.lane,
            lanes=self.lanes[spec.memory] if ordinary else 0, device=guest.name in self.devices,
        )  # fmt: skip
        done = self.must(guest, create, fds=(self.memories[spec.memory].number,))
        guest.address, guest.created = int(str(done.value["address"])), True

    def eventfd(self, what: str, number: int) -> OwnedFd:
        """That of a GSI or a port, which is made when it is first asked for. Nobody waits for one, or in writing it."""
        key = what, number
        if key not in self.eventfds:
            self.eventfds[key] = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self.eventfds[key]

    def do(self, guest: Guest, operation: Operation, *, phase: str = "", fds: tuple[int, ...] = ()) -> Done:
        return self.vmms.do(guest.vmm, operation, phase=phase, fds=fds)

    def must(self, guest: Guest, operation: Operation, *, phase: str = "", fds: tuple[int, ...] = ()) -> Done:
        """An operation without which the script makes no sense. Raises `StepFailed` if it does not succeed."""
        done = self.do(guest, operation, phase=phase, fds=fds)
        if done.outcome != "ok":
            raise StepFailed(f"{name_of(operation)} of {guest.name}: {explained(done)}")
        return done

    def enter(self, guest: Guest, every: int, *, phase: str = "") -> Done:
        """Raises `StepFailed` if its vCPUs are to stay out of the guest."""
        if guest.kept_out:
            raise StepFailed(guest.kept_out)
        boards = guest.vmm.watch(guest.name, guest.spec.vcpus)
        done = self.do(guest, RunVcpus(vm=guest.name, every=every), phase=phase, fds=boards)
        if done.outcome == "ok":
            guest.every, guest.paused = every, False
        return done

    def leave(self, guest: Guest, *, phase: str = "") -> Done:
        done = self.do(guest, Pause(vm=guest.name), phase=phase)
        guest.every, guest.paused = None, guest.paused or guest.every is not None
        guest.vmm.unwatch(guest.name)
        return done

    def ask(self, guest: Guest) -> tuple[Answer, ...]:
        """Ask a VM that is out of the guest whether it lives, and record what it answers. Raises `StepFailed`."""
        log, reply = self.vmms.log, self.vmms.ask(guest.vmm, Ask(vm=guest.name))
        device = reply.value.get("device")
        log.write(
            Asked(
                t=log.now(), agent=guest.vmm.name, vm=guest.name, step=log.step, answers=reply.answers,
                device=device if isinstance(device, int) else None,
            )
        )  # fmt: skip
        return reply.answers

    def close_aside(self, guest: Guest) -> None:
        """Let it be closed and go on. Its agent knows no such VM from then on. Raises `StepFailed` as `close` does."""
        if guest.before_close is not None:
            guest.before_close()
        self.under_way[guest.name] = self.vmms.invoke(guest.vmm, Close(vm=guest.name), aside=True)
        guest.created, guest.every, guest.paused = False, None, False
        guest.vmm.unwatch(guest.name)

    def close(self, guest: Guest) -> Done:
        """Raises `StepFailed` if what is to end before that does not."""
        if guest.before_close is not None:
            guest.before_close()
        done = self.do(guest, Close(vm=guest.name))
        guest.created = done.outcome != "ok"
        guest.every, guest.paused = None, False
        guest.vmm.unwatch(guest.name)
        return done

    def may_run(self, guest: Guest) -> bool:
        """Whether the CPU can enter it at all."""
        return self.executes_es or not self.is_es(guest)

    def is_es(self, guest: Guest) -> bool:
        """Whether the guest behind this VM is a SEV-ES one; a migration's destination takes after its source."""
        kinds = {vm.kind for vm in self.experiment.vms.values() if vm.memory == guest.spec.memory}
        return Kind.SEV_ES in kinds

    # -- what faults do to them ---------------------------------------------------------------------------

    def vmm_of(self, vm: str) -> VmmProcess:
        """The VMM that a VM belongs to."""
        return self.vms[vm].vmm

    def take(self, vmm: str, vm: str, key: str) -> Done:
        """Have a VMM create a VM of this name and take a context of `key` for it; how its INIT was answered."""
        memory = next(iter(self.memories))
        create = Create(vm=vm, kind=key.replace("_", "-"), vcpus=0, memory=memory)
        process = self.vmms[vmm]
        created = self.vmms.do(process, create, fds=(self.memories[memory].number,))
        return created if created.outcome != "ok" else self.vmms.do(process, Init(vm=vm, key=key))

    def give_back(self, vmm: str, vm: str) -> None:
        """Have a VMM close a VM that it took a context for."""
        self.vmms.do(self.vmms[vmm], Close(vm=vm))

    def lose_fd(self, vm: str, fd: str) -> Done:
        """Have a descriptor closed behind the back of the VM's VMM: "vm", "vcpu 0" or "sev"."""
        return self.do(self[vm], LoseDescriptor(vm=vm, fd=fd))

    def set_memory(self, vm: str, there: bool) -> Done:
        """Have the VM's memory slot put there or taken away."""
        return self.do(self[vm], SetMemory(vm=vm, there=there))

    def add_vcpu(self, vm: str, id: int, then: Callable[[], None]) -> PendingOperation:
        """Have the VM's VMM create a vCPU that never runs, and go on. `then` is called when that is over."""
        pending = self.vmms.invoke(self.vmm_of(vm), AddVcpu(vm=vm, id=id, bare=True), aside=True)
        pending.then = then
        return pending

    def is_dead(self, vm: str) -> bool:
        """Whether a move took its context away, by that move's answer."""
        return vm in self.vmms.log.moved_from

    def moves(self, vm: str) -> tuple[PendingOperation, ...]:
        """The moves so far that have it as their source or their destination, also those under way."""
        return tuple(move for move in self.vmms.moves if vm in (move.args["vm"], move.args.get("source")))

    def memory(self, vm: str) -> int:
        """A descriptor of the file that the guest's memory is."""
        return self.memories[self[vm].spec.memory].number

    def clear(self) -> None:
        """Give up what is not the VMMs' own, once they have ended. Raises `CleanupFailed`."""
        for memory in self.memories.values():
            memory.close()
        self.memories.clear()
        for eventfd in self.eventfds.values():
            eventfd.close()
        self.eventfds.clear()
        self.network.give_up()
