# SPDX-License-Identifier: Apache-2.0
"""One VM of an agent: its descriptors, its memory, its vCPUs, and the operations on it.

A method is an operation of `chaos.history.records`: it makes the system calls and nothing around them, and raises
`KernelError` when one is refused. Who measures and answers is `chaos.vmm.agent`.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, EIO, errorcode

from chaos.errors import InternalError
from chaos.history.records import Value
from chaos.kinds import Kind
from chaos.kvm.call import KernelError
from chaos.kvm.numbers import Cap
from chaos.kvm.sev import Platform, Sev
from chaos.kvm.structs import MpState
from chaos.kvm.system import System
from chaos.kvm.userfault import ArgumentPage
from chaos.kvm.vcpu import KvmVcpu
from chaos.kvm.vm import KvmVm
from chaos.linux.fd import Mapping, OwnedFd
from chaos.native import Seen
from chaos.native.edge import tally
from chaos.vmm import foreign_fds, guest, race, state
from chaos.vmm.messages import BindIoeventfd, BindIrqfd, Mirror, Move, Moves, Sampled, VcpuStates
from chaos.vmm.peer import Peer
from chaos.vmm.race import At
from chaos.vmm.vcpus import Team

SLOT, PROBE = 0, 1
VECTORS = range(32, 256)  # those below are exceptions
RUNNABLE = 0  # KVM_MP_STATE_RUNNABLE


@dataclass(slots=True)
class OpenDevices:
    """The devices a VMM process has open. /dev/sev is opened when first needed: a plain VM needs none."""

    system: System
    _platform: Platform | None = None
    _extent: state.Extent | None = None

    def extent(self) -> state.Extent:
        """What there is to carry of a vCPU here. Raises `KernelError`."""
        if self._extent is None:
            size = self.system.check_extension(Cap.XSAVE2)
            tsc = self.system.check_extension(Cap.VCPU_ATTRIBUTES) > 0
            self._extent = state.Extent(self.system.msr_indices(), xsave=size, lapic=True, tsc_offset=tsc)
        return self._extent

    def platform(self) -> Platform:
        """Raises OSError."""
        if self._platform is None:
            self._platform = Platform.open()
        return self._platform

    def sev_fd(self) -> int:
        """Raises OSError."""
        return self.platform().fd.number


@dataclass(slots=True)
class Machine:
    host: OpenDevices
    kind: Kind
    count: int
    vm: KvmVm
    memory: Mapping
    type: int = 0
    lane: int = 0
    vcpus: list[KvmVcpu] = field(default_factory=list)
    bare: list[KvmVcpu] = field(default_factory=list)
    team: Team | None = None
    peer: Peer = field(default_factory=Peer)
    received: dict[str, OwnedFd] = field(default_factory=dict)  # descriptors of other VMs, until they are used
    before_close: Callable[[], None] | None = None  # ends what uses its descriptors
    page: ArgumentPage | None = None
    device: OwnedFd | None = None
    no_device: int | None = None  # how KVM_CREATE_DEVICE failed, 0 if it did not
    routed: bool = False  # whether its GSIs raise vectors of its first vCPU

    @classmethod
    def create(
        cls,
        host: OpenDevices,
        kind: Kind,
        count: int,
        memory_fd: int,
        *,
        vm_type: int = 0,
        lane: int = 0,
        lanes: int = 0,
        device: bool = False,
    ) -> Machine:
        """A VM with its memory, and with its vCPUs too unless it is to be encrypted: INIT wants none."""
        memory = Mapping(memory_fd, guest.MEMORY)
        if lanes:
            memory.write(0, guest.image(lanes))
        vm: KvmVm | None = None
        machine: Machine | None = None
        try:
            vm = host.system.create_vm(vm_type)
            vm.set_memory(SLOT, 0, memory)
            vm.create_irqchip()
            machine = cls(host=host, kind=kind, count=count, vm=vm, memory=memory, type=vm_type, lane=lane)
            if device:
                machine._create_device()
            if kind is Kind.PLAIN:
                machine._create_vcpus()
        except BaseException:
            if machine is not None:
                machine.close()
            else:
                if vm is not None:
                    vm.close()
                memory.close()
            raise
        return machine

    def _create_device(self) -> None:
        """Nobody uses it: it has a descriptor, and that has to be dead when the VM is."""
        try:
            self.device, self.no_device = self.vm.create_device(), 0
        except KernelError as error:
            self.no_device = error.number

    def _create_vcpus(self) -> None:
        for number in range(self.count):
            self._create_vcpu(number)
        self.team = Team(self.vcpus)

    def _create_vcpu(self, number: int) -> None:
        """A vCPU at the start of the guest's program, in real mode, on its page, leaving to the VMM never."""
        vcpu = self.vm.create_vcpu(number)
        lane = self.lane + len(self.vcpus)
        self.vcpus.append(vcpu)
        vcpu.set_cpuid(self.host.system.supported_cpuid())
        segments = vcpu.sregs()
        for segment in (segments.cs, segments.ds, segments.es, segments.ss):
            segment.base = 0
            segment.selector = 0
        segments.ds.base = guest.segment(lane)
        segments.ds.selector = segments.ds.base >> 4  # as real mode has it: Intel's CPUs insist
        vcpu.set_sregs(segments)
        registers = vcpu.regs()
        registers.rip, registers.rsp, registers.rflags = guest.CODE, guest.STACK, 0x2
        registers.rbx = registers.rdx = 0
        registers.rsi = guest.NEVER
        vcpu.set_regs(registers)
        vcpu.set_mp_state(MpState(mp_state=RUNNABLE))  # all but the first wait to be started by another

    @property
    def sev(self) -> Sev:
        return Sev(self.vm.fd.number, self.host.sev_fd(), self.page if self.page and not self.page.used else None)

    @property
    def runnable(self) -> Team:
        if self.team is None:
            raise InternalError("the VM has no vCPU yet: it is to be encrypted, and neither INIT nor mirror was done")
        return self.team

    @property
    def every_vcpu(self) -> tuple[KvmVcpu, ...]:
        """Also those that the guest has nothing of."""
        return (*self.vcpus, *self.bare)

    @property
    def threads(self) -> tuple[int, ...]:
        """The threads of its vCPUs, by number."""
        return self.team.threads if self.team is not None else ()

    @property
    def seen(self) -> tuple[Seen, ...]:
        """What its vCPUs have seen of the guest in their latest stay."""
        return self.team.seen if self.team is not None else ()

    # -- launch -------------------------------------------------------------------------------------------

    def init(self, key: str, command: str, *, flags: int, features: int, ghcb: int) -> None:
        """Any of the three INITs; then make the vCPUs, which it wants none of."""
        if command == "init2" or (not command and self.type):
            self.sev.init2(flags=flags, features=features, ghcb=ghcb)
        elif command == "es-init" or (not command and key == Kind.SEV_ES.key):
            self.sev.es_init()
        else:
            self.sev.init()
        self._create_vcpus()

    def become_mirror(self, owner: int, *, flags: int = 0, at: At | None = None) -> None:
        """Share the context of the VM whose descriptor is `owner`; then make the vCPUs, which it wants none of."""
        if at is None:
            self.vm.copy_context_from(owner, flags=flags)
        else:
            race.once(self.vm, Cap.COPY_ENC_CONTEXT_FROM, owner, flags=flags, at=at)
        if not self.vcpus:
            self._create_vcpus()

    def add_vcpu(self, number: int, *, bare: bool = False) -> None:
        """One more, under that id. While the guest runs it stays out, and a bare one always does."""
        if bare:
            self.bare.append(self.vm.create_vcpu(number))
            return
        self._create_vcpu(number)
        if self.team is None or not self.team.running:
            self.count, self.team = len(self.vcpus), Team(self.vcpus)

    def launch_start(self, policy: int, *, read_only: bool = False) -> dict[str, Value]:
        return {"handle": self.sev.launch_start(policy, read_only=read_only)}

    def launch_update_data(self, lanes: int, address: int) -> None:
        """Write the program and the pages of so many vCPUs, pin the memory, encrypt what the guest touches."""
        image = guest.image(lanes)
        self.memory.write(0, image)
        self.register_region(address)
        self.sev.launch_update_data(address, len(image))

    def register_region(self, address: int) -> None:
        self.vm.register_region(address, self.memory.size)

    def unregister_region(self, address: int) -> None:
        """Guests' memory is all of one size, and the kernel looks for an address that somebody registered."""
        self.vm.unregister_region(address, self.memory.size)

    def launch_measure(self) -> dict[str, Value]:
        return {"measure": self.sev.launch_measure().hex()}

    def guest_status(self) -> dict[str, Value]:
        status = self.sev.guest_status()
        return {"handle": int(status.handle), "policy": int(status.policy), "state": int(status.state)}

    def set_memory(self, *, there: bool, slot: int = SLOT) -> None:
        """A memory slot: the first lies at the guest's address 0, the others behind it, one after the other."""
        if there:
            self.vm.set_memory(slot, slot * self.memory.size, self.memory)
        else:
            self.vm.remove_memory(slot)

    # -- interrupts -----------------------------------------------------------------------------------------

    def bind(self, do: BindIrqfd | BindIoeventfd, eventfd: int) -> None:
        """With the first interrupt that is bound its GSIs raise vectors, and its first vCPU takes them."""
        if isinstance(do, BindIoeventfd):
            self.vm.ioeventfd(eventfd, do.port, assign=do.assign)
            return
        if do.assign and not self.routed:
            self.vm.route_to_first(VECTORS)
            self.vcpus[0].enable_apic()
            self.routed = True
        self.vm.irqfd(eventfd, do.gsi, assign=do.assign)

    def interrupts(self) -> tuple[int, ...]:
        """The vectors that the first vCPU was sent and has not done with. The guest takes none: they stay."""
        return self.vcpus[0].requested()

    def has_memory(self) -> bool:
        """Whether the slot is there: another one in its place is refused with EEXIST. Raises `KernelError`."""
        try:
            self.vm.set_memory(PROBE, 0, self.memory)
        except KernelError as error:
            if error.number != EEXIST:
                raise
            return True
        self.vm.remove_memory(PROBE)
        return False

    # -- a page of arguments ------------------------------------------------------------------------------

    def arm_page(self) -> None:
        """The next SEV command that has arguments waits for them. Raises OSError."""
        self.put_page()
        self.page = ArgumentPage()

    def put_page(self) -> None:
        """No command waits for its arguments any more. Raises OSError."""
        page, self.page = self.page, None
        if page is not None and page.used:
            page.release()  # it is closed by the command
        elif page is not None:
            page.discard()

    # -- the guest ----------------------------------------------------------------------------------------

    def sample(self) -> Sampled:
        team = self.runnable
        each, where = team.sample()
        return Sampled(
            ticks=min(each), each=each, stale=team.stale, where=where, ended=team.ended,
            first_ticks=tuple(seen.first_tick for seen in team.seen), last_ticks=team.last_ticks, sound=team.sound,
        )  # fmt: skip

    def pause(self) -> dict[str, Value]:
        """When each vCPU last ticked, which have left the guest's program, and of which memory is not what the
        registers say; why the first that ran no more by then did not. The registers of all these."""
        team = self.runnable
        ran = team.running
        team.pause()
        astray, torn = team.astray(), team.torn(self._pages() if ran else ())
        odd = sorted({*astray, *torn, *team.stopped})
        registers: list[int | str] = [f"vcpu {number}: {team.registers(number)}" for number in odd]
        return {
            "last_ticks": list(team.last_ticks), "astray": list(astray), "torn": list(torn), "ended": team.ended,
            "registers": registers,
        }  # fmt: skip

    def _pages(self) -> list[bytes]:
        """Those of the vCPUs, none where memory is encrypted: there the program does not look like itself."""
        if self.memory.read(guest.CODE, len(guest.TEXT)) != guest.TEXT:
            return []
        lanes = range(self.lane, self.lane + self.count)
        return [self.memory.read(guest.LANES_AT + guest.segment(lane), guest.LANE) for lane in lanes]

    # -- the hand-over ------------------------------------------------------------------------------------

    def get_state(self, *, within: float) -> dict[str, Value]:
        """How much was read of how many vCPUs; the other end has it all. It is not left waiting for what cannot be
        read."""
        try:
            states = tuple(state.take(vcpu, self.host.extent()) for vcpu in self.vcpus[: self.count])
        except KernelError:
            self.peer.disconnect()
            raise
        self.peer.send_state(states, within=within)
        return _amount(states)

    def receive_state(self, *, within: float) -> dict[str, Value]:
        return _amount(self.peer.receive_state(self.host.extent(), within=within))

    def set_state(self) -> dict[str, Value]:
        """Give the vCPUs what arrived, read them again, and name what differs: `vcpu 1: regs rax`. Not in the guest."""
        arrived = self.peer.take_state()
        if len(arrived) > len(self.vcpus):
            raise OSError(EINVAL, f"the state of {len(arrived)} vCPUs does not fit into {len(self.vcpus)}")
        if len(arrived) < self.count:  # the guest has no more vCPUs than it had: the others are not started
            self.count, self.team = len(arrived), Team(self.vcpus[: len(arrived)])
        differs: list[int | str] = []
        for number, (vcpu, parts) in enumerate(zip(self.vcpus, arrived, strict=False)):
            state.give(vcpu, parts)
            found = state.take(vcpu, self.host.extent())
            differs += [f"vcpu {number}: {what}" for what in state.differences(parts, found)]
        return {"vcpus": len(arrived), "differs": differs}

    def send_fd(self) -> None:
        self.peer.send_fd(self.vm.fd.number)

    @contextmanager
    def given(self, take: Move | Mirror) -> Iterator[int]:
        """The descriptor that the operation takes: its source's as it arrived, a copy of our own, or a wrong one."""
        if take.fd:
            with foreign_fds.descriptor(take.fd, self.host.system, self.host.sev_fd()) as number:
                yield number
        else:
            with self._descriptor_of(take) as source:
                yield source.number

    def _descriptor_of(self, take: Move | Mirror) -> OwnedFd:
        if take.source == take.vm:
            return OwnedFd(os.dup(self.vm.fd.number))
        return self.received.pop(take.source, None) or self.peer.take_fd()

    def receive_fd(self, source: str) -> None:
        """Have the descriptor of `source` out of the socket, so that there may be another connection."""
        arrived = self.peer.take_fd()
        if source in self.received:
            self.received.pop(source).close()
        self.received[source] = arrived

    # -- moves ------------------------------------------------------------------------------------------------

    def move_from(self, source: int, *, flags: int = 0, at: At | None = None) -> None:
        """Take the context of the VM whose descriptor is `source`."""
        if at is None:
            self.vm.move_context_from(source, flags=flags)
        else:
            race.once(self.vm, Cap.MOVE_ENC_CONTEXT_FROM, source, flags=flags, at=at)
        self.peer.taken = True

    def whose(self) -> str:
        """Who has the guest of the migration that this VM was last part of, as its VMM sees it: "mine", "theirs", or ""
        if it cannot tell. A source that was not told asks the kernel: it is dead if the destination has the guest."""
        if self.peer.role == "destination":
            return "mine" if self.peer.taken else "theirs"
        if self.peer.role != "source":
            return ""
        try:
            self.vm.check_extension(Cap.MOVE_ENC_CONTEXT_FROM)
        except KernelError as error:
            return "theirs" if error.number == EIO or self.peer.given else ""
        return "theirs" if self.peer.given else "mine"

    def moves(self, do: Moves, memory: int, at: At) -> dict[str, Value]:
        """How many moves from each source were answered what: "old EBUSY" → 9000. The descriptors are closed then."""
        own = self.vm.fd.number
        fds = [own if source == do.vm else self.received[source].number for source in do.sources]
        try:
            outcome = race.moves(self.vm, fds, rounds=do.rounds, threads=do.threads, memory=memory, at=at)
        finally:
            for source in set(do.sources) & set(self.received):
                self.received.pop(source).close()
        counts = Counter[str]()
        for thread in outcome.threads:
            for (index, number), count in tally(thread).items():
                name = errorcode.get(number, str(number)) if number else "ok"
                counts[f"{do.sources[index]} {name}"] += count
        return dict(counts)

    # -- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Every descriptor of the VM, taken from the threads that use them; vCPUs leave the guest."""
        if self.before_close is not None:
            self.before_close()
        if self.team is not None:
            for _ in self.vcpus:
                with contextlib.suppress(OSError):  # a dead vCPU says EIO; it is out all the same
                    self.team.pause()
            if self.team.running:
                raise TimeoutError("a vCPU is still in the guest")
        self.peer.disconnect()
        for descriptor in self.received.values():
            descriptor.close()
        self.received.clear()
        self.put_page()
        for vcpu in self.every_vcpu:
            vcpu.close()
        self.vcpus.clear()
        self.bare.clear()
        if self.device is not None:
            self.device.close()
        self.vm.close()
        self.memory.close()


def _amount(states: VcpuStates) -> dict[str, Value]:
    return {"vcpus": len(states), "bytes": sum(len(part) for parts in states for part in parts.values())}
