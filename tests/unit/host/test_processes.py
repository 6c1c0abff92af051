# SPDX-License-Identifier: Apache-2.0
"""The fork server, its agents and the processes of a run: real processes, no KVM."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.cgroup.group import Cgroup
from chaos.history import records
from chaos.history.records import Done, Exited, Invoke, Record
from chaos.linux.fd import OwnedFd
from chaos.linux.loop import Loop
from chaos.linux.seqpacket import Channel, Ended
from chaos.runner.operations import OperationLog
from chaos.runner.recorder import Recorder
from chaos.runner.vmms import StepFailed, VmmProcesses
from chaos.vmm.messages import FROM_AGENT, Exit, FromAgent, Hello, Move, Reply, Request, Sample, Status
from chaos.vmm.server import ForkServer
from faults.vmm import Kill

SECONDS = 20.0


@pytest.fixture
def server() -> Iterator[ForkServer]:
    forked = ForkServer()
    yield forked
    forked.close()


class Group:
    """Stands in for a cgroup: its cgroup.procs is a pipe, so what is written to it can be read."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def open_procs(self) -> int:
        return os.dup(self.writer)

    def written(self) -> bytes:
        return os.read(self.reader, 100)


def gone(pid: int) -> bool:
    """Whether the process ends in time. Its parent may have left it a zombie for init to reap."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.005)
    return False


def spawn(server: ForkServer, procs: int) -> tuple[int, OwnedFd, Channel[FromAgent]]:
    pid, pidfd, connection = server.spawn("source", procs)
    return pid, pidfd, Channel.adopt(connection, FROM_AGENT)


def ended(pidfd: OwnedFd) -> bool:
    return bool(select.select([pidfd], [], [], SECONDS)[0])


def test_an_agent_enters_its_cgroup_first_and_ends_in_good_order(server: ForkServer) -> None:
    group = Group()
    pid, pidfd, channel = spawn(server, group.writer)
    assert channel.receive(SECONDS)[0] == Hello(pid=pid)
    assert group.written() == b"0"
    channel.send(Request(id=3, do=Exit()))
    reply = channel.receive(SECONDS)[0]
    assert isinstance(reply, Reply) and reply.id == 3 and 0 < reply.began <= reply.ended
    assert ended(pidfd)
    assert server.reap(pid) == 0
    with pytest.raises(Ended):
        channel.receive(SECONDS)


def test_an_agent_that_cannot_enter_its_cgroup_says_why_and_ends(server: ForkServer) -> None:
    with Path("/dev/null").open("rb") as unwritable:
        pid, pidfd, channel = spawn(server, unwritable.fileno())
    hello = channel.receive(SECONDS)[0]
    assert isinstance(hello, Hello) and hello.errno == 9
    assert ended(pidfd)
    assert server.reap(pid) == 1


def test_an_agent_has_nothing_open_but_what_it_needs(server: ForkServer) -> None:
    group = Group()
    pid, _, channel = spawn(server, group.writer)
    channel.receive(SECONDS)
    fds = {int(path.name): path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert str(fds.pop(0)) == str(fds.pop(1)) == "/dev/null"
    fds.pop(2)
    assert len(fds) == 1 and "socket" in str(*fds.values())


def test_nonsense_is_answered_as_a_bug_and_the_agent_lives(server: ForkServer) -> None:
    _, _, channel = spawn(server, Group().writer)
    channel.receive(SECONDS)
    questions: tuple[Status | Sample | Move, ...] = (Status(vm="old"), Sample(vm="old"), Move(vm="new", source="old"))
    for number, do in enumerate(questions):
        channel.send(Request(id=number, do=do))
        reply = channel.receive(SECONDS)[0]
        assert isinstance(reply, Reply) and reply.id == number and "has no VM" in reply.bug


def test_the_signal_that_ended_an_agent_is_its_status(server: ForkServer) -> None:
    pid, pidfd, channel = spawn(server, Group().writer)
    channel.receive(SECONDS)
    signal.pidfd_send_signal(pidfd.number, signal.SIGKILL)
    assert ended(pidfd)
    assert server.reap(pid) == -signal.SIGKILL


def test_agents_end_with_the_one_who_speaks_to_them(server: ForkServer) -> None:
    pid, pidfd, channel = spawn(server, Group().writer)
    channel.receive(SECONDS)
    channel.close()
    assert ended(pidfd)
    assert server.reap(pid) == 0


def test_agents_end_with_the_fork_server() -> None:
    server = ForkServer()
    pid, _, channel = spawn(server, Group().writer)
    channel.receive(SECONDS)
    os.kill(server.pid, signal.SIGKILL)
    assert gone(pid)
    server.close()


HOLDER = """
import os, sys, time
from chaos.vmm.server import ForkServer
server = ForkServer()
pid, pidfd, connection = server.spawn("source", os.open("/dev/null", os.O_WRONLY))
print(server.pid, pid, flush=True)
time.sleep(60)
"""


def test_all_end_with_the_runner_even_if_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        pids = [int(pid) for pid in runner.stdout.readline().split()]
        runner.kill()
        runner.wait()
        assert len(pids) == 2 and all(gone(pid) for pid in pids)


class Outside:
    """Reads what a recorder writes."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def records(self) -> list[Record]:
        try:
            return [records.decode(line) for line in os.read(self.reader, 1 << 20).splitlines()]
        except BlockingIOError:
            return []


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def vmms(server: ForkServer, outside: Outside) -> Iterator[VmmProcesses]:
    made = VmmProcesses(server, Loop(), OperationLog(Recorder(outside.writer)))
    yield made
    made.close()


def cgroup() -> Cgroup:
    return Group()  # type: ignore[return-value]


def test_spawning_and_ending_are_recorded(vmms: VmmProcesses, outside: Outside) -> None:
    vmm = vmms.spawn("source", cgroup(), label="left")
    vmms.end(vmm)
    spawned, spawned_done, exiting, exited_done, exited = outside.records()
    assert isinstance(spawned, Invoke) and (spawned.f, spawned.args) == ("spawn", {"cgroup": "left"})
    assert isinstance(spawned_done, Done) and spawned_done.value == {"pid": vmm.pid}
    assert 0 < spawned_done.began <= spawned_done.ended
    assert isinstance(exiting, Invoke) and (exiting.f, exiting.op, exiting.pid) == ("exit", 1, vmm.pid)
    assert isinstance(exited_done, Done) and exited_done.outcome == "ok" and exited_done.began
    assert isinstance(exited, Exited) and exited.status == 0


def context_of(vmms: VmmProcesses) -> Any:
    return SimpleNamespace(vmms=vmms)


def test_a_killed_vmm_leaves_info_and_an_exit(vmms: VmmProcesses, outside: Outside) -> None:
    vmm = vmms.spawn("source", cgroup())
    outside.records()
    os.kill(vmm.pid, signal.SIGSTOP)  # so that the operation is under way when it dies
    pending = vmms.invoke(vmm, Status(vm="old"), phase="move")
    fault = Kill()
    ctx = context_of(vmms)
    fault.apply(ctx, "source")
    assert fault.evidence(ctx, "source").struck and vmm.status == -9
    assert vmms.wait(pending, SECONDS).outcome == "info"
    invoked, done, exited = outside.records()
    assert isinstance(invoked, Invoke) and invoked.phase == "move"
    assert isinstance(done, Done) and (done.op, done.outcome, done.began) == (invoked.op, "info", 0)
    assert isinstance(exited, Exited) and exited.status == -9
    with pytest.raises(StepFailed, match=r"source is gone \(status -9\)"):
        vmms.invoke(vmm, Exit())
    assert not outside.records()


def test_an_answer_given_before_death_counts(vmms: VmmProcesses, outside: Outside) -> None:
    vmm = vmms.spawn("source", cgroup())
    pending = vmms.invoke(vmm, Exit())
    assert select.select([vmm.handle], [], [], SECONDS)[0]  # gone, and nothing of it heard yet
    assert vmms.wait(pending, SECONDS).outcome == "ok"
    assert vmm.wait_end(SECONDS)
    assert [type(record).__name__ for record in outside.records()][-2:] == ["Done", "Exited"]


def test_a_signal_that_does_not_end_it_is_no_evidence(vmms: VmmProcesses) -> None:
    vmm = vmms.spawn("source", cgroup())
    vmms.end(vmm)
    assert not Kill().evidence(context_of(vmms), "source").struck
    assert Kill().undo(context_of(vmms), "source") == "not applied"


@pytest.mark.parametrize("name", ["TERM", "ABRT", "SEGV"])
def test_the_signals_that_a_fault_may_choose_end_an_agent(vmms: VmmProcesses, name: str) -> None:
    vmms.spawn("source", cgroup())
    fault = Kill(signal=name)  # type: ignore[arg-type]
    fault.apply(context_of(vmms), "source")
    evidence = fault.evidence(context_of(vmms), "source")
    assert evidence.struck, evidence.detail


def test_helpers_leave_no_records(vmms: VmmProcesses, outside: Outside) -> None:
    vmms.end(vmms.spawn("_helper", cgroup(), recorded=False))
    assert not outside.records()


def test_a_vmm_without_a_cgroup_fails_the_step(vmms: VmmProcesses, outside: Outside) -> None:
    class Closed(Group):
        def open_procs(self) -> int:
            return os.open("/dev/null", os.O_RDONLY)

    with pytest.raises(StepFailed, match="could not be put into its cgroup"):
        vmms.spawn("source", Closed())  # type: ignore[arg-type]
    done = outside.records()[1]
    assert isinstance(done, Done) and (done.outcome, done.errno) == ("fail", 9)
