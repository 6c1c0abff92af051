# SPDX-License-Identifier: Apache-2.0
"""The record of a run: append-only, a JSON object a line, flushed as it happens.

An operation is recorded as Invoke when it is handed to its agent and as Done when the answer is there. `outcome` is
Jepsen's: `ok` it happened, `fail` it did not, `info` nobody can say (its process died under it). The times of Invoke
and of every other record are the runner's; `began` and `ended` of Done were taken by the agent around the system
call. All are CLOCK_MONOTONIC of the host in nanoseconds, so they compare with each other and with nothing else.

Operations, by `f`, with their arguments and, after the arrow, what `value` holds when they are ok:

    spawn {cgroup}                      a VMM process, in its cgroup before it does anything, and in the network
                                        namespace of this inode number, if it takes part in a migration → {pid, network}
    create {vm, kind, vcpus, memory, type, lane, lanes, device} → {address}
                                        KVM_CREATE_VM of this type (0, 2 or 3), memory slots; vCPUs (of one that is not
                                        plain they come with `init` or `mirror`), which count from page `lane` on; with
                                        `lanes` also the program for so many, where nobody else will encrypt one; the
                                        memory lies at `address` of the process
    create_vcpu {vm, id, bare}          one vCPU more; a bare one is created and nothing more: the guest never has it
    init {vm, key, command, flags, features, ghcb}
                                        `command` is init, es-init or init2 (if it is not there, what the VM's type and
                                        `key` ask for): takes an ASID, charges the agent's cgroup; the others are
                                        arguments of INIT2, 0 if they are not there
    command {vm, id}                    KVM_MEMORY_ENCRYPT_OP of that number, without data
    register_region {vm, address}, unregister_region {vm, address}
                                        KVM_MEMORY_ENCRYPT_REG_REGION of the guest's memory, and UNREG_REGION of memory
                                        that was registered by this address
    launch_start {vm, policy, read_only} → {handle}
    launch_update_data {vm, lanes, address}, launch_update_vmsa {vm}, launch_measure {vm} → {measure},
    launch_finish {vm}
    guest_status {vm}                   → {handle, policy, state}
    dbg_decrypt {vm, read_at, write_at, length}, dbg_encrypt {vm, read_at, write_at, length}
                                        of so many bytes, from an offset in a buffer of the guest's, or of the VMM's, to
                                        one in a buffer of the other's → {outside, read_pages, written_pages}: how
                                        many bytes of the buffer that is written to have changed and are none of those,
                                        and where the pages of either lie in the machine's memory, as far as the VMM can
                                        tell. Also when it is refused
    run {vm, every}                     vCPUs into the guest
    pause {vm}                          and out of it → {last_ticks, astray, torn, ended, registers}: when each last
                                        ticked, 0 for never; those that have left the guest's program, which none does
                                        by itself; those whose memory is not what their registers say, as far as it can
                                        be read; why one had stopped before, "" if none had; the registers of all
                                        these, as text
    storm {vm, threads, calls}          so many threads make these ioctls on the VM's descriptors until
    calm {vm}                           they are told to stop; what they were answered is a record, Stormed
    get_state {vm, within_ms}           the state of every vCPU, read at the source and sent → {vcpus, bytes}
    receive_state {vm, within_ms}       and received at the destination → {vcpus, bytes}
    set_state {vm}                      and given at the destination, which reads it again → {vcpus, differs}: what is
                                        not as it was given, as "vcpu 1: msr 0x174"
    listen {vm, peer, address}          the destination of a migration is ready for the VM `peer` → {port}
    connect {vm, peer, address, port, within_ms}
                                        the source connects, over TCP; without an address there is a Unix socket only,
                                        for a descriptor
    accept {vm, peer, within_ms}        the destination lets it
    send_fd {vm, to}                    the VM's file descriptor leaves its process for the agent `to`
    receive_fd {vm, source}             the descriptor is taken out of the socket, and kept until it is used
    move {vm, source, fd, flags, of}    `vm` is the destination, which makes the call; instead of a source there may be
                                        the sort of a descriptor, `fd`, that is no VM's; `flags` are KVM_ENABLE_CAP's,
                                        `of` is the loop of moves that it was part of
    moves {vm, sources, rounds, threads}
                                        moves into `vm` in a tight loop, by several threads from each source in turn
                                        → how many from each source were answered what: {"old EBUSY": 9000, "old ok": 1}
    mirror {vm, source, fd, flags}      `vm` makes the call and becomes a mirror of `source`; then its vCPUs are made
    commit {vm, within_ms}              the destination tells the source that it has the guest
    confirm {vm, within_ms}             the source hears it and answers, the destination hears that; then both
                                        disconnect
    disconnect {vm}                     the other end of a migration is let go of, and what it has sent
    close {vm}                          every file descriptor of the VM in this process
    lose_fd {vm, fd}                    one is closed behind the VMM's back: "vm", "vcpu 0", or the process's /dev/sev,
                                        "sev"; whoever uses it then is answered EBADF
    set_memory {vm, there, slot}        a memory slot of the VM's is put there, or taken away: its first, or if there is
                                        `slot` another behind it, of the same memory
    irqfd {vm, gsi, assign}             the eventfd of this GSI raises it in the VM from now on, or no more; that makes
                                        the vector of the same number at the VM's first vCPU
    ioeventfd {vm, port, assign}        the eventfd of this port is signalled when the guest writes there, or no more
    interrupts {vm}                     → {vectors}: those that the first vCPU was sent, of which the guest takes none
    memlock {bytes}                     the process loses CAP_IPC_LOCK and gets an RLIMIT_MEMLOCK, or with "max" both
                                        are as before; it makes no call itself
    enter {cgroup}                      the process goes into another cgroup; it makes no call itself
    platform {command, length, chain}   SEV_ISSUE_CMD of /dev/sev, with a buffer that the caller says is `length` long,
                                        for PDH_CERT_EXPORT with a second of `chain`; it is longer, and full of a
                                        pattern → {length, chain, behind}: the lengths that were told back, and how many
                                        bytes behind those that the caller told do not hold the pattern any more, None
                                        where nobody could look. Also when it is refused
    exit {}                             the VMM ends in good order

and those on cgroups, which no VMM makes; their agent is "":

    limit {cgroup, key, max}            misc.max is set to a number, or to "max"
    remove_cgroup {cgroup}              what is charged to it stays charged, to its ancestors as well
    add_cgroup {cgroup}                 one that was removed is made again
    disable_misc {cgroup}               the cgroups directly below lose the misc controller: to it they are this one
    enable_misc {cgroup}                and get it again, with nothing charged

and on the host, likewise:

    signal {gsi}                        the eventfd of this GSI is written once; each is there once, for all VMs
    storage {state}                     the file that the host keeps the firmware's state in (init_ex_path of ccp) is
                                        "missing" with its folder, "full", "read-only", "torn", or "well" again
    reload                              kvm_amd and ccp were unloaded and loaded again; `args` are parameters of ccp

When an operation fails, `value` holds in `call` the system call that was refused.

`seq` numbers the records of a run from 0 without holes; verdicts point at records by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

FORMAT = 2

Int = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # what a reader in any language can hold

Scalar = int | str | bool | None
Value = Scalar | list[int | str]  # one list type: msgspec cannot tell two apart


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    seq: Int = -1  # given by whoever writes the record down
    t: Int


class Header(_Record, frozen=True, kw_only=True):
    """The first record. `kernel` is the full x.y.z, `release` what uname says; `host` is local or lab. `log_ahead` is
    how many nanoseconds CLOCK_MONOTONIC is ahead of the clock of the kernel's log, None if nobody could say. `patience`
    is after how many seconds the kernel reports a "hung task", "soft lockup", "hard lockup" or "RCU stall", 0 for
    never; it is empty if that was not read. `earlier` is how many runs the same runner had carried out before."""

    format: Int = FORMAT
    experiment: str
    seed: Int
    host: str
    kernel: str
    release: str
    executes_es: bool  # whether SEV-ES guests can be entered on this host; not in the lab
    asids: dict[str, Int]  # capacity by key of the misc controller
    shared: bool = False  # whether SEV guests of others may come and go on the host meanwhile
    log_ahead: Int | None = None
    patience: dict[str, Int] = {}
    earlier: Int = 0


QUESTION = "question"


class Invoke(_Record, frozen=True, kw_only=True):
    """`op` names the operation within the run, `f` what it is, `agent` the VMM that does it, `step` the place in
    the script, `phase` the phase of a migration it belongs to, if any, or `question` if no step asked for it."""

    op: Int
    f: str
    agent: str
    pid: Int
    step: Int
    phase: str = ""
    args: dict[str, Value] = {}


class Done(_Record, frozen=True, kw_only=True):
    """`errno` and `firmware` (the PSP's status) are 0 unless the outcome is fail. `tid` is the thread that made the
    system calls, 0 if it was the process's first, or is not known."""

    op: Int
    outcome: Literal["ok", "fail", "info"]
    errno: Int = 0
    firmware: Int = 0
    began: Int = 0
    ended: Int = 0
    tid: Int = 0
    value: dict[str, Value] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One question of Asked: an ioctl, its errno (0 for success), and what a live VM beside it answered. `firmware` is
    the firmware's status, if it was what refused: EIO is then no sign of a dead VM."""

    fd: str  # "vm", "vcpu N" or "device"
    ioctl: str
    errno: Int
    control: Int
    firmware: Int = 0


class Asked(_Record, frozen=True, kw_only=True):
    """The file descriptors of `vm` were asked, in the process `agent` that owns them, whether they live. `device` is 0
    if the VM has one, else how KVM_CREATE_DEVICE failed when the VM was created, None if nobody tried."""

    agent: str
    vm: str
    step: Int
    answers: tuple[Answer, ...]
    device: Int | None = None


class Observation(_Record, frozen=True, kw_only=True):
    """What the host showed, all read between `t` and `until`.

    `misc` maps cgroup → file → key → value, for cgroups below the run's own, named relative to it ("." is the run's
    cgroup itself); `max` is left out where it reads "max". `guests` is the firmware's guest count, None if it could
    not be asked. `dying` counts removed cgroups below the run's that something still refers to.

    The rest is of the whole host, whoever it belongs to; it is read before and after the script, and else None.
    `pinned` is how many pages are pinned. `vms` maps each VM's folder in KVM's debugfs, PID-FD of who made it, to its
    number of vCPUs; `objects` a slab cache of KVM's to the objects in it; `references` a module to the references to
    it; `tables` is how many pages KVM has made page tables of. `dying_misc` is of the run's cgroup again: how many
    groups of the misc controller are gone below it that something still refers to. `eventfds` is how many eventfds
    there are among the lowest numbers that the kernel gives them. `leaked` is, after it, what kmemleak takes for
    lost since before it: of each object the functions that it was allocated by, the innermost first; None where there
    is no kmemleak. `unseen` maps those of the last seven that this host does not show to the reason.
    """

    label: str
    step: Int
    until: Int
    misc: dict[str, dict[str, dict[str, int]]]
    guests: Int | None
    dying: Int
    pinned: Int | None = None
    vms: dict[str, Int] | None = None
    objects: dict[str, Int] | None = None
    references: dict[str, Int] | None = None
    tables: Int | None = None
    dying_misc: Int | None = None
    eventfds: Int | None = None
    leaked: tuple[str, ...] | None = None
    unseen: dict[str, str] = {}


class Counted(_Record, frozen=True, kw_only=True):
    """The guest's own counter, read at `where`. `stale` counts ticks at which its memory did not hold what its
    registers said. `ended` is why it stopped by itself, "" if it did not: how KVM_RUN failed, or its exit reason.
    Of several vCPUs each has a counter (`each`), and `ticks` is the least.

    `first_ticks` and `last_ticks` are when each vCPU told its counter first and last in this stay in the guest, read
    right after it came out with it; 0 if it has not. From the last tick at the source to the first at the destination
    the guest stood still. `sound` is how many ticks each told in this stay before its memory was stale. A guest that
    was `paused` was out, and stays there: the counter is that of its registers."""

    vm: str
    agent: str
    step: Int
    where: str
    ticks: Int
    stale: Int = 0
    ended: str = ""
    each: tuple[Int, ...] = ()
    first_ticks: tuple[Int, ...] = ()
    last_ticks: tuple[Int, ...] = ()
    sound: tuple[Int, ...] = ()
    paused: bool = False


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One ioctl of a storm, by its name: it lies between `began` and `ended`. `errno` is 0 for success."""

    ioctl: str
    began: Int
    ended: Int
    errno: Int


class StormThread(msgspec.Struct, frozen=True, kw_only=True):
    """What one thread of a storm was answered, in one call after the other, from `began` to `ended` (0: it was killed).

    `errnos` has how many calls failed with each errno by name ("ok" for success), `calls` their sum. `answered` is the
    last call that was answered anything but EIO, `refused` the first that was answered EIO. `lost` says that not all
    calls are on record any more, and that one of these two may be among the others. Times of calls were off by at most
    `clock_error` ns.
    """

    began: Int
    ended: Int
    calls: Int
    errnos: dict[str, Int]
    answered: Call | None
    refused: Call | None
    lost: bool
    clock_error: Int


class Stormed(_Record, frozen=True, kw_only=True):
    """A storm of ioctls on the descriptors of `vm` is over: it was calmed, or the VMM `agent` ended. `calls` are those
    that every thread made in turns."""

    agent: str
    vm: str
    step: Int
    calls: tuple[str, ...]
    threads: tuple[StormThread, ...]


class Filled(_Record, frozen=True, kw_only=True):
    """How many encryption contexts of each key could be had at once, before the next was refused with `errno`.

    `dying` and `dying_misc` are as with Observation, a moment after this. At the end of the run there is no cgroup
    below its own any more: what is counted there nobody lets go of. None if nobody looked, or the kernel does not say.
    """

    label: str
    count: dict[str, Int]
    errno: dict[str, Int]
    dying: Int | None = None
    dying_misc: Int | None = None


class Held(_Record, frozen=True, kw_only=True):
    """A hold: where the operation sleeps, seen from outside. `reached` is false if its deadline passed first; the rest
    then says where it was instead.

    `place` says what stops it, "" if that was not written down. vcpu: a vCPU inside KVM_RUN, on `side` of the move, ""
    if that cannot be told. lock: another operation keeps the VM's lock. kernel: the entry of `function`. page: a page
    of its arguments that is not there. firmware: `command` is not answered.
    """

    op: Int
    step: Int
    hold: str
    reached: bool
    state: str  # the task's state letter
    sleeping: str  # the kernel function it sleeps in, "" if the host does not tell
    place: Literal["", "vcpu", "lock", "kernel", "page", "firmware"] = ""
    side: Literal["", "source", "destination"] = ""
    function: str = ""
    command: str = ""
    call: str = ""  # the system call it is in, "" if it is in none or the host does not tell
    stack: tuple[str, ...] = ()  # the functions on its way there, innermost first


class Overdue(_Record, frozen=True, kw_only=True):
    """The script has waited for the operation as long as it was to wait, and this is where its thread was then. `free`
    if nothing of the experiment's stopped it: no hold was armed, no fault applied, no vCPU in its guest for good."""

    op: Int
    step: Int
    free: bool
    state: str  # as with Held, as is the rest; "" if the thread was gone
    sleeping: str = ""
    call: str = ""
    stack: tuple[str, ...] = ()


class Released(_Record, frozen=True, kw_only=True):
    """What is stopped at the hold that was armed by this name may go on from now."""

    step: Int
    hold: str


class Fault(_Record, frozen=True, kw_only=True):
    """A fault's life. `target` is what it strikes, "" for the host. One that is `withheld` was to be applied and was
    not, to see that it leaves no evidence then. For `evidence`, `struck` says whether it did what it was meant to; that
    may be known at the end only. For `apply`, `ends` names the VMMs whose end it may be. It `lets_go` if what it does
    may let something go that is held in the kernel. A `fatal` one sends a fatal signal whatever it finds; older runs
    have None."""

    fault: str
    event: Literal["apply", "withheld", "evidence", "undo"]
    step: Int
    target: str
    struck: bool | None = None
    detail: str = ""
    ends: tuple[str, ...] = ()
    lets_go: bool = True
    fatal: bool | None = None


class Handover(_Record, frozen=True, kw_only=True):
    """Attempt number `attempt` (from 1) of a migration is over: the guest of VM `source` was to go to `destination`.

    committed: it is at the destination. aborted: a phase up to the move failed, and it is at the source. refused: the
    kernel refused the move, and it is at the source. lost: nothing runs it any more.
    `phase` is the one in which it ended, `guest` the VM that has the guest, "" for none, `why` what failed, "" if
    nothing did. `stood` is how long each vCPU stood still, from its last tick at the source to its first at `guest`, in
    ns; empty where that was not seen. `source_says` and `destination_says` are who has the guest by the word of each
    side's VMM, asked afterwards: mine, theirs, or "" if it is dead or cannot tell."""

    step: Int
    source: str
    destination: str
    attempt: Int
    outcome: Literal["committed", "aborted", "refused", "lost"]
    phase: str
    guest: str
    why: str = ""
    stood: tuple[Int, ...] = ()
    source_says: Literal["", "mine", "theirs"] = ""
    destination_says: Literal["", "mine", "theirs"] = ""


class Exited(_Record, frozen=True, kw_only=True):
    """A VMM process is gone and reaped. `status` is its exit code, or minus the signal that ended it. Of the VMs that
    were in the guest then, `last_ticks` has by VM when each vCPU last ticked, 0 for never."""

    agent: str
    pid: Int
    status: Int
    last_ticks: dict[str, tuple[Int, ...]] = {}


class Firmware(_Record, frozen=True, kw_only=True):
    """A command that the PSP was sent, by the word of whoever stands between it and the driver.

    `order` is that witness's own count of commands from 0, without holes, so that a lost record shows. `status` is the
    firmware's, -1 if it never answered. `move` is the operation number of the move that was under way when the command
    came, None if none was; `began` is CLOCK_MONOTONIC of the host, 0 if the witness has another clock. `handle` names
    the guest that the command is about, None if it is about none. `fault` says what was done to the command on purpose,
    in the words of docs/firmware.md ("fail:RESOURCE_LIMIT", "stall"), "" for nothing. `asked` are the addresses in the
    machine's memory, of up to 64 bits, and the lengths that the command was given: of PEK_CSR and GET_ID `address` and
    `length`, of PDH_CERT_EXPORT and PEK_CERT_IMPORT `first_` and `second_` of both, of DBG_DECRYPT and DBG_ENCRYPT
    `source`, `destination` and `length`; empty of any other, or if nobody looked.
    """

    order: Int
    command: str  # "LAUNCH_START", as in the SEV API
    status: Int
    handle: Int | None = None
    move: Int | None = None
    began: Int = 0
    fault: str = ""
    asked: dict[str, int] = {}


class StoodStill(_Record, frozen=True, kw_only=True):
    """The machine under a lab stood still from `t` to `until`, by the word of somebody on it: neither he nor the lab's
    CPUs ran. Its kernel may take that for a lockup."""

    until: Int


class Traced(_Record, frozen=True, kw_only=True):
    """The thread `tid` entered a function of the kernel, or left it, by the word of the kernel's own tracer.

    `t` is to the microsecond. `function` is without what a compiler appended. `values` holds on leaving what it
    `returned`, and of a charge on entering its `key`, its `amount`, and the `cgroup` that was named: one of the run's,
    as in Observation; of others nothing is said.
    """

    event: Literal["enter", "leave"]
    function: str
    tid: Int
    values: dict[str, Value] = {}


class Entered(_Record, frozen=True, kw_only=True):
    """A CPU has entered one vCPU `count` times with this ASID from `since` to `t`, by the word of the kernel's own
    tracer. In between the CPU was not taken away.

    `vcpu` numbers the vCPUs that were entered; `tids` are the threads that have driven it. An ASID that is not a
    guest's for good belongs to a generation of the CPU's: `generations` is how many there were, 0 of a guest's own
    ASID, and `shared` are those of them, at most 16, in which the CPU has entered another vCPU with this ASID too.
    """

    cpu: Int
    since: Int
    vcpu: Int
    tids: tuple[Int, ...]
    asid: Int
    generations: Int
    shared: tuple[Int, ...]
    count: Int


class Kernel(_Record, frozen=True, kw_only=True):
    """A line of the kernel's log, `level` 0 to 7, at the kernel's own time (see `log_ahead` of the header)."""

    level: Int
    text: str


class Console(_Record, frozen=True, kw_only=True):
    """A line of the serial console that the kernel's log, as it was read, does not have: above all a kernel's last
    words. `t` is the kernel's own time if the line has one, else that of the record that was the last when it came."""

    text: str


class Note(_Record, frozen=True, kw_only=True):
    """Something a reader should know: a witness lost, a step that could not be done, something of ours that is left on
    the host. `text` is for people; which `witness` was lost, or a part of it, is said beside it: the kernel's log, the
    firmware's count of guests, whoever stands between it and the driver, the kernel's tracer, or its count of entries
    into guests."""

    topic: Literal["witness", "skipped", "error", "left", "progress"]
    text: str
    step: Int = -1
    witness: Literal["", "log", "guests", "firmware", "events", "entries"] = ""


class End(_Record, frozen=True, kw_only=True):
    """The last record of a run that was not cut off. `complete` if the whole script was carried out."""

    complete: bool
    reason: str = ""


Record = (
    Header
    | Invoke
    | Done
    | Asked
    | Observation
    | Counted
    | Stormed
    | Filled
    | Held
    | Released
    | Overdue
    | Fault
    | Handover
    | Exited
    | Firmware
    | StoodStill
    | Traced
    | Entered
    | Kernel
    | Console
    | Note
    | End
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    return _encoder.encode(record) + b"\n"


def decode(line: bytes) -> Record:
    """Raises msgspec.DecodeError if the line is no record."""
    try:
        return _decoder.decode(line)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec has no error of its own for these
        raise msgspec.DecodeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class History:
    """A history as read, up to where it is damaged. `damage` says what is wrong there, "" if it is whole."""

    records: tuple[Record, ...]
    damage: str = ""

    @property
    def header(self) -> Header | None:
        first = self.records[0] if self.records else None
        return first if isinstance(first, Header) else None

    @property
    def end(self) -> End | None:
        last = self.records[-1] if self.records else None
        return last if isinstance(last, End) else None

    def done(self, op: int) -> Done | None:
        return next((r for r in self.records if isinstance(r, Done) and r.op == op), None)

    def operations(self) -> Iterator[tuple[Invoke, Done | None]]:
        """Each operation with its answer, in the order of invocation."""
        answers = {record.op: record for record in self.records if isinstance(record, Done)}
        for record in self.records:
            if isinstance(record, Invoke):
                yield record, answers.get(record.op)
