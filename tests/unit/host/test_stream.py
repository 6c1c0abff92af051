# SPDX-License-Identifier: Apache-2.0
"""Frames over a stream socket: what arrives whole is understood, whatever else arrives is an error that says what."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from errno import EBADMSG, ECONNREFUSED, EMSGSIZE, EPIPE, EPROTO, ETIMEDOUT

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.errors import InternalError
from chaos.vmm import stream
from chaos.vmm.messages import SAID, Greeting, LetGo, Received, Said, SentState, Taken
from chaos.vmm.stream import Stream
from tests.unit.host.peers import LOCALHOST, SECONDS
from tests.unit.mutation import mutated

GREETING = Greeting(version=1, vm="old", peer="new")
STATE = SentState(vcpus=({"regs": bytes(range(256)), "xsave": bytes(4096)},) * 3)


class Ends:
    """A stream, and the bare socket at its other end."""

    def __init__(self) -> None:
        listener = socket.create_server((LOCALHOST, 0))
        self.bare = socket.create_connection(listener.getsockname())
        self.stream: Stream[Said] = Stream.accept(listener, SAID, within=SECONDS)
        listener.close()

    def close(self) -> None:
        self.bare.close()
        self.stream.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def frame(body: bytes) -> bytes:
    return struct.pack("!II", len(body), zlib.crc32(body)) + body


def heard(data: bytes) -> Said | OSError:
    """What a stream makes of these bytes, after which the other end is closed."""
    ends = Ends()

    def send() -> None:
        with contextlib.suppress(ConnectionError):  # nobody wants to hear the rest
            ends.bare.sendall(data)
        ends.bare.close()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return ends.stream.receive("hear", within=SECONDS)
    except OSError as error:
        return error
    finally:
        ends.stream.close()
        sender.join()


def test_messages_arrive_in_their_order_however_they_are_cut(ends: Ends) -> None:
    data = b"".join(frame(msgspec.msgpack.encode(message)) for message in (GREETING, STATE, Received()))

    def send() -> None:
        for at in range(0, len(data), 701):
            ends.bare.sendall(data[at : at + 701])

    sender = threading.Thread(target=send)
    sender.start()
    assert [ends.stream.receive("hear", within=SECONDS) for _ in range(3)] == [GREETING, STATE, Received()]
    sender.join()


def test_what_is_sent_is_a_frame(ends: Ends) -> None:
    ends.stream.send(GREETING, "greet", within=SECONDS)
    expected = frame(msgspec.msgpack.encode(GREETING))
    assert ends.bare.recv(1000) == expected


def test_what_is_larger_than_the_sockets_hold_arrives_while_it_is_sent(ends: Ends) -> None:
    large = SentState(vcpus=({"xsave": bytes(stream.LIMIT - 100)},))
    other: Stream[Said] = Stream(ends.bare, SAID)
    sender = threading.Thread(target=lambda: other.send(large, "send", within=SECONDS))
    sender.start()
    assert ends.stream.receive("hear", within=SECONDS) == large
    sender.join()


def test_what_is_too_long_is_not_sent(ends: Ends) -> None:
    with pytest.raises(InternalError, match="longer than"):
        ends.stream.send(SentState(vcpus=({"xsave": bytes(stream.LIMIT)},)), "send", within=SECONDS)


def test_a_wait_ends_and_says_what_it_was_for(ends: Ends) -> None:
    ends.bare.sendall(frame(b"whole")[:-1])
    with pytest.raises(TimeoutError, match=r"waited 0\.05 s to hear of it") as caught:
        ends.stream.receive("hear of it", within=0.05)
    assert caught.value.errno == ETIMEDOUT


def test_one_deadline_for_all_of_a_frame_that_comes_in_drops(ends: Ends) -> None:
    stop = threading.Event()

    def drip() -> None:
        for byte in frame(bytes(10_000)):
            if stop.wait(0.01):
                return
            ends.bare.sendall(bytes([byte]))

    sender = threading.Thread(target=drip)
    sender.start()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ends.stream.receive("hear", within=0.1)
    stop.set()
    sender.join()
    assert time.monotonic() - began < SECONDS  # the drops would take a hundred seconds


def test_nobody_reads_what_is_sent(ends: Ends) -> None:
    large = SentState(vcpus=({"xsave": bytes(stream.LIMIT - 100)},))
    with pytest.raises(TimeoutError, match=r"waited 0\.1 s to send it"):
        for _ in range(100):
            ends.stream.send(large, "send it", within=0.1)


def test_nobody_is_there_to_connect_to() -> None:
    with socket.create_server((LOCALHOST, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match=f"could not connect to {LOCALHOST} port {port}: Connection refused") as caught:
        Stream.connect(LOCALHOST, port, SAID, within=SECONDS)
    assert caught.value.errno == ECONNREFUSED


def test_nobody_connects() -> None:
    with (
        socket.create_server((LOCALHOST, 0)) as listener,
        pytest.raises(TimeoutError, match=r"waited 0\.05 s to be connected to"),
    ):
        Stream.accept(listener, SAID, within=0.05)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"", EPIPE),
        (b"\0\0\0", EPIPE),
        (frame(b"whole")[:-1], EPIPE),
        (struct.pack("!II", stream.LIMIT + 1, 0), EMSGSIZE),
        (frame(b""), EPROTO),
        (frame(msgspec.msgpack.encode({"type": "nonsense"})), EPROTO),
        (frame(msgspec.msgpack.encode({"type": "state", "vcpus": [1]})), EPROTO),
        (frame(msgspec.msgpack.encode([GREETING])), EPROTO),
        (frame(b"\x91" * 5000 + b"\x90"), EPROTO),  # nested deeper than anybody can follow
        (frame(b"\x82\xa4type\xa5state\xa5vcpus\xdd\xff\xff\xff\xff"), EPROTO),  # claims four billion vCPUs
        (frame(b"\x82\xa4type\xa8greeting\xa2vm\xa1\xff"), EPROTO),  # no UTF-8
    ],
)
def test_what_is_wrong_is_told(data: bytes, number: int) -> None:
    error = heard(data)
    assert isinstance(error, OSError) and error.errno == number
    assert "hear" in str(error)


@given(st.integers(min_value=0), st.sampled_from([GREETING, STATE, Received()]))
def test_one_bit_that_was_flipped_is_always_noticed(bit: int, message: Said) -> None:
    data = bytearray(frame(msgspec.msgpack.encode(message)))
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    error = heard(bytes(data))
    assert isinstance(error, OSError) and error.errno in (EBADMSG, EMSGSIZE, EPIPE)


@given(st.binary(max_size=200))
def test_any_body_is_a_message_or_an_error(body: bytes) -> None:
    got = heard(frame(body))
    assert isinstance(got, Said) or (isinstance(got, OSError) and got.errno == EPROTO)


def test_a_million_random_bytes() -> None:
    chance = random.Random(3)
    for _ in range(100):
        got = heard(chance.randbytes(10_000))
        assert isinstance(got, OSError) and got.errno in (EBADMSG, EMSGSIZE, EPIPE, EPROTO)


def test_a_million_random_bytes_in_good_frames() -> None:
    """Messages with bytes changed, as somebody would send them who computes the checksum anew."""
    chance = random.Random(6)
    vcpu = {"regs": chance.randbytes(144), "sregs": chance.randbytes(312), "fpu": chance.randbytes(416)}
    said = (Greeting(version=1, vm="old", peer="new"), SentState(vcpus=(vcpu,) * 4), Received(), Taken(), LetGo())
    bodies = [msgspec.msgpack.encode(message) for message in said]
    fed = 0
    while fed < 1_000_000:
        body = mutated(chance.choice(bodies), chance)
        got = heard(frame(body))
        assert isinstance(got, Said) or (isinstance(got, OSError) and got.errno == EPROTO)
        fed += len(body)


def test_the_other_end_is_waited_for(ends: Ends) -> None:
    with pytest.raises(TimeoutError, match=r"waited 0\.05 s to see it go"):
        ends.stream.wait_end("see it go", within=0.05)
    ends.bare.sendall(b"more")
    with pytest.raises(OSError, match="could not see it go: it said something more"):
        ends.stream.wait_end("see it go", within=SECONDS)
    ends.bare.close()


@pytest.mark.parametrize("abrupt", [False, True])
def test_an_end_is_an_end_however_abrupt(ends: Ends, abrupt: bool) -> None:
    if abrupt:
        ends.bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.bare.close()
    ends.stream.wait_end("see it go", within=SECONDS)
