# SPDX-License-Identifier: Apache-2.0
"""Messages with descriptors over a socket."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from chaos.errors import InternalError
from chaos.vmm import wire
from chaos.vmm.messages import REQUESTS, Create, Request
from chaos.vmm.wire import Channel, Ended, FdSet, memory_file, pair


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
        one.send({"regs": bytes(wire.MESSAGE_LIMIT)})
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
