# SPDX-License-Identifier: Apache-2.0
"""The fork server: forks agents, reaps them, and takes them with it when it ends.

It is forked from the runner while that has one thread and everything is imported, and stays as it was then. It alone
can wait for agents, being their parent; so it does that when the runner, which holds their pidfds, has seen one end.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from chaos.errors import HostLacks, InternalError
from chaos.linux import process
from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import Channel, Ended, FdSet, pair
from chaos.netns import space
from chaos.vmm import agent
from chaos.vmm.messages import (
    FROM_SERVER,
    REQUESTS,
    TO_SERVER,
    FromServer,
    Hello,
    Reap,
    Reaped,
    Request,
    Spawn,
    Spawned,
    ToServer,
)

# The server only forks and reaps: it answers at once or is broken.
ANSWER_WITHIN = 30.0


class ForkServer:
    """The runner's side."""

    def __init__(self) -> None:
        """Forks. The calling process has one thread."""
        ours, theirs = pair()
        parent = os.getpid()
        self.pid = process.fork(lambda: _serve(parent, theirs))
        theirs.close()
        self._channel: Channel[FromServer] = Channel.adopt(ours, FROM_SERVER)

    def spawn(self, name: str, procs: int, network: int | None = None) -> tuple[int, OwnedFd, OwnedFd]:
        """Fork an agent into the cgroup whose cgroup.procs is open as `procs`, and into a network namespace, if one is
        open as `network`.

        Returns its pid, its pidfd and a socket to it, on which it says Hello first. Raises OSError.
        """
        ours, theirs = pair()
        with theirs:
            try:
                places = (procs,) if network is None else (procs, network)
                self._channel.send(Spawn(name=name, network=network is not None), (theirs.number, *places))
                answer, fds = self._receive()
            except BaseException:
                ours.close()
                raise
        with fds:
            if not isinstance(answer, Spawned):
                raise InternalError(f"the fork server answered {answer!r}")
            if answer.errno:
                ours.close()
                raise OSError(answer.errno, f"fork: {os.strerror(answer.errno)}")
            return answer.pid, fds.steal(), ours

    def reap(self, pid: int) -> int:
        """Exit code of an agent that has ended, or minus the signal that ended it."""
        self._channel.send(Reap(pid=pid))
        answer, fds = self._receive()
        fds.close()
        if not isinstance(answer, Reaped):
            raise InternalError(f"the fork server answered {answer!r}")
        return answer.status

    def _receive(self) -> tuple[FromServer, FdSet]:
        try:
            return self._channel.receive(ANSWER_WITHIN)
        except (Ended, TimeoutError) as error:
            raise InternalError("the fork server is gone, and every VMM with it") from error

    def close(self) -> None:
        """End it, with whatever agents are left."""
        if not self._channel.closed:
            self._channel.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _serve(parent: int, connection: OwnedFd) -> int:
    process.die_with(parent)
    process.leave_streams()
    process.keep_only((connection.number,))
    channel: Channel[ToServer] = Channel.adopt(connection, TO_SERVER)
    children: set[int] = set()
    while True:
        try:
            message, fds = channel.receive()
        except Ended:
            return 0
        with fds:
            if isinstance(message, Spawn):
                _spawn(channel, message, fds, children)
            else:
                channel.send(_reap(message, children))


def _spawn(channel: Channel[ToServer], message: Spawn, fds: FdSet, children: set[int]) -> None:
    server = os.getpid()
    try:
        pid = process.fork(lambda: _be_agent(server, message, fds))
    except OSError as error:
        channel.send(Spawned(pid=0, errno=error.errno or errno.EAGAIN))
        return
    finally:
        fds.close()
    children.add(pid)
    with OwnedFd(os.pidfd_open(pid)) as pidfd:
        channel.send(Spawned(pid=pid), (pidfd.number,))


def _be_agent(server: int, message: Spawn, fds: FdSet) -> int:
    process.die_with(server)
    connection = fds.steal(0)
    try:
        _take_place(message, fds)
        number = 0
    except HostLacks:
        number = errno.EPERM
    except OSError as error:
        number = error.errno or errno.EIO
    process.keep_only((connection.number,))
    process.be_mortal()
    process.allow_many_files()
    channel: Channel[Request] = Channel.adopt(connection, REQUESTS)
    network = Path("/proc/self/ns/net").stat().st_ino if message.network else 0
    channel.send(Hello(pid=os.getpid(), errno=number, network=network))
    if number:
        return 1
    return agent.serve(message.name, channel)


def _take_place(message: Spawn, fds: FdSet) -> None:
    """Go where the agent belongs, before anything that could be charged to anybody. Raises OSError, `HostLacks`."""
    with fds.steal(1) as procs:
        os.write(procs.number, b"0")
    if message.network:
        with fds.steal(2) as network:
            space.enter(network.number)


def _reap(message: Reap, children: set[int]) -> Reaped:
    if message.pid not in children:
        raise InternalError(f"asked to reap {message.pid}, which is no agent")
    _, status = os.waitpid(message.pid, 0)
    children.discard(message.pid)
    return Reaped(pid=message.pid, status=os.waitstatus_to_exitcode(status))
