# SPDX-License-Identifier: Apache-2.0
"""What is said between the runner, the fork server and the agents.

The operations are those of `chaos.history.records`, with the same names and arguments, so that what is recorded is what
was sent. Besides them an agent answers questions of the runner (`sample`, `ask`, `fill`) that are no operations of a
VMM.
"""

from __future__ import annotations

import msgspec

from chaos.history.records import Answer, Value


class _Operation(msgspec.Struct, frozen=True, kw_only=True, tag_field="f"):
    pass


class _OnVm(_Operation, frozen=True, kw_only=True):
    """Of one VM of the agent's."""

    vm: str


class Create(_OnVm, frozen=True, kw_only=True, tag="create"):
    """Brings the descriptor of the guest's memory. The vCPUs count in it from lane `lane` on. With `lanes` the program
    for so many is written there: into the memory of a VM that is to run without ever being encrypted. `device` has it
    made with one."""

    kind: str
    vcpus: int
    memory: str
    type: int = 0
    lane: int = 0
    lanes: int = 0
    device: bool = False


class Init(_OnVm, frozen=True, kw_only=True, tag="init", omit_defaults=True):
    """`command` is init, es-init or init2, "" for the one that the VM's type and `key` ask for; the others are given to
    INIT2."""

    key: str
    command: str = ""
    flags: int = 0
    features: int = 0
    ghcb: int = 0


class AddVcpu(_OnVm, frozen=True, kw_only=True, tag="create_vcpu", omit_defaults=True):
    """A `bare` one is created and nothing more: it never runs, and the guest has nothing of it."""

    id: int
    bare: bool = False


class Command(_OnVm, frozen=True, kw_only=True, tag="command"):
    """KVM_MEMORY_ENCRYPT_OP of this number, without data."""

    id: int


class RegisterRegion(_OnVm, frozen=True, kw_only=True, tag="register_region"):
    """All of the guest's memory, which lies at this address of the process."""

    address: int


class UnregisterRegion(_OnVm, frozen=True, kw_only=True, tag="unregister_region"):
    """The memory of a guest that was registered at this address, by whichever process."""

    address: int


class LaunchStart(_OnVm, frozen=True, kw_only=True, tag="launch_start", omit_defaults=True):
    """With arguments that are `read_only` the kernel cannot tell the handle."""

    policy: int
    read_only: bool = False


class LaunchUpdateData(_OnVm, frozen=True, kw_only=True, tag="launch_update_data"):
    """For the vCPUs of the guest and of its mirrors, `lanes` in all, into the memory at this address."""

    lanes: int = 1
    address: int


class LaunchUpdateVmsa(_OnVm, frozen=True, kw_only=True, tag="launch_update_vmsa"):
    pass


class LaunchMeasure(_OnVm, frozen=True, kw_only=True, tag="launch_measure"):
    pass


class LaunchFinish(_OnVm, frozen=True, kw_only=True, tag="launch_finish"):
    pass


class Status(_OnVm, frozen=True, kw_only=True, tag="guest_status"):
    pass


class _Debug(_OnVm, frozen=True, kw_only=True):
    """Offsets in bytes, of either buffer of `chaos.vmm.bounds`."""

    read_at: int
    write_at: int
    length: int


class Decrypt(_Debug, frozen=True, kw_only=True, tag="dbg_decrypt"):
    """From the guest's memory into the VMM's."""


class Encrypt(_Debug, frozen=True, kw_only=True, tag="dbg_encrypt"):
    """From the VMM's memory into the guest's."""


class RunVcpus(_OnVm, frozen=True, kw_only=True, tag="run"):
    """May bring a memory file for each vCPU (`chaos.native`), so that what the guest says can be read elsewhere."""

    every: int


class Pause(_OnVm, frozen=True, kw_only=True, tag="pause"):
    pass


class StartStorm(_OnVm, frozen=True, kw_only=True, tag="storm"):
    """Brings the memory file in which what each thread was answered stands (`chaos.vmm.storm`)."""

    threads: int
    calls: tuple[str, ...]


class EndStorm(_OnVm, frozen=True, kw_only=True, tag="calm"):
    pass


class Listen(_OnVm, frozen=True, kw_only=True, tag="listen"):
    """Be ready for `peer` at this address. Brings the descriptor of a Unix socket to its VMM."""

    peer: str
    address: str


class Connect(_OnVm, frozen=True, kw_only=True, tag="connect"):
    """Brings the descriptor of a Unix socket to the VMM of `peer`. With an `address` it is a migration, whose other end
    listens there: greet it, and wait for its greeting."""

    peer: str
    address: str = ""
    port: int = 0
    within_ms: int = 0


class Accept(_OnVm, frozen=True, kw_only=True, tag="accept"):
    """Wait for `peer`, and for its greeting; greet it."""

    peer: str
    within_ms: int


class GetState(_OnVm, frozen=True, kw_only=True, tag="get_state"):
    """Send the state, and wait until it was received."""

    within_ms: int


class ReceiveState(_OnVm, frozen=True, kw_only=True, tag="receive_state"):
    within_ms: int


class SetState(_OnVm, frozen=True, kw_only=True, tag="set_state"):
    pass


class SendFd(_OnVm, frozen=True, kw_only=True, tag="send_fd"):
    """`to` is the agent at the other end."""

    to: str


class Move(_OnVm, frozen=True, kw_only=True, tag="move", omit_defaults=True):
    """From the VM `source`, or if that is "" with a descriptor of the sort `fd` (`chaos.vmm.foreign_fds`)."""

    source: str = ""
    fd: str = ""
    flags: int = 0


class Mirror(_OnVm, frozen=True, kw_only=True, tag="mirror", omit_defaults=True):
    """As `Move`."""

    source: str = ""
    fd: str = ""
    flags: int = 0


class ReceiveFd(_OnVm, frozen=True, kw_only=True, tag="receive_fd"):
    """Take the descriptor of `source` out of the socket that it was sent through, and keep it until it is used."""

    source: str


class Moves(_OnVm, frozen=True, kw_only=True, tag="moves"):
    """Moves in a tight loop, each thread from each of `sources` in turn, of which the descriptors are here. Brings the
    memory file in which each call is recorded (`chaos.vmm.race`)."""

    sources: tuple[str, ...]
    rounds: int
    threads: int


class Commit(_OnVm, frozen=True, kw_only=True, tag="commit"):
    """The destination says that the guest is its own."""

    within_ms: int


class Confirm(_OnVm, frozen=True, kw_only=True, tag="confirm"):
    """The source hears it and says so, and the destination hears that."""

    within_ms: int


class Disconnect(_OnVm, frozen=True, kw_only=True, tag="disconnect"):
    """Let go of the other end of a migration, and of what it has sent."""


class Close(_OnVm, frozen=True, kw_only=True, tag="close"):
    pass


class LoseDescriptor(_OnVm, frozen=True, kw_only=True, tag="lose_fd"):
    """A descriptor is closed behind the VMM's back: the VM's ("vm"), that of a vCPU ("vcpu 0") or /dev/sev ("sev")."""

    fd: str


class SetMemory(_Operation, frozen=True, kw_only=True, tag="set_memory", omit_defaults=True):
    """A memory slot of the VM's is there, or is not (KVM_SET_USER_MEMORY_REGION): its first, or with `slot` another,
    behind that, of the same memory."""

    vm: str
    there: bool
    slot: int = 0


class BindIrqfd(_OnVm, frozen=True, kw_only=True, tag="irqfd"):
    """The eventfd that comes with it raises this GSI of the VM, or with `assign` off no more (KVM_IRQFD)."""

    gsi: int
    assign: bool


class BindIoeventfd(_OnVm, frozen=True, kw_only=True, tag="ioeventfd"):
    """The eventfd that comes with it is signalled when the guest writes to this port, or no more (KVM_IOEVENTFD)."""

    port: int
    assign: bool


class Interrupts(_OnVm, frozen=True, kw_only=True, tag="interrupts"):
    """Say which vectors its first vCPU has been sent and not yet done with (KVM_GET_LAPIC)."""


class AskPlatform(_Operation, frozen=True, kw_only=True, tag="platform", omit_defaults=True):
    """SEV_ISSUE_CMD of this name, with a buffer that is said to be `length` bytes long, and for PDH_CERT_EXPORT one of
    `chain` for the certificates above."""

    command: str
    length: int = 0
    chain: int = 0


class Exit(_Operation, frozen=True, kw_only=True, tag="exit"):
    pass


Operation = (
    Create | Init | AddVcpu | Command | RegisterRegion | UnregisterRegion | LaunchStart | LaunchUpdateData
    | LaunchUpdateVmsa | LaunchMeasure | LaunchFinish | Status | Decrypt | Encrypt | AskPlatform
    | RunVcpus | Pause | StartStorm | EndStorm | Listen | Connect | Accept | GetState | ReceiveState | SetState | SendFd
    | ReceiveFd | Move | Moves | Mirror | Commit | Confirm | Disconnect | Close | LoseDescriptor | SetMemory | BindIrqfd
    | BindIoeventfd | Interrupts | Exit
)  # fmt: skip


class Sample(_OnVm, frozen=True, kw_only=True, tag="sample"):
    """Read the guest's counter. If the guest does not report it, its vCPU is taken out for that and put back."""


class Ask(_OnVm, frozen=True, kw_only=True, tag="ask"):
    """Ask the VM's descriptors whether they live. Its vCPUs are not in the guest."""


class Whose(_OnVm, frozen=True, kw_only=True, tag="whose"):
    """Say who has the guest of a migration that the VM took part in: "mine", "theirs", or "" if that cannot be told."""


class Fill(_Operation, frozen=True, kw_only=True, tag="fill"):
    """Take contexts of `key` until refused, and give all of them back."""

    key: str


class ArmPage(_OnVm, frozen=True, kw_only=True, tag="arm_page"):
    """The next SEV command on the VM that has arguments is to wait for the page that they are on."""


class PutPage(_OnVm, frozen=True, kw_only=True, tag="put_page"):
    """That page is put there. No command waits for one any more."""


class ArmFailNth(_OnVm, frozen=True, kw_only=True, tag="arm_fail_nth"):
    """In the next operation of this name on the VM the `nth` fault point of the kernel's fails, counted over all calls
    that it makes; with 0 none does, and they are counted."""

    operation: str
    nth: int


class FailedNth(_OnVm, frozen=True, kw_only=True, tag="failed_nth"):
    """What came of that. With `done` 1 the operation has been made, of so many calls, `calls`, and answered `errno`;
    `struck` is then 1 if there was such a point, and `call` the number of the call that it was in from 0. `points` is
    how many there were until one failed. With `disarm` none is to come."""

    operation: str
    disarm: bool = False


class Inside(_OnVm, frozen=True, kw_only=True, tag="inside"):
    """Say which descriptor of the VM is lost (`LoseDescriptor`), and the threads of its vCPUs, ended or not."""

    fd: str = "vm"


class EndThread(_Operation, frozen=True, kw_only=True, tag="end_thread"):
    """End the threads of the VM's vCPUs, or without one the process's first thread."""

    vm: str = ""


class Eat(_Operation, frozen=True, kw_only=True, tag="eat"):
    """Use so much memory, and give it back."""

    mebibytes: int


class Shown(_Operation, frozen=True, kw_only=True, tag="shown"):
    """Say whether the VM has its memory slot (`SetMemory`)."""

    vm: str


class MayLock(_Operation, frozen=True, kw_only=True, tag="may_lock"):
    """Have CAP_IPC_LOCK in force or not; the threads that are begun from now on are as this one."""

    allowed: bool


class Press(_Operation, frozen=True, kw_only=True, tag="press"):
    """Use so much memory, a mebibyte at a time and in a thread of its own, and keep it; none is to give it back."""

    mebibytes: int


class PunchOut(_Operation, frozen=True, kw_only=True, tag="punch_out"):
    """Have a part of the VM's memory given up by its pages (MADV_REMOVE), in bytes."""

    vm: str
    offset: int
    length: int


class Handled(_Operation, frozen=True, kw_only=True, tag="handled"):
    """Say how many signals of a storm were handled since this was asked last. They end the process before. Also how
    often one has `interrupted` a vCPU's KVM_RUN in its latest stay in the guest, and `early`, before the guest had left
    by itself (`chaos.native.Seen`)."""


Harm = ArmFailNth | FailedNth | Inside | Shown | Handled | EndThread | Eat | Press | MayLock | PunchOut
Question = Sample | Ask | Whose | Fill | ArmPage | PutPage | Harm


def name_of(message: Operation | Question) -> str:
    """What it is called in the history, or where it is in none, in a sentence."""
    return str(message.__struct_config__.tag)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """An operation is to make its system call when a gate opens (`chaos.native.gate`), whose descriptor comes last. It
    is number `place` of those, beside `others`."""

    place: int
    others: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """`id` names the request; of an operation it is the number under which it is recorded.

    An operation that is to be carried out `aside` has a thread of its own: it may be held in the kernel, and the agent
    goes on answering meanwhile. One with a `start` is a move, a mirror or a loop of moves, and made by native threads.
    """

    id: int
    do: Operation | Question
    aside: bool = False
    start: Start | None = None


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The agent's first message: it is in its cgroup and its network namespace, or could not get there. `network` is
    the inode number of the namespace that it was to enter and finds itself in, 0 if there was none."""

    pid: int
    errno: int = 0
    network: int = 0


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """Thread `tid` of the agent is about to make its first system call. Sent of operations that are made aside."""

    id: int
    tid: int


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """`each` vCPU's ticks since the guest's start, and the least of them; `where` is "exit" (they said so) or
    "registers"; `ended` why one runs no more. `first_ticks` and `last_ticks` are when each vCPU said its first and its
    last of this stay in the guest (CLOCK_MONOTONIC ns, 0: none yet), or of the one before if it is out; `sound` how
    many it said in this stay before its memory was stale."""

    ticks: int
    each: tuple[int, ...]
    stale: int
    where: str
    ended: str = ""
    first_ticks: tuple[int, ...] = ()
    last_ticks: tuple[int, ...] = ()
    sound: tuple[int, ...] = ()


class FilledContexts(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    errno: int
    call: str


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """`errno` and `firmware` as `chaos.history.records.Done` has them, `call` the system call that failed. `bug` is an
    error of ours, as text."""

    id: int
    errno: int = 0
    firmware: int = 0
    call: str = ""
    bug: str = ""
    began: int = 0
    ended: int = 0
    value: dict[str, Value] = {}
    sampled: Sampled | None = None
    answers: tuple[Answer, ...] = ()
    filled: FilledContexts | None = None


FromAgent = Hello | Begun | Reply

# Made here, in the warm process: making one costs a new process more than all that it then decodes.
REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
FROM_AGENT: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)


class Spawn(msgspec.Struct, frozen=True, kw_only=True, tag="spawn"):
    """Brings the agent's end of a socket, its cgroup's open cgroup.procs, and if it is to have a `network`, the
    namespace of that."""

    name: str
    network: bool = False


class Reap(msgspec.Struct, frozen=True, kw_only=True, tag="reap"):
    """Of a process whose pidfd is readable."""

    pid: int


ToServer = Spawn | Reap


class Spawned(msgspec.Struct, frozen=True, kw_only=True, tag="spawned"):
    """Brings the agent's pidfd, unless there is an errno."""

    pid: int
    errno: int = 0


class Reaped(msgspec.Struct, frozen=True, kw_only=True, tag="reaped"):
    """`status` is the exit code, or minus the signal."""

    pid: int
    status: int


FromServer = Spawned | Reaped

TO_SERVER: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
FROM_SERVER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, tag="descriptor"):
    """Between agents, over a Unix socket: brings the source VM's descriptor."""


DESCRIPTORS: msgspec.msgpack.Decoder[Descriptor] = msgspec.msgpack.Decoder(Descriptor)

# -- between the two VMMs of a migration, over the network --------------------------------------------------

VERSION = 1

VcpuStates = tuple[dict[str, bytes], ...]
"""Of each vCPU in order; each part is one structure of KVM by name."""


class Greeting(msgspec.Struct, frozen=True, kw_only=True, tag="greeting"):
    """The first message, either way: which version of all this I speak, which VM I am, and which I want to talk to."""

    version: int
    vm: str
    peer: str


class SentState(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """From the source: its vCPUs."""

    vcpus: VcpuStates


class Received(msgspec.Struct, frozen=True, kw_only=True, tag="received"):
    """From the destination: the state is here and whole."""


class Taken(msgspec.Struct, frozen=True, kw_only=True, tag="taken"):
    """From the destination: the guest is mine and runs."""


class LetGo(msgspec.Struct, frozen=True, kw_only=True, tag="let-go"):
    """From the source: I know."""


Said = Greeting | SentState | Received | Taken | LetGo
SAID: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)
