# SPDX-License-Identifier: Apache-2.0
"""The steps of a script, as data. docs/experiments.md says the same to those who write experiments.

A step with `wait` may be left under way (`wait: false`): the script goes on while it is, until `join`. One operation a
VM can be under way; it goes by the name of the VM that it is an operation on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Literal

import msgspec

Name = Annotated[
    str,
    msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,40}$", description="lower case, digits, dashes; up to 41, a letter first"),
]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Ticks = Annotated[int, msgspec.Meta(gt=0, le=1_000_000)]
Nth = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgspec has no bound that high; `chaos.experiment.model` has

Numbers = Annotated[str, msgspec.Meta(pattern=r"^\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*$", description="like 0-3,5")]


def each_of(numbers: str) -> tuple[int, ...]:
    """0, 1, 2, 3, 5 of "0-3,5"."""
    parts = [part.partition("-") for part in numbers.split(",")]
    return tuple(n for first, _, last in parts for n in range(int(first), int(last or first) + 1))


Phase = Literal["connect", "pause", "send-state", "send-fd", "move", "load-state", "resume", "commit", "confirm"]

ForeignFd = Literal["closed", "negative", "kvm", "sev", "vcpu", "stats", "eventfd", "pipe", "memory", "socket"]
"""What a move or a mirror may be given instead of a VM's descriptor."""

InitCommand = Literal["init", "es-init", "init2"]

VCPU_RUNNING = "vcpu-running"
VM_LOCKED = "vm-locked"
UNARMED = (VCPU_RUNNING, VM_LOCKED)
"""Holds that need no arming, since a move comes to them by itself: a vCPU inside KVM_RUN keeps its mutex, and a call on
one of the VMs that does not come back keeps that VM's lock."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Step(Part, frozen=True, kw_only=True, tag_field="do"):
    pass


# -- VMs --------------------------------------------------------------------------------------------------


class LaunchStep(_Step, frozen=True, kw_only=True, tag="launch"):
    """Create the VM with its vCPUs, and unless it is plain, take it through INIT, START, UPDATE, MEASURE, FINISH.

    With `finish` off the last two wait for `finish`: the registers of a SEV-ES mirror can be encrypted until then.
    """

    vm: Name
    finish: bool = True


class CreateStep(_Step, frozen=True, kw_only=True, tag="create"):
    """Create the VM, with its vCPUs if it is plain, and nothing more: what `launch` begins with."""

    vm: Name


class CallStep(_Step, frozen=True, kw_only=True, tag="call"):
    """One operation on the VM, by itself: what `launch` is made of, in any order. What the kernel refuses is an answer.

    What takes more than the VM has a step of its own: `init`, `vcpu`, `command`, `mirror`, `move`. A region goes by its
    address in the process that registered it: with `of` it is that of this VM's memory. The arguments of a
    `launch_start` that are `read_only` lie where the kernel may not write, so that it cannot say how it went.
    """

    vm: Name
    operation: Literal[
        "launch_start", "launch_update_data", "launch_update_vmsa", "launch_measure", "launch_finish",
        "register_region", "unregister_region", "guest_status",
    ]  # fmt: skip
    of: Name | None = None
    read_only: bool = False
    wait: bool = True


class InitStep(_Step, frozen=True, kw_only=True, tag="init"):
    """The INIT of a VM, whatever it is: what the VM's kind and type ask for, or another `command`.

    `flags`, `features` and `ghcb` are what INIT2 is given. With `each` it is tried with every bit of that field alone,
    one INIT after the other on this VM, however they are answered.
    """

    vm: Name
    command: InitCommand | None = None
    flags: U32 = 0
    features: U64 = 0
    ghcb: U16 = 0
    each: Literal["flags", "features"] | None = None
    wait: bool = True


class VcpuStep(_Step, frozen=True, kw_only=True, tag="vcpu"):
    """Create one more vCPU of the VM, under this id."""

    vm: Name
    id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 12)]
    wait: bool = True


class CommandStep(_Step, frozen=True, kw_only=True, tag="command"):
    """KVM_MEMORY_ENCRYPT_OP with each of these command numbers in turn, and without any data."""

    vm: Name
    ids: Numbers

    @property
    def numbers(self) -> tuple[int, ...]:
        return each_of(self.ids)


Offset = Annotated[int, msgspec.Meta(ge=0, lt=2 * 4096)]
Length = Annotated[int, msgspec.Meta(ge=0, le=4 * 4096)]


class DebugStep(_Step, frozen=True, kw_only=True, tag="debug"):
    """DBG_DECRYPT of so many bytes of the guest's memory into a buffer of its VMM's, or DBG_ENCRYPT the other way, from
    and to these offsets in bytes. With several numbers each is tried with each of the others, one after the other."""

    vm: Name
    operation: Literal["dbg_decrypt", "dbg_encrypt"]
    read_at: Offset | tuple[Offset, ...] = 0
    write_at: Offset | tuple[Offset, ...] = 0
    length: Length | tuple[Length, ...]

    @property
    def each(self) -> tuple[tuple[int, int, int], ...]:
        """Both offsets and the length of each command."""
        return tuple(product(_several(self.read_at), _several(self.write_at), _several(self.length)))


def _several(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else numbers


class FinishStep(_Step, frozen=True, kw_only=True, tag="finish"):
    """Measure and finish a launch that was left open."""

    vm: Name


class TakingStep(_Step, frozen=True, kw_only=True):
    """Of the two that take another VM: which, or the wrong descriptor given in its stead. Exactly one of the two.
    `flags` are those of KVM_ENABLE_CAP, of which there are none."""

    source: Name | None = None
    fd: ForeignFd | None = None
    flags: U32 = 0


class MirrorStep(TakingStep, frozen=True, kw_only=True, tag="mirror"):
    """Make `vm` a mirror of `source`: it shares the context, and gets its vCPUs after that. Creates it, unless it was
    launched as something else, which the kernel then refuses."""

    vm: Name


class CloseStep(_Step, frozen=True, kw_only=True, tag="close"):
    """Close every file descriptor of the VM."""

    vm: Name
    wait: bool = True


# -- the guest --------------------------------------------------------------------------------------------


class RunStep(_Step, frozen=True, kw_only=True, tag="run"):
    """Let the vCPUs run. The guest leaves to its VMM every `every` ticks (a power of two), or never if 0."""

    vm: Name
    every: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1


class CountStep(_Step, frozen=True, kw_only=True, tag="count"):
    """Wait until the guest has counted `ticks` further, and record its counter."""

    vm: Name
    ticks: Ticks
    within: Seconds = 60.0


class PauseStep(_Step, frozen=True, kw_only=True, tag="pause"):
    """Bring the vCPUs out of the guest."""

    vm: Name


StormCall = Literal[
    "KVM_RUN", "KVM_GET_REGS", "KVM_SET_REGS", "KVM_GET_SREGS", "KVM_GET_FPU", "KVM_GET_MP_STATE", "KVM_GET_MSRS",
    "KVM_GET_LAPIC", "KVM_GET_XCRS", "KVM_GET_VCPU_EVENTS", "KVM_GET_DEBUGREGS", "KVM_GET_TSC_KHZ", "KVM_INTERRUPT",
    "KVM_CHECK_EXTENSION", "KVM_GET_CLOCK", "KVM_SET_USER_MEMORY_REGION", "KVM_SEV_GUEST_STATUS",
]  # fmt: skip


class StormStep(_Step, frozen=True, kw_only=True, tag="storm"):
    """Let so many threads of the VM's VMM make these ioctls on its descriptors, in turns and as fast as they can, until
    `calm`, or some thousand calls after the first EIO. None of them changes the VM; KVM_RUN and KVM_SET_REGS want its
    vCPUs out of the guest meanwhile."""

    vm: Name
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    calls: Annotated[tuple[StormCall, ...], msgspec.Meta(min_length=1)]


class CalmStep(_Step, frozen=True, kw_only=True, tag="calm"):
    """End the storm on the VM, and record what its threads were answered."""

    vm: Name


# -- interrupts -------------------------------------------------------------------------------------------


class IrqfdStep(_Step, frozen=True, kw_only=True, tag="irqfd"):
    """Bind eventfds to GSIs of the VM, or with `assign` off take them away again (KVM_IRQFD). The run has one eventfd
    for each GSI, whichever VM it is bound to; GSI n raises vector n at the VM's first vCPU."""

    vm: Name
    gsis: Numbers
    assign: bool = True


class IoeventfdStep(_Step, frozen=True, kw_only=True, tag="ioeventfd"):
    """Have eventfds signalled when the guest writes to these ports, or with `assign` off no more (KVM_IOEVENTFD)."""

    vm: Name
    ports: Numbers
    assign: bool = True


class SignalStep(_Step, frozen=True, kw_only=True, tag="signal"):
    """Write the eventfd of each of these GSIs, once, as a device does that wants to interrupt its guest."""

    gsis: Numbers


class InterruptsStep(_Step, frozen=True, kw_only=True, tag="interrupts"):
    """Read which vectors the VM's first vCPU was sent. The guest takes no interrupt, so whatever arrived is there."""

    vm: Name


class MemslotStep(_Step, frozen=True, kw_only=True, tag="memslot"):
    """Give the VM another memory slot behind its first, of the same memory, or with `there` off take it away."""

    vm: Name
    slot: Annotated[int, msgspec.Meta(ge=2, le=9)] = 2
    there: bool = True


# -- moves ------------------------------------------------------------------------------------------------


class MigrateStep(_Step, frozen=True, kw_only=True, tag="migrate"):
    """The full hand-over of a VMM upgrade: connect, pause, send state, send the VM fd, move, load state, resume,
    commit, confirm. Whatever one VMM waits for of the other, it waits `within` seconds for.

    A phase that fails is an answer: the guest goes on where it can, and the script goes on. `supervise` says what is
    done then: `abandon` leaves the guest where it is; `retry` makes up to `attempts` in all, with a new VMM for a
    destination that has died. The steps of `before` are carried out just before the phase they are named for, once.
    """

    source: Name
    destination: Name
    within: Seconds = 20.0
    supervise: Literal["abandon", "retry"] = "abandon"
    attempts: Annotated[int, msgspec.Meta(ge=2, le=10)] = 2
    before: dict[Phase, tuple[Step, ...]] = {}


class MoveStep(TakingStep, frozen=True, kw_only=True, tag="move"):
    """The move alone. It is an operation on its destination, which makes the call."""

    destination: Name
    wait: bool = True


class MovesStep(_Step, frozen=True, kw_only=True, tag="moves"):
    """Moves into `destination` in a tight loop, from each of `sources` in turn (itself may be among them), so many
    rounds, by so many threads at once. What is answered is counted; each move that succeeds stands in the history."""

    destination: Name
    sources: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1, max_length=16)]
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    threads: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1

    @property
    def calls(self) -> int:
        return self.rounds * len(self.sources) * self.threads


class TogetherStep(_Step, frozen=True, kw_only=True, tag="together"):
    """Begin the operations of these steps at one moment, each on another VM and by a native thread, and wait for all.
    While they are under way the steps of `meanwhile` are carried out. What does not end `within` so many seconds is
    left to itself."""

    steps: Annotated[tuple[MoveStep | MirrorStep | MovesStep, ...], msgspec.Meta(min_length=2, max_length=16)]
    meanwhile: tuple[Step, ...] = ()
    within: Seconds = 60.0


class JoinStep(_Step, frozen=True, kw_only=True, tag="join"):
    """Wait for the operation on `vm` that is under way."""

    vm: Name
    within: Seconds = 30.0


# -- holds ------------------------------------------------------------------------------------------------


class KernelPlace(Part, frozen=True, kw_only=True):
    """The entry of a kernel function (docs/kfault.md has the list): the `nth` call that the VMM makes, or anybody if
    none is named."""

    function: Annotated[
        str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,62}$", description="a function's name, without brackets")
    ]
    vmm: Name | None = None
    nth: Nth = 1


class FirmwarePlace(Part, frozen=True, kw_only=True):
    """The `nth` command of this name that the firmware gets: it is not answered until it is released."""

    command: Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z_0-9]{0,40}$", description="capitals, like DEACTIVATE")]
    nth: Nth = 1


class PagePlace(Part, frozen=True, kw_only=True):
    """The page from which the next SEV command on the VM reads its arguments: it is not there until it is released."""

    vm: Name


class ArmStep(_Step, frozen=True, kw_only=True, tag="arm"):
    """Prepare a hold, to be known by this name: an operation that comes to the place is stopped there. Exactly one
    place is given."""

    hold: Name
    kernel: KernelPlace | None = None
    firmware: FirmwarePlace | None = None
    page: PagePlace | None = None


class HoldStep(_Step, frozen=True, kw_only=True, tag="hold"):
    """Wait until the operation on `vm` that is under way is stopped inside the kernel at `at`, and show where.

    Two need no arming. vcpu-running: a vCPU inside KVM_RUN keeps its mutex; the move has charged its cgroup and moved
    nothing. vm-locked: another call on the source or the destination is held; the move has done nothing yet.
    """

    vm: Name
    at: Name = VCPU_RUNNING
    within: Seconds = 30.0


class ReleaseStep(_Step, frozen=True, kw_only=True, tag="release"):
    """Let what is stopped at this hold go on, and stop nothing there any more."""

    hold: Name


# -- the platform -----------------------------------------------------------------------------------------


class PlatformStep(_Step, frozen=True, kw_only=True, tag="platform"):
    """Have a VMM send a command of /dev/sev, SEV_ISSUE_CMD, with a buffer that it says is `length` bytes long, and of
    PDH_CERT_EXPORT another of `chain` bytes, for the certificates above. Either is longer, and what is written behind
    what was told shows. PLATFORM_STATUS has a buffer of its own size. PEK_GEN and PDH_GEN, which give the platform new
    keys, have none."""

    vmm: Name
    command: Literal["PLATFORM_STATUS", "PEK_CSR", "PDH_CERT_EXPORT", "GET_ID2", "PEK_GEN", "PDH_GEN"]
    length: U32 = 0
    chain: U32 = 0


ParameterName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,40}$", description="a parameter's name")]
ParameterValue = Annotated[str, msgspec.Meta(pattern=r"^[^\s\"'=]{1,200}$", description="without spaces and quotes")]


class ReloadStep(_Step, frozen=True, kw_only=True, tag="reload"):
    """Unload kvm_amd and ccp, and load them again: ccp with the experiment's parameters and these. There may be no VM;
    every VMM ends before it and is started anew."""

    ccp: dict[ParameterName, ParameterValue] = {}


# -- looking ----------------------------------------------------------------------------------------------


class AskStep(_Step, frozen=True, kw_only=True, tag="ask"):
    """Ask every file descriptor of the VM, in its own process and beside a live VM, whether it is dead."""

    vm: Name


class StatusStep(_Step, frozen=True, kw_only=True, tag="status"):
    """GUEST_STATUS of the VM's context: handle, policy and state, or the errno."""

    vm: Name


class ObserveStep(_Step, frozen=True, kw_only=True, tag="observe"):
    """Read the counters of every cgroup and the firmware's guest count."""

    label: Name


# -- faults -----------------------------------------------------------------------------------------------


class FaultStep(_Step, frozen=True, kw_only=True, tag="fault"):
    """Break something. `target` names what the fault strikes: a VMM, a VM or a cgroup, as the fault wants it.
    `options` are the fault's own and checked by it at load."""

    fault: Name
    target: str = ""
    options: dict[str, str | int | float | bool] = {}


Sweepable = (
    CreateStep | CallStep | InitStep | VcpuStep | DebugStep | MirrorStep | MoveStep | MigrateStep | IrqfdStep
    | IoeventfdStep | MemslotStep | RunStep | CloseStep | PlatformStep
)  # fmt: skip
_SWEPT_AS = {"vcpu": "create_vcpu", "memslot": "set_memory", "migrate": "get_state"}


class SweepStep(_Step, frozen=True, kw_only=True, tag="sweep"):
    """Carry out `before`, `step` and `after`, round after round. In the first three, and in the last, the fault points
    on the way of the operation in `step` are counted, which may be `at_most` so many: allocations of the kernel's, and
    copies of its from or to the VMM. In between one after the other is to fail, and one that is not met is tried up to
    three times. Where the operation was refused, `refused` is carried out, and it is made once more with
    nothing failing.

    Of a `migrate` what is swept is that the source's vCPUs are read, before anything has moved; of a `run` the first
    entry of each vCPU, until the guest leaves; of a `close` nothing can be refused.

    It wants a kernel with fault injection (docs/kernels.md). Pages that vmalloc() takes never fail.
    """

    step: Sweepable
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    refused: tuple[Step, ...] = ()
    at_most: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000

    @property
    def operation(self) -> tuple[str, str]:
        """The VM that it is an operation on, "" if it is one on the platform, and its name in the history."""
        tag = str(self.step.__struct_config__.tag)
        name = getattr(self.step, "operation", _SWEPT_AS.get(tag, tag))
        match self.step:
            case MoveStep():
                return self.step.destination, name
            case MigrateStep():
                return self.step.source, name
            case PlatformStep():
                return "", name
        return self.step.vm, name

    @property
    def swept(self) -> str:
        """The same for a sentence: "init of vm"."""
        vm, operation = self.operation
        return self.step.command if isinstance(self.step, PlatformStep) else f"{operation} of {vm}"


class UndoStep(_Step, frozen=True, kw_only=True, tag="undo"):
    """Make whole again what the latest such fault on `target` broke. What is not undone by a step is at the end."""

    fault: Name
    target: str = ""


Step = (
    LaunchStep | CreateStep | CallStep | InitStep | VcpuStep | CommandStep | DebugStep | FinishStep | MirrorStep
    | CloseStep | PlatformStep | ReloadStep
    | RunStep | CountStep | PauseStep | StormStep | CalmStep | MigrateStep | MoveStep | TogetherStep | JoinStep
    | IrqfdStep | IoeventfdStep | SignalStep | InterruptsStep | MemslotStep
    | ArmStep | HoldStep | ReleaseStep | AskStep | StatusStep | ObserveStep | FaultStep | UndoStep | SweepStep
)  # fmt: skip


def walk(script: tuple[Step | MovesStep, ...]) -> Iterator[tuple[int, Step | MovesStep]]:
    """Each step with its number in the script. Those inside another have that one's."""
    for number, step in enumerate(script):
        yield number, step
        for inner in _inside(step).values():
            for _, below in walk(inner):
                yield number, below


def places(script: tuple[Step | MovesStep, ...], where: str = "script") -> Iterator[tuple[str, Step | MovesStep]]:
    """The same with the place of each in the file, as script[2].before.move[0]."""
    for number, step in enumerate(script):
        yield f"{where}[{number}]", step
        for key, inner in _inside(step).items():
            yield from places(inner, f"{where}[{number}].{key}")


def _inside(step: Step | MovesStep) -> dict[str, tuple[Step | MovesStep, ...]]:
    """The steps that a step has in it, by the key that they stand under."""
    match step:
        case MigrateStep():
            return {f"before.{phase}": inner for phase, inner in step.before.items()}
        case TogetherStep():
            return {"steps": step.steps, "meanwhile": step.meanwhile}
        case SweepStep():
            return {"before": step.before, "step": (step.step,), "refused": step.refused, "after": step.after}
    return {}
