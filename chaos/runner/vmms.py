# SPDX-License-Identifier: Apache-2.0
"""The VMMs of a run, and the operations that they make.

One thread, one poll loop. An operation is recorded as Invoke before its agent hears of it and as Done when the answer
arrives, whoever is being waited for then. When a VMM ends, whatever it had still sent is read first; what remains
without an answer is `info`, and then the process is reaped and recorded as Exited.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from chaos.cgroup.group import Cgroup
from chaos.history.records import Done, Exited, Value
from chaos.linux.fd import OwnedFd
from chaos.linux.loop import Loop, TimedOut
from chaos.linux.seqpacket import Channel, Ended
from chaos.native import VcpuThread, read_vcpu
from chaos.netns.space import Namespace
from chaos.runner.operations import OperationLog
from chaos.vmm.messages import (
    FROM_AGENT,
    Begun,
    Exit,
    FromAgent,
    Hello,
    MayLock,
    Move,
    Operation,
    Question,
    Reply,
    Request,
    Start,
    name_of,
)
from chaos.vmm.server import ForkServer

# An operation that nothing holds up takes milliseconds, in the lab tens of them; this is for a machine in trouble.
ANSWER_WITHIN = 60.0
END_WITHIN = 30.0


class StepFailed(Exception):
    """The script cannot go on. Says why, in a line. `step` is the place in the script, -1 outside of it."""

    def __init__(self, message: str, *, step: int = -1) -> None:
        super().__init__(message)
        self.step = step


@dataclass(slots=True)
class PendingOperation:
    """An operation without an answer. Thread `tid` of the process `pid`, the VMM `agent`, makes its system call; `tid`
    is 0 before that, and of an operation that is not made `aside`: that is the process's first thread's. `args` are the
    operation's, as recorded. `then` is called when it is over."""

    op: int
    f: str
    recorded: bool
    agent: str
    pid: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)
    aside: bool = False
    began: int = 0
    tid: int = 0
    reply: Reply | None = None
    done: Done | None = None
    then: Callable[[], None] | None = None

    @property
    def over(self) -> bool:
        return self.done is not None


@dataclass(slots=True, eq=False)
class VmmProcess:
    """A VMM process as the runner holds it; what a fault is given as its victim.

    `boards` are the memory files of vCPUs that are in the guest, by VM. `at_end` is called when it has ended, by VM.
    """

    name: str
    vmms: VmmProcesses
    log: OperationLog
    pid: int
    handle: OwnedFd
    channel: Channel[FromAgent]
    recorded: bool = True
    status: int | None = None
    pending: dict[int, PendingOperation] = field(default_factory=dict)
    boards: dict[str, tuple[OwnedFd, ...]] = field(default_factory=dict)
    at_end: dict[str, Callable[[], None]] = field(default_factory=dict)
    _memlock: int | None = None

    def watch(self, vm: str, vcpus: int) -> tuple[int, ...]:
        """Memory files for a stay of this VM's vCPUs in the guest; what they say last is read if the process ends."""
        self.unwatch(vm)
        self.boards[vm] = tuple(VcpuThread.memory() for _ in range(vcpus))
        return tuple(board.number for board in self.boards[vm])

    def unwatch(self, vm: str) -> None:
        for board in self.boards.pop(vm, ()):
            board.close()

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def pidfd(self) -> int:
        return self.handle.number

    @property
    def busy(self) -> tuple[int, ...]:
        operations = (pending for pending in tuple(self.pending.values()) if pending.recorded)
        return tuple(filter(None, (each.tid if each.aside else self.pid for each in operations)))

    def wait_end(self, within: float) -> bool:
        """Whether it ended within so many seconds; it is reaped then."""
        with contextlib.suppress(TimedOut):
            self.vmms.loop.wait(lambda: not self.alive, within, f"VMM {self.name} to end")
        return not self.alive

    def ask(self, question: Question) -> Mapping[str, Value] | None:
        """What it answers, None if it ends first. Raises `StepFailed` if it lives and does not answer."""
        if not self.alive:
            return None
        try:
            return self.vmms.ask(self, question).value
        except StepFailed:
            if self.alive:
                raise
            return None

    def limit_memlock(self, size: int | None) -> None:
        """Take CAP_IPC_LOCK from it, and set RLIMIT_MEMLOCK to so many bytes; None for both as they were. Raises
        OSError."""
        given = "max" if size is None else size
        self.log.record("memlock", lambda: self._limit_memlock(size), self, bytes=given)

    def _limit_memlock(self, size: int | None) -> None:
        """The soft limit alone: the way back is the process's own."""
        self.ask(MayLock(allowed=size is None))
        soft, hard = resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK)
        if self._memlock is None:
            self._memlock = soft
        resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, (self._memlock if size is None else size, hard))


class VmmProcesses:
    """`named` has the latest of each name, also if it has ended. `moves` are those that there have been, in order."""

    def __init__(self, server: ForkServer, loop: Loop, log: OperationLog) -> None:
        self.loop = loop
        self.named: dict[str, VmmProcess] = {}
        self.moves: list[PendingOperation] = []
        self._all: list[VmmProcess] = []  # also those whose name another one has now
        self._server = server
        self.log = log

    def __getitem__(self, name: str) -> VmmProcess:
        return self.named[name]

    @property
    def living(self) -> tuple[VmmProcess, ...]:
        """The experiment's own that live."""
        return tuple(vmm for vmm in self.named.values() if vmm.recorded and vmm.alive)

    # -- processes ----------------------------------------------------------------------------------------

    def spawn(
        self, name: str, cgroup: Cgroup, *, network: Namespace | None = None, label: str = "", recorded: bool = True
    ) -> VmmProcess:
        """Fork a VMM into `cgroup`, which the history knows as `label`, and into `network`. Raises `StepFailed`."""
        pending = PendingOperation(self.log.number(), "spawn", recorded, name, began=self.log.now())
        if recorded:
            args: dict[str, Value] = {"cgroup": label}
            self.log.invoke(pending.op, "spawn", args, agent=name, pid=0, t=pending.began)
        with OwnedFd(cgroup.open_procs()) as procs:
            pid, pidfd, connection = self._server.spawn(name, procs.number, network.fd if network else None)
        vmm = VmmProcess(name, self, self.log, pid, pidfd, Channel.adopt(connection, FROM_AGENT), recorded=recorded)
        vmm.pending[pending.op] = pending
        self.loop.watch(vmm.channel.fileno(), lambda: self._hear(vmm))
        self.loop.watch(vmm.pidfd, lambda: self._bury(vmm))
        self.named[name] = vmm
        self._all.append(vmm)
        done = self._await_done(pending, ANSWER_WITHIN)
        if done.outcome != "ok":
            why = os.strerror(done.errno) if done.errno else "it died"
            raise StepFailed(f"VMM {name} could not be put into its cgroup and its network: {why}")
        return vmm

    def end(self, vmm: VmmProcess) -> None:
        """End a VMM in good order, or if it will not, by force. Raises `StepFailed` in the second case."""
        if not vmm.alive:
            return
        with contextlib.suppress(StepFailed):
            self._await_done(self.invoke(vmm, Exit()), ANSWER_WITHIN)
            if vmm.wait_end(END_WITHIN):
                return
        signal.pidfd_send_signal(vmm.pidfd, signal.SIGKILL)
        gone = "had to be killed" if vmm.wait_end(END_WITHIN) else "could not even be killed"
        raise StepFailed(f"VMM {vmm.name} did not end by itself and {gone}")

    def close(self) -> None:
        """Kill whoever is left, without waiting for anybody's answer, and let go of all there have been."""
        for vmm in self._all:
            if vmm.alive:
                signal.pidfd_send_signal(vmm.pidfd, signal.SIGKILL)
        for vmm in self._all:
            vmm.wait_end(END_WITHIN)
            vmm.handle.close()
        self._all.clear()

    # -- operations ---------------------------------------------------------------------------------------

    def invoke(
        self, vmm: VmmProcess, operation: Operation, *, fds: Sequence[int] = (), phase: str = "", aside: bool = False,
        start: Start | None = None,
    ) -> PendingOperation:  # fmt: skip
        """Hand an operation to its agent and go on. Raises `StepFailed` if there is no such process any more.

        One that is made `aside` does not keep the agent from answering, should it be held in the kernel. A move always
        is, and so is one that has a `start`.
        """
        self._expect_alive(vmm)
        args: dict[str, Any] = msgspec.to_builtins(operation)
        f = str(args.pop("f"))
        aside = aside or start is not None or isinstance(operation, Move)
        pending = PendingOperation(self.log.number(), f, vmm.recorded, vmm.name, vmm.pid, args, aside)
        if pending.recorded:
            self.log.invoke(pending.op, f, args, agent=vmm.name, pid=vmm.pid, phase=phase)
        if isinstance(operation, Move):
            self.moves.append(pending)
        self._send(vmm, pending, Request(id=pending.op, do=operation, aside=aside, start=start), fds)
        return pending

    def do(
        self, vmm: VmmProcess, operation: Operation, *, fds: Sequence[int] = (), phase: str = "",
        within: float = ANSWER_WITHIN,
    ) -> Done:  # fmt: skip
        """Hand an operation to its agent and wait for the answer. Raises `StepFailed` if none comes."""
        return self._await_done(self.invoke(vmm, operation, fds=fds, phase=phase), within)

    def ask(self, vmm: VmmProcess, question: Question, within: float = ANSWER_WITHIN) -> Reply:
        """Ask something that is no operation and not recorded as one. Raises `StepFailed` if there is no answer."""
        self._expect_alive(vmm)
        pending = PendingOperation(self.log.number(), name_of(question), False, vmm.name, vmm.pid)
        self._send(vmm, pending, Request(id=pending.op, do=question), ())
        self._await(lambda: pending.over, within, f"{vmm.name} to answer {pending.f}")
        if pending.reply is None:
            raise StepFailed(f"VMM {vmm.name} ended before it answered {pending.f}")
        if pending.reply.errno:
            raise StepFailed(f"{pending.f} in {vmm.name}: {pending.reply.call}: {os.strerror(pending.reply.errno)}")
        return pending.reply

    def wait(self, pending: PendingOperation, within: float) -> Done:
        """Wait for an operation that was handed over before. Raises `TimedOut`."""
        self.loop.wait(lambda: pending.over, within, f"{pending.f} to end")
        assert pending.done is not None
        return pending.done

    def _await_done(self, pending: PendingOperation, within: float) -> Done:
        self._await(lambda: pending.over, within, f"{pending.f} to be answered")
        assert pending.done is not None
        return pending.done

    def _await(self, done: Callable[[], bool], within: float, what: str) -> None:
        try:
            self.loop.wait(done, within, what)
        except TimedOut as late:
            raise StepFailed(str(late)) from late

    def _expect_alive(self, vmm: VmmProcess) -> None:
        if not vmm.alive:
            raise StepFailed(f"VMM {vmm.name} is gone (status {vmm.status}) and can do nothing")

    def _send(self, vmm: VmmProcess, pending: PendingOperation, request: Request, fds: Sequence[int]) -> None:
        vmm.pending[pending.op] = pending
        with contextlib.suppress(Ended):  # its death is on its way to us and will be the answer
            vmm.channel.send(request, fds)

    # -- what is heard ------------------------------------------------------------------------------------

    def _hear(self, vmm: VmmProcess) -> bool:
        """Take in one message, if there is one. The end of the stream is left to the pidfd, which knows for certain."""
        try:
            message, fds = vmm.channel.receive(0.0)
        except (BlockingIOError, TimeoutError):
            return False
        except Ended:
            self.loop.forget(vmm.channel.fileno())
            return False
        fds.close()
        match message:
            case Hello():
                self._spawned(vmm, message)
            case Begun():
                if message.id in vmm.pending:
                    vmm.pending[message.id].tid = message.tid
            case Reply():
                pending = vmm.pending.pop(message.id, None)
                if pending is not None:
                    self._close(pending, message)
        return True

    def _spawned(self, vmm: VmmProcess, hello: Hello) -> None:
        (pending,) = vmm.pending.values()
        vmm.pending.clear()
        value: dict[str, Value] = {} if hello.errno else {"pid": hello.pid}
        if hello.network:
            value["network"] = hello.network
        reply = Reply(id=pending.op, errno=hello.errno, began=pending.began, ended=self.log.now(), value=value)
        self._close(pending, reply)

    def _close(self, pending: PendingOperation, reply: Reply | None) -> None:
        pending.reply = reply
        now = self.log.now()
        if reply is None:
            done = Done(t=now, op=pending.op, outcome="info", tid=pending.tid)
        else:
            value = dict(reply.value)
            if reply.call:
                value["call"] = reply.call
            done = Done(
                t=now, op=pending.op, outcome="fail" if reply.errno or reply.bug else "ok", errno=reply.errno,
                firmware=reply.firmware, began=reply.began, ended=reply.ended, tid=pending.tid, value=value,
            )  # fmt: skip
        pending.done = done
        if pending.recorded:
            self.log.write(done)
        if reply is not None and reply.bug:
            raise StepFailed(f"internal error in {pending.f}: {reply.bug}")
        if pending.then is not None:
            pending.then()

    def _bury(self, vmm: VmmProcess) -> None:
        """The process is gone. What it said before that still counts."""
        self.loop.forget(vmm.pidfd)
        while self._hear(vmm):
            pass
        self.loop.forget(vmm.channel.fileno())
        vmm.channel.close()
        left, vmm.pending = vmm.pending, {}
        for pending in left.values():
            self._close(pending, None)
        vmm.status = self._server.reap(vmm.pid)
        last = {vm: tuple(read_vcpu(board.number).last_tick for board in boards) for vm, boards in vmm.boards.items()}
        for vm in last:
            vmm.unwatch(vm)
        if vmm.recorded:
            self.log.write(Exited(t=self.log.now(), agent=vmm.name, pid=vmm.pid, status=vmm.status, last_ticks=last))
        for last_word in tuple(vmm.at_end.values()):
            last_word()
