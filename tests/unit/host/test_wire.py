# SPDX-License-Identifier: Apache-2.0
"""Messages with descriptors over a socket."""

from __future__ import annotations

import os
import random
import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.errors import InternalError
from chaos.linux import seqpacket
from chaos.linux.seqpacket import Channel, Ended, FdSet, memory_file, pair
from chaos.vmm.messages import (
    DESCRIPTORS,
    FROM_AGENT,
    FROM_SERVER,
    REQUESTS,
    TO_SERVER,
    Begun,
    Connect,
    Create,
    Descriptor,
    FilledContexts,
    Hello,
    Reap,
    Reaped,
    Reply,
    Request,
    Spawn,
    Spawned,
    StartStorm,
)
from tests.unit.mutation import mutated


def channels() -> tuple[Channel[Request], Channel[Request]]:
    one, other = pair()
    return Channel.adopt(one, REQUESTS), Channel.adopt(other, REQUESTS)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


REQUEST = Request(id=7, do=Create(vm="old", kind="sev", vcpus=2, memory="guest"))


def test_a_message_arrives_with_its_descriptors() -> None:
    one, other = channels()
    with memory_file("x", 4096) as memory:
        os.pwrite(memory.number, b"shared", 0)
        one.send(REQUEST, (memory.number, memory.number))
    message, fds = other.receive(5.0)
    assert message == REQUEST
    with fds:
        assert len(fds) == 2
        first = fds.steal(0)
        assert len(fds) == 1
        assert not os.get_inheritable(first.number)
        assert os.pread(first.number, 6, 0) == b"shared"
        first.close()
    assert len(fds) == 0
    one.close()
    other.close()


def test_what_is_not_stolen_is_closed() -> None:
    one, other = channels()
    with memory_file("x", 1) as memory:
        one.send(REQUEST, (memory.number,))
    before = open_files()
    _, fds = other.receive(5.0)
    assert open_files() == before + 1
    fds.close()
    fds.close()
    assert open_files() == before
    one.close()
    other.close()


def test_a_descriptor_that_did_not_come_cannot_be_stolen() -> None:
    with pytest.raises(InternalError, match="it brought 0"):
        FdSet().steal()


def test_messages_keep_their_borders_and_their_order() -> None:
    one, other = channels()
    for number in range(20):
        one.send(Request(id=number, do=REQUEST.do))
    assert [other.receive(5.0)[0].id for _ in range(20)] == list(range(20))
    one.close()
    other.close()


def test_the_end_of_the_other_side_is_told_apart_from_silence() -> None:
    one, other = channels()
    with pytest.raises(TimeoutError):
        other.receive(0.01)
    with pytest.raises(BlockingIOError):
        other.receive(0.0)
    one.close()
    with pytest.raises(Ended):
        other.receive(5.0)
    with pytest.raises(Ended):
        other.send(REQUEST)
    other.close()
    assert other.closed


def test_what_was_sent_before_the_end_still_arrives() -> None:
    one, other = channels()
    one.send(REQUEST)
    one.close()
    assert other.receive(0.0)[0] == REQUEST
    with pytest.raises(Ended):
        other.receive(0.0)
    other.close()


def test_nonsense_is_a_bug_and_its_descriptors_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(theirs, REQUESTS)
    with memory_file("x", 1) as memory:
        socket.send_fds(ours, [b"\xc1"], [memory.number])
    before = open_files()
    with pytest.raises(InternalError, match="could not be understood"):
        channel.receive(5.0)
    assert open_files() == before
    ours.send(msgspec.msgpack.encode({"id": 1, "do": {"f": "format-disk"}}))
    with pytest.raises(InternalError, match="could not be understood"):
        channel.receive(5.0)
    ours.close()
    channel.close()


def test_what_is_too_long_is_not_sent() -> None:
    one, other = channels()
    with pytest.raises(InternalError, match="longer than"):
        one.send({"regs": bytes(seqpacket.MESSAGE_LIMIT)})
    one.close()
    other.close()


def test_several_threads_may_send() -> None:
    one, other = channels()

    def send() -> None:
        for _ in range(50):
            one.send(REQUEST)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert [other.receive(5.0)[0] for _ in range(200)] == [REQUEST] * 200
    for thread in threads:
        thread.join()
    one.close()
    other.close()


# -- by chance ------------------------------------------------------------------------------------------------

MESSAGES = (
    REQUEST,
    Request(id=1 << 40, do=Connect(vm="old", peer="new", address="10.0.0.1", port=65535, within_ms=20_000)),
    Request(id=0, do=StartStorm(vm="old", threads=64, calls=("KVM_RUN", "KVM_GET_REGS")), aside=True),
    Hello(pid=7, errno=1, network=4026531840),
    Begun(id=3, tid=9),
    Reply(
        id=3,
        errno=16,
        call="KVM_MEMORY_ENCRYPT_OP INIT",
        value={"handle": 1},
        filled=FilledContexts(count=8, errno=16, call="x"),
    ),
    Spawn(name="source", network=True),
    Reap(pid=12),
    Spawned(pid=12),
    Reaped(pid=12, status=-9),
    Descriptor(),
)
DECODERS: tuple[msgspec.msgpack.Decoder[Any], ...] = (REQUESTS, FROM_AGENT, TO_SERVER, FROM_SERVER, DESCRIPTORS)


def heard(data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> object:
    """What one packet with a descriptor comes to; the descriptor is closed in any case."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with ours, memory_file("x", 1) as memory:
        channel = Channel(theirs, decoder)
        socket.send_fds(ours, [data], [memory.number])
        before = open_files()
        try:
            message, fds = channel.receive(5.0)
            fds.close()
        except (InternalError, Ended) as error:
            message = error
        assert open_files() == before
        channel.close()
        return message


def test_a_million_random_bytes_in_packets() -> None:
    """Nonsense, and every message with bytes changed, to each of the two sides."""
    chance = random.Random(5)
    packed = [msgspec.msgpack.encode(message) for message in MESSAGES]
    fed = 0
    while fed < 1_000_000:
        if chance.random() < 0.95:
            data = mutated(chance.choice(packed), chance)
        else:
            data = chance.randbytes(chance.choice([1, 100, seqpacket.MESSAGE_LIMIT, seqpacket.MESSAGE_LIMIT + 1]))
        got = heard(data, chance.choice(DECODERS))
        assert isinstance(got, InternalError | Ended | msgspec.Struct)
        assert len(data) <= seqpacket.MESSAGE_LIMIT or isinstance(got, InternalError)
        fed += len(data)


@given(st.binary(max_size=300), st.sampled_from(DECODERS))
def test_any_packet_is_a_message_or_an_error(data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> None:
    assert isinstance(heard(data, decoder), InternalError | Ended | msgspec.Struct)


def test_a_packet_nested_without_end_is_an_error() -> None:
    assert isinstance(heard(b"\x91" * 60_000, REQUESTS), InternalError)
    nested = b"\x82\xa2id\x01\xa2do\x82\xa1f\xa6create\xa1x" + b"\x91" * 60_000  # under a key nobody knows
    assert isinstance(heard(nested, REQUESTS), InternalError)


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80"])
def test_a_text_that_is_none_is_an_error(text: bytes) -> None:
    packet = b"\x82\xa3pid\x01\xa4type" + bytes([0xA0 | len(text)]) + text
    assert isinstance(heard(packet, FROM_AGENT), InternalError)
    spawn = b"\x82\xa4type\xa5spawn\xa4name" + bytes([0xA0 | len(text)]) + text
    assert isinstance(heard(spawn, TO_SERVER), InternalError)
