# SPDX-License-Identifier: Apache-2.0
"""The other end of a migration, as a VM of an agent has it: what is said to it, and what it has sent.

One thread of the agent at a time. A wait has a deadline and an end that is gone ends it at once; both are OSErrors
that say what was waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EPIPE, ETIMEDOUT

import msgspec

from chaos.errors import InternalError
from chaos.kvm.fd import OwnedFd
from chaos.vmm.messages import BETWEEN, VCPU_STATES, Between, Descriptor, State, Taken, VcpuStates
from chaos.vmm.wire import Channel, Ended, FdSet, memory_file

# How long one end of a migration waits for what the other end was told to send before.
PEER_WITHIN = 20.0


class Peer:
    def __init__(self) -> None:
        self._connection: Channel[Between] | None = None
        self._state: VcpuStates | None = None
        self._fd: OwnedFd | None = None
        self._receives = False  # whether we are the destination of what we are connected for

    def connect(self, connection: OwnedFd) -> None:
        """Over a socket that arrived as a descriptor. What there was before is let go."""
        self.disconnect()
        self._receives = False
        self._connection = Channel.adopt(connection, BETWEEN)

    def send_state(self, states: VcpuStates) -> int:
        """How many bytes went."""
        data = msgspec.msgpack.encode(states)
        with memory_file("state", len(data)) as file:
            if os.pwrite(file.number, data, 0) != len(data):
                raise InternalError("the state of the vCPUs was not written whole")
            self._send(State(size=len(data)), file.number)
        return len(data)

    def take_state(self) -> VcpuStates:
        self._await(lambda: self._state is not None, "the state of the vCPUs")
        arrived, self._state = self._state, None
        assert arrived is not None
        return arrived

    def send_fd(self, number: int) -> None:
        self._send(Descriptor(), number)

    def take_fd(self) -> OwnedFd:
        """The source's descriptor, as it arrived; the caller's from now on."""
        self._receives = True
        self._await(lambda: self._fd is not None, "the VM's descriptor")
        arrived, self._fd = self._fd, None
        assert arrived is not None
        return arrived

    def commit(self) -> None:
        """The destination says that the guest is its own; the source waits to hear it."""
        if self._receives:
            self._send(Taken())
        else:
            message, fds = self._hear("its confirmation")
            fds.close()
            if not isinstance(message, Taken):
                raise InternalError(f"the destination said {message!r} where it was to confirm")
        self.disconnect()

    def disconnect(self) -> None:
        """Let go of the other end and of what it sent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._fd is not None:
            self._fd.close()
            self._fd = None
        self._state = None

    @property
    def _channel(self) -> Channel[Between]:
        if self._connection is None:
            raise InternalError("the VM is not connected with another")
        return self._connection

    def _send(self, message: Between, *fds: int) -> None:
        try:
            self._channel.send(message, fds)
        except Ended:
            raise BrokenPipeError(EPIPE, "the other end of the migration is gone") from None

    def _hear(self, what: str) -> tuple[Between, FdSet]:
        try:
            return self._channel.receive(PEER_WITHIN)
        except Ended:
            raise BrokenPipeError(EPIPE, f"the other end of the migration ended before it sent {what}") from None
        except TimeoutError:
            text = f"the other end of the migration did not send {what} within {PEER_WITHIN:g} s"
            raise TimeoutError(ETIMEDOUT, text) from None

    def _await(self, arrived: Callable[[], bool], what: str) -> None:
        while not arrived():
            message, fds = self._hear(what)
            with fds:
                if isinstance(message, State):
                    with fds.steal() as file:
                        self._state = VCPU_STATES.decode(os.pread(file.number, message.size, 0))
                elif isinstance(message, Descriptor):
                    self._fd = fds.steal()
