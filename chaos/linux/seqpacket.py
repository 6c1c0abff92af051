# SPDX-License-Identifier: Apache-2.0
"""Messages with file descriptors over a Unix seqpacket socket.

One message is one packet: a msgpack value and the descriptors that go with it, which arrive together or not at all.
"""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec

from chaos.errors import InternalError
from chaos.linux.fd import OwnedFd

MESSAGE_LIMIT = 1 << 16
FDS_LIMIT = 16

T = TypeVar("T")


class FdSet:
    """Descriptors that came with a message. What is not stolen is closed."""

    __slots__ = ("_fds",)

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._fds = [OwnedFd(number) for number in numbers]

    def __len__(self) -> int:
        return sum(fd.is_open for fd in self._fds)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of those that were not stolen, in order."""
        return tuple(fd.number for fd in self._fds if fd.is_open)

    def steal(self, index: int = 0) -> OwnedFd:
        """Take one out; the caller owns it. Raises `InternalError` if it did not come or was taken already."""
        if index >= len(self._fds):
            raise InternalError(f"a message was to bring descriptor {index}, it brought {len(self._fds)}")
        return OwnedFd(self._fds[index].steal())

    def close(self) -> None:
        for fd in self._fds:
            fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Ended(Exception):
    """The other side closed its end, or died."""


class Channel(Generic[T]):
    """One end of a socket on which values of type T arrive.

    Sending is safe from several threads. Receiving is one thread's.
    """

    def __init__(self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._socket = connection
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()

    @classmethod
    def adopt(cls, fd: OwnedFd, decoder: msgspec.msgpack.Decoder[T]) -> Self:
        """Over a socket that arrived as a descriptor."""
        return cls(socket.socket(fileno=fd.steal()), decoder)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def send(self, message: object, fds: Iterable[int] = ()) -> None:
        """Send copies of `fds`; the originals stay their owner's. Raises `Ended`."""
        data = self._encoder.encode(message)
        if len(data) > MESSAGE_LIMIT:
            raise InternalError(f"a message of {len(data)} bytes is longer than {MESSAGE_LIMIT}")
        try:
            with self._sending:
                socket.send_fds(self._socket, [data], list(fds))
        except (BrokenPipeError, ConnectionError) as error:
            raise Ended from error

    def receive(self, within: float | None = None) -> tuple[T, FdSet]:
        """The next message. Raises `Ended`, or TimeoutError after `within` seconds (None: wait for ever)."""
        self._socket.settimeout(within)
        space = socket.CMSG_SPACE(FDS_LIMIT * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(MESSAGE_LIMIT, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as error:
            raise Ended from error
        finally:
            self._socket.settimeout(None)
        fds = FdSet(_descriptors(ancillary))
        if not data:
            fds.close()
            raise Ended
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            fds.close()
            raise InternalError("a message was cut off on its way")
        try:
            return self._decoder.decode(data), fds
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            fds.close()
            raise InternalError(f"a message could not be understood: {error}") from error

    def close(self) -> None:
        self._socket.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    numbers = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return numbers.tolist()


def pair() -> tuple[OwnedFd, OwnedFd]:
    """Two connected ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return OwnedFd(ours.detach()), OwnedFd(theirs.detach())


def memory_file(name: str, size: int) -> OwnedFd:
    """Anonymous memory of `size` bytes that several processes can map."""
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC))
    os.truncate(fd.number, size)
    return fd
