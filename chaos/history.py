# SPDX-License-Identifier: Apache-2.0
"""The record of a run: append-only, a JSON object a line, flushed as it happens.

An operation is recorded as Invoke when it is handed to its agent and as Done when the answer is there. `outcome` is
Jepsen's: `ok` it happened, `fail` it did not, `info` nobody can say (its process died under it). The times of Invoke
and of every other record are the runner's; `began` and `ended` of Done were taken by the agent around the system
call. All are CLOCK_MONOTONIC of the host in nanoseconds, so they compare with each other and with nothing else.

Operations, by `f`, with their arguments and, after the arrow, what `value` holds when they are ok:

    spawn {cgroup}                      a VMM process, in its cgroup before it does anything → {pid}
    create {vm, kind, vcpus, memory, type}
                                        KVM_CREATE_VM of this type (0, 2 or 3), memory slots; vCPUs (of one that is not
                                        plain they come with `init` or `mirror`)
    init {vm, key}                      KVM_SEV_INIT, ES_INIT or INIT2: takes an ASID, charges the agent's cgroup
    launch_start {vm, policy}           → {handle}
    launch_update_data {vm}, launch_update_vmsa {vm}, launch_measure {vm} → {measure}, launch_finish {vm}
    guest_status {vm}                   → {handle, policy, state}
    run {vm, every}, pause {vm}         vCPUs in and out of the guest
    get_state {vm}, set_state {vm}      vCPU state, at the source and the destination
    connect {vm, peer}                  a socket to the other end of a migration, the VM `peer`
    send_fd {vm, to}                    the VM's file descriptor leaves its process for the agent `to`
    move {vm, source}                   `vm` is the destination, which makes the call
    mirror {vm, source}                 `vm` makes the call and becomes a mirror of `source`; then its vCPUs are made
    commit {vm}                         the destination confirms to the source, and the socket is closed
    close {vm}                          every file descriptor of the VM in this process
    enter {cgroup}                      the process goes into another cgroup; it makes no call itself
    exit {}                             the VMM ends in good order

When an operation fails, `value` holds in `call` the system call that was refused.

`seq` numbers the records of a run from 0 without holes; verdicts point at records by it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

FORMAT = 1

Scalar = int | str | bool | None
Value = Scalar | list[int | str]  # one list type: msgspec cannot tell two apart


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    seq: int = -1  # given by whoever writes the record down
    t: int


class Header(_Record, frozen=True, kw_only=True):
    """The first record. `kernel` is the full x.y.z, `release` what uname says; `host` is local or lab."""

    format: int = FORMAT
    experiment: str
    seed: int
    host: str
    kernel: str
    release: str
    executes_es: bool  # whether SEV-ES guests can be entered on this host; not in the lab
    asids: dict[str, int]  # capacity by key of the misc controller


class Invoke(_Record, frozen=True, kw_only=True):
    """`op` names the operation within the run, `f` what it is, `agent` the VMM that does it, `step` the place in
    the script, `phase` the phase of a migration it belongs to, if any."""

    op: int
    f: str
    agent: str
    pid: int
    step: int
    phase: str = ""
    args: dict[str, Value] = {}


class Done(_Record, frozen=True, kw_only=True):
    """`errno` and `firmware` (the PSP's status) are 0 unless the outcome is fail."""

    op: int
    outcome: Literal["ok", "fail", "info"]
    errno: int = 0
    firmware: int = 0
    began: int = 0
    ended: int = 0
    value: dict[str, Value] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One question of Asked: an ioctl, its errno (0 for success), and what a live VM beside it answered."""

    fd: str  # "vm" or "vcpu N"
    ioctl: str
    errno: int
    control: int


class Asked(_Record, frozen=True, kw_only=True):
    """The file descriptors of `vm` were asked, in the process `agent` that owns them, whether they live."""

    agent: str
    vm: str
    step: int
    answers: tuple[Answer, ...]


class Observation(_Record, frozen=True, kw_only=True):
    """What the host showed, all read between `t` and `until`.

    `misc` maps cgroup → file → key → value, for cgroups below the run's own, named relative to it ("." is the run's
    cgroup itself); `max` is left out where it reads "max". `guests` is the firmware's guest count, None if it could
    not be asked. `dying` counts removed cgroups below the run's that something still refers to.
    """

    label: str
    step: int
    until: int
    misc: dict[str, dict[str, dict[str, int]]]
    guests: int | None
    dying: int


class Counted(_Record, frozen=True, kw_only=True):
    """The guest's own counter, read at `where`. `stale` counts ticks at which its memory did not hold what its
    registers said. `ended` is why it stopped by itself, "" if it did not: how KVM_RUN failed, or its exit reason."""

    vm: str
    agent: str
    step: int
    where: str
    ticks: int
    stale: int = 0
    ended: str = ""


class Filled(_Record, frozen=True, kw_only=True):
    """How many encryption contexts of each key could be had at once, before the next was refused with `errno`."""

    label: str
    count: dict[str, int]
    errno: dict[str, int]


class Held(_Record, frozen=True, kw_only=True):
    """A hold: where the operation sleeps, seen from outside. `reached` is false if its deadline passed first."""

    op: int
    step: int
    hold: str
    reached: bool
    state: str  # the task's state letter
    sleeping: str  # the kernel function it sleeps in, "" if the host does not tell


class Fault(_Record, frozen=True, kw_only=True):
    """A fault's life. For `evidence`, `struck` says whether it did what it was meant to."""

    fault: str
    event: Literal["apply", "evidence", "undo"]
    step: int
    target: str
    struck: bool | None = None
    detail: str = ""


class Exited(_Record, frozen=True, kw_only=True):
    """A VMM process is gone and reaped. `status` is its exit code, or minus the signal that ended it."""

    agent: str
    pid: int
    status: int


class Firmware(_Record, frozen=True, kw_only=True):
    """A command that the PSP was sent, by the word of whoever stands between it and the driver.

    `order` is that witness's own count of commands from 0, without holes, so that a lost record shows. `status` is the
    firmware's. `move` is the operation number of the move that was under way when the command came, None if none was;
    `began` is CLOCK_MONOTONIC of the host, 0 if the witness has another clock. `handle` names the guest that the
    command is about, None if it is about none.
    """

    order: int
    command: str  # "LAUNCH_START", as in the SEV API
    status: int
    handle: int | None = None
    move: int | None = None
    began: int = 0


class Kernel(_Record, frozen=True, kw_only=True):
    """A line of the kernel's log, `level` 0 to 7, at the kernel's own time."""

    level: int
    text: str


class Note(_Record, frozen=True, kw_only=True):
    """Something a reader should know: a witness lost, a step that could not be done."""

    topic: Literal["witness", "skipped", "error", "progress"]
    text: str
    step: int = -1


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
    | Filled
    | Held
    | Fault
    | Exited
    | Firmware
    | Kernel
    | Note
    | End
)

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    return _encoder.encode(record) + b"\n"


def decode(line: bytes) -> Record:
    """Raises msgspec.DecodeError if the line is no record."""
    return _decoder.decode(line)


@dataclass(frozen=True, slots=True)
class History:
    """A history as read. `damage` says what is wrong with it, "" if it is whole."""

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


def damage_of(records: Sequence[Record]) -> str:
    if not records:
        return "it is empty"
    if not isinstance(records[0], Header):
        return "it does not begin with a header"
    if records[0].format != FORMAT:
        return f"it has format {records[0].format}, this program reads {FORMAT}"
    for expected, record in enumerate(records):
        if record.seq != expected:
            return f"record {expected} is missing: {record.seq} stands in its place"
    if not isinstance(records[-1], End):
        return f"it breaks off after record {len(records) - 1}"
    return ""


def read(path: Path) -> History:
    """Read up to the first damage, and say what it is. Raises OSError if there is no such file."""
    records: list[Record] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(decode(line))
            except msgspec.DecodeError as error:
                return History(tuple(records), f"line {number} is damaged: {error}")
    return History(tuple(records), damage_of(records))


class Writer:
    """Writes a history down. One writer a file; each record is with the kernel before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._seq = 0
        self.records: list[Record] = []

    def write(self, record: Record) -> Record:
        """Number the record and append it; returns it as written."""
        numbered = msgspec.structs.replace(record, seq=self._seq)
        self._seq += 1
        os.write(self._fd, encode(numbered))
        self.records.append(numbered)
        return numbered

    def close(self) -> None:
        os.close(self._fd)

    def history(self) -> History:
        return History(tuple(self.records), damage_of(self.records))
