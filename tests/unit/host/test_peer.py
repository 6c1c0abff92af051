# SPDX-License-Identifier: Apache-2.0
"""The two ends of a hand-over talk to each other, and each knows what the other knows."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EBADMSG, ECONNRESET, ENOTCONN, EPIPE, EPROTO, EPROTONOSUPPORT
from pathlib import Path

import msgspec
import pytest

from chaos.kvm.structs import DebugRegs, Fpu, MpState, Regs, Sregs, VcpuEvents, Xcrs, Xsave
from chaos.linux.seqpacket import memory_file, pair
from chaos.vmm.messages import Greeting, LetGo, Received, Said, SentState, Taken, VcpuStates
from chaos.vmm.peer import Peer
from chaos.vmm.state import LITTLE, Extent, problem_with
from tests.unit.host.peers import LOCALHOST, SECONDS, join, together

VCPU = {
    "sregs": bytes(Sregs(cr0=1)),
    "regs": bytes(Regs(rip=0x1000)),
    "fpu": bytes(Fpu()),
    "xcrs": bytes(Xcrs()),
    "xsave": bytes(Xsave()),
    "msrs": bytes(24),
    "events": bytes(VcpuEvents()),
    "debug": bytes(DebugRegs()),
    "mp_state": bytes(MpState()),
}


@pytest.fixture
def old() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.disconnect()


@pytest.fixture
def new() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.disconnect()


@pytest.fixture
def joined(old: Peer, new: Peer) -> tuple[Peer, Peer]:
    join(old, new)
    return old, new


def test_state_descriptor_and_confirmation(joined: tuple[Peer, Peer]) -> None:
    old, new = joined
    states = (VCPU, VCPU | {"regs": bytes(Regs(rip=0x2000))})
    _, received = together(
        lambda: old.send_state(states, within=SECONDS), lambda: new.receive_state(LITTLE, within=SECONDS)
    )
    assert received == states == new.take_state()
    with memory_file("x", 1) as file:
        old.send_fd(file.number)
        with new.take_fd() as arrived:
            assert os.fstat(arrived.number).st_ino == os.fstat(file.number).st_ino
    new.commit(within=SECONDS)
    together(lambda: new.confirm(within=SECONDS), lambda: old.confirm(within=SECONDS))
    assert old.given and not new.given
    with pytest.raises(OSError, match="not connected"):
        old.send_fd(0)


def test_the_source_does_not_know_that_its_state_arrived_before_it_did(joined: tuple[Peer, Peer]) -> None:
    old, _ = joined
    with pytest.raises(TimeoutError, match=r"waited 0\.05 s to hear that the state of the vCPUs arrived"):
        old.send_state((VCPU,), within=0.05)


def test_the_destination_does_not_take_it_for_granted_that_it_was_heard(joined: tuple[Peer, Peer]) -> None:
    _, new = joined
    new.commit(within=SECONDS)
    with pytest.raises(TimeoutError, match=r"waited 0\.05 s to hear that the source lets go"):
        new.confirm(within=0.05)


def test_the_source_hears_what_a_destination_said_that_is_gone(joined: tuple[Peer, Peer]) -> None:
    old, new = joined
    new.commit(within=SECONDS)
    new.disconnect()
    with suppress(OSError):  # that the answer was heard, it may find out or not
        old.confirm(within=SECONDS)
    assert old.given


@pytest.mark.parametrize(
    "wait",
    [
        lambda old, new: old.send_state((VCPU,), within=SECONDS),
        lambda old, new: old.confirm(within=SECONDS),
    ],
)
def test_an_end_that_is_gone_ends_the_waits_for_it(
    joined: tuple[Peer, Peer], wait: Callable[[Peer, Peer], object]
) -> None:
    old, new = joined
    new.disconnect()
    with pytest.raises(OSError) as caught:
        wait(old, new)
    assert not isinstance(caught.value, TimeoutError)


def test_a_descriptor_of_an_end_that_is_gone(joined: tuple[Peer, Peer]) -> None:
    old, new = joined
    old.disconnect()
    with pytest.raises(BrokenPipeError, match="could not receive the VM's descriptor: the other end is gone"):
        new.take_fd()
    with pytest.raises(ConnectionError) as caught:
        new.confirm(within=SECONDS)
    assert caught.value.errno in (EPIPE, ECONNRESET)


def test_what_was_not_taken_is_closed(joined: tuple[Peer, Peer]) -> None:
    old, new = joined
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader, writer = os.pipe()
    old.send_fd(writer)
    os.close(writer)
    new.disconnect()
    old.disconnect()
    assert os.read(reader, 1) == b""  # nobody has the other end open any more
    os.close(reader)
    assert len(list(Path("/proc/self/fd").iterdir())) < before


def test_nothing_is_done_without_a_connection(old: Peer) -> None:
    waits: list[Callable[[], object]] = [
        lambda: old.accept("old", "new", within=1),
        lambda: old.send_state((VCPU,), within=1),
        lambda: old.receive_state(LITTLE, within=1),
        old.take_state,
        old.take_fd,
        lambda: old.commit(within=1),
        lambda: old.confirm(within=1),
    ]
    for wait in waits:
        with pytest.raises(OSError) as caught:
            wait()
        assert caught.value.errno == ENOTCONN
    old.disconnect()


# -- what the other end says is not believed ------------------------------------------------------------------


def stranger(new: Peer, *messages: object) -> socket.socket:
    """Connects to `new` and says this, in good frames."""
    _, theirs = pair()
    port = new.listen(theirs, LOCALHOST)
    connection = socket.create_connection((LOCALHOST, port))
    for message in messages:
        body = msgspec.msgpack.encode(message)
        connection.sendall(struct.pack("!II", len(body), zlib.crc32(body)) + body)
    return connection


@pytest.mark.parametrize(
    ("greeting", "number", "complaint"),
    [
        (Greeting(version=2, vm="old", peer="new"), EPROTONOSUPPORT, "speaks version 2 of the protocol, this one 1"),
        (Greeting(version=1, vm="other", peer="new"), EPROTO, "the other end is 'other' and wants 'new'"),
        (Greeting(version=1, vm="old", peer="third"), EPROTO, "this is 'new' and wants 'old'"),
        (Taken(), EPROTO, "could not be greeted: the other end said taken instead"),
    ],
)
def test_who_is_not_who_was_meant_is_turned_away(new: Peer, greeting: Said, number: int, complaint: str) -> None:
    with stranger(new, greeting), pytest.raises(OSError, match=complaint) as caught:
        new.accept("new", "old", within=SECONDS)
    assert caught.value.errno == number


def parts(**other: bytes | None) -> VcpuStates:
    changed = {**VCPU, **other}
    return ({part: data for part, data in changed.items() if data is not None},)


@pytest.mark.parametrize(
    ("states", "complaint"),
    [
        (parts(regs=None), "it has the parts debug, events, fpu"),
        (parts(lapic=bytes(1024)), "lapic"),
        (parts(regs=b""), "regs has 144 bytes, not 0"),
        (parts(xsave=bytes(4097)), "xsave has 4096 bytes, not 4097"),
        (parts(msrs=bytes(13)), "13 bytes are no list of MSRs"),
        (({},), r"it has the parts \(none\)"),
        ((VCPU, {}), "no state of vCPU 1"),
    ],
)
def test_what_is_no_state_is_not_acknowledged(joined: tuple[Peer, Peer], states: VcpuStates, complaint: str) -> None:
    old, new = joined

    def refuse() -> None:
        with pytest.raises(OSError, match=complaint) as caught:
            new.receive_state(LITTLE, within=SECONDS)
        assert caught.value.errno == EBADMSG
        new.disconnect()

    def send() -> None:
        with pytest.raises(OSError, match="could not hear that the state of the vCPUs arrived"):
            old.send_state(states, within=SECONDS)

    together(send, refuse)


def test_a_host_with_more_state_wants_more() -> None:
    assert problem_with(VCPU, LITTLE) == ""
    assert "lapic" in problem_with(VCPU, Extent(lapic=True))
    assert problem_with(VCPU, Extent(xsave=8192)) == "xsave has 8192 bytes, not 4096"


@pytest.mark.parametrize("said", [SentState(vcpus=()), Received(), LetGo(), Greeting(version=1, vm="old", peer="new")])
def test_what_was_not_to_be_said_now(new: Peer, said: Said) -> None:
    _, theirs = pair()
    port = new.listen(theirs, LOCALHOST)
    connection = socket.create_connection((LOCALHOST, port))
    with connection:
        for message in (Greeting(version=1, vm="old", peer="new"), said):
            body = msgspec.msgpack.encode(message)
            connection.sendall(struct.pack("!II", len(body), zlib.crc32(body)) + body)
        new.accept("new", "old", within=SECONDS)
        if isinstance(said, SentState):
            assert new.receive_state(LITTLE, within=SECONDS) == ()
        else:
            with pytest.raises(OSError, match=f"said {said.__struct_config__.tag} instead"):
                new.receive_state(LITTLE, within=SECONDS)
