# SPDX-License-Identifier: Apache-2.0
"""The other end of a hand-over, as a VM of an agent has it: what is said to it, and what it has sent.

Two channels. Descriptors go over a Unix socket, since nothing else carries them; what a migration is about goes over
TCP between the namespaces of the two VMMs. The source connects to where the destination listens. Each names itself and
whom it wants, and is not talked to if that is somebody else. What one tells the other is answered, so that both know.

    source                                  destination
    Greeting     ─────────────────────────▶             connect, accept
                 ◀───────────────────────── Greeting
    State        ─────────────────────────▶             get_state, receive_state
                 ◀───────────────────────── Received
    Descriptor   ─────── Unix ────────────▶             send_fd, move
                 ◀───────────────────────── Taken       commit
    LetGo        ─────────────────────────▶             confirm
                 ◀───────────────────────── the end

One thread of the agent at a time. A wait has a deadline, and an end that is gone ends it at once; both are OSErrors
that say what was waited for.
"""

from __future__ import annotations

import socket
from errno import EBADMSG, ENOTCONN, EPIPE, EPROTO, EPROTONOSUPPORT, ETIMEDOUT
from typing import Literal, TypeVar

from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import Channel, Ended
from chaos.vmm import state
from chaos.vmm.messages import (
    DESCRIPTORS,
    SAID,
    VERSION,
    Descriptor,
    Greeting,
    LetGo,
    Received,
    Said,
    SentState,
    Taken,
    VcpuStates,
)
from chaos.vmm.stream import Stream

# How long the destination waits for a descriptor that the source was told to send before. No network is in between.
DESCRIPTOR_WITHIN = 20.0

T = TypeVar("T", Greeting, SentState, Received, Taken, LetGo)


class Peer:
    """`within` is in seconds, for all that an operation waits for."""

    def __init__(self) -> None:
        self._unix: Channel[Descriptor] | None = None
        self._listener: socket.socket | None = None
        self._stream: Stream[Said] | None = None
        self._state: VcpuStates | None = None
        self._stand_by("")

    def _stand_by(self, role: Literal["", "source", "destination"]) -> None:
        """What we are in the migration that begins, "" in none. So far we have not `taken` the guest, as a destination,
        nor heard that it was `given` away, as a source. All that is remembered until the next one."""
        self.role, self.taken, self.given = role, False, False

    # -- connecting ---------------------------------------------------------------------------------------

    def join(self, connection: OwnedFd, role: Literal["", "source", "destination"] = "") -> None:
        """Over a Unix socket that arrived as a descriptor. What there was before is let go."""
        self.disconnect()
        self._stand_by(role)
        self._unix = Channel.adopt(connection, DESCRIPTORS)

    def listen(self, connection: OwnedFd, address: str) -> int:
        """The port. Raises OSError."""
        self.join(connection, "destination")
        self._listener = socket.create_server((address, 0), backlog=1)
        return int(self._listener.getsockname()[1])

    def accept(self, name: str, peer: str, *, within: float) -> None:
        """Raises OSError."""
        if self._listener is None:
            raise OSError(ENOTCONN, "nothing listens for the other end of the migration")
        with self._listener as listener:
            self._listener = None
            self._stream = Stream.accept(listener, SAID, within=within)
        self._greeted(name, peer, within)
        self._say(Greeting(version=VERSION, vm=name, peer=peer), "greet the source", within)

    def connect(self, connection: OwnedFd, address: str, port: int, name: str, peer: str, *, within: float) -> None:
        """Raises OSError."""
        self.join(connection, "source")
        self._stream = Stream.connect(address, port, SAID, within=within)
        self._say(Greeting(version=VERSION, vm=name, peer=peer), "greet the destination", within)
        self._greeted(name, peer, within)

    def _greeted(self, name: str, peer: str, within: float) -> None:
        greeting = self._hear(Greeting, "be greeted", within)
        if greeting.version != VERSION:
            text = f"the other end speaks version {greeting.version} of the protocol, this one {VERSION}"
            raise OSError(EPROTONOSUPPORT, text)
        if (greeting.vm, greeting.peer) != (peer, name):
            text = f"the other end is {greeting.vm!r} and wants {greeting.peer!r}; this is {name!r} and wants {peer!r}"
            raise OSError(EPROTO, text)

    # -- the state ----------------------------------------------------------------------------------------

    def send_state(self, states: VcpuStates, *, within: float) -> None:
        """It is with the other end when this returns. Raises OSError."""
        self._say(SentState(vcpus=states), "send the state of the vCPUs", within)
        self._hear(Received, "hear that the state of the vCPUs arrived", within)

    def receive_state(self, extent: state.Extent, *, within: float) -> VcpuStates:
        """Kept for `take_state`. Raises OSError."""
        states = self._hear(SentState, "receive the state of the vCPUs", within).vcpus
        for number, parts in enumerate(states):
            problem = state.problem_with(parts, extent)
            if problem:
                raise OSError(EBADMSG, f"what arrived is no state of vCPU {number}: {problem}")
        self._state = states
        self._say(Received(), "say that the state of the vCPUs arrived", within)
        return states

    def take_state(self) -> VcpuStates:
        """What was received. Raises OSError if nothing was."""
        if self._state is None:
            raise OSError(ENOTCONN, "the state of the vCPUs has not been received")
        arrived, self._state = self._state, None
        return arrived

    # -- the descriptor -----------------------------------------------------------------------------------

    def send_fd(self, number: int) -> None:
        """Raises OSError."""
        try:
            self._channel.send(Descriptor(), (number,))
        except Ended:
            raise BrokenPipeError(EPIPE, "could not send the VM's descriptor: the other end is gone") from None

    def take_fd(self) -> OwnedFd:
        """The source's descriptor; the caller's from now on. Raises OSError."""
        try:
            _, fds = self._channel.receive(DESCRIPTOR_WITHIN)
        except Ended:
            raise BrokenPipeError(EPIPE, "could not receive the VM's descriptor: the other end is gone") from None
        except TimeoutError:
            text = f"waited {DESCRIPTOR_WITHIN:g} s to receive the VM's descriptor"
            raise TimeoutError(ETIMEDOUT, text) from None
        with fds:
            return fds.steal()

    # -- the end ------------------------------------------------------------------------------------------

    def commit(self, *, within: float) -> None:
        """The destination says that the guest is its own. Raises OSError."""
        self._say(Taken(), "tell the source that it may let go", within)

    def confirm(self, *, within: float) -> None:
        """The source hears it, and the destination that it did; neither is connected then. Raises OSError."""
        if self.role == "destination":
            self._hear(LetGo, "hear that the source lets go", within)
        else:
            self._hear(Taken, "hear that the destination has the guest", within)
            self.given = True
            self._say(LetGo(), "tell the destination that it is heard", within)
            self._connected.wait_end("see that the destination has heard it", within=within)
        self.disconnect()

    def disconnect(self) -> None:
        """Let go of the other end and of what it sent, descriptors that were not taken included."""
        for end in (self._unix, self._listener, self._stream):
            if end is not None:
                end.close()
        self._unix = self._listener = self._stream = self._state = None

    # -- in short -----------------------------------------------------------------------------------------

    @property
    def _channel(self) -> Channel[Descriptor]:
        if self._unix is None:
            raise OSError(ENOTCONN, "the VM is not connected with another")
        return self._unix

    def _say(self, message: Said, what: str, within: float) -> None:
        self._connected.send(message, what, within=within)

    def _hear(self, kind: type[T], what: str, within: float) -> T:
        message = self._connected.receive(what, within=within)
        if not isinstance(message, kind):
            raise OSError(EPROTO, f"could not {what}: the other end said {message.__struct_config__.tag} instead")
        return message

    @property
    def _connected(self) -> Stream[Said]:
        if self._stream is None:
            raise OSError(ENOTCONN, "the VM is not connected with another over the network")
        return self._stream
