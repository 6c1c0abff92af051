# SPDX-License-Identifier: Apache-2.0
"""Messages over a stream socket: how two VMMs talk over the network.

A message is a frame: a head that says how long the body is and what its CRC-32 is (32 bits each, network byte order),
and the body, one msgpack value. TCP's own checksum is weak and whoever stands between the two may compute a new one,
and a guest that is given damaged registers is lost; so the frame has one of its own.

Its end is an abrupt one (SO_LINGER of 0), also when the process is killed: an end in good order would be tried for
minutes where the network is gone, and keep the namespace for so long. So what was sent last may be lost, unless the
other end is waited for.

What comes over a network is data. A frame that is too long, damaged or of no known kind is an OSError that says so
(EMSGSIZE, EBADMSG, EPROTO), a wait that passes its deadline a TimeoutError, an end of the stream BrokenPipeError. After
any of these nothing more can be read from it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from errno import EBADMSG, EMSGSIZE, EPIPE, EPROTO, ETIMEDOUT
from typing import Generic, Self, TypeVar, TypeVarTuple

import msgspec

from chaos.errors import InternalError

LIMIT = 1 << 22  # the state of 16 vCPUs is about 200 KiB

_HEAD = struct.Struct("!II")
_ABRUPT = struct.pack("ii", 1, 0)  # struct linger

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Stream(Generic[T]):
    """One end of a connected socket on which values of type T arrive. One thread's.

    `what` finishes the sentences "waited 5 s to ..." and "could not ...". `within` is in seconds, for all of it.
    """

    def __init__(self, connection: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._socket = connection
        self._decoder = decoder
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPT)

    @classmethod
    def connect(cls, address: str, port: int, decoder: msgspec.msgpack.Decoder[T], *, within: float) -> Self:
        """Raises OSError."""
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        what = f"connect to {address} port {port}"
        try:
            _waiting(connection, time.monotonic() + within, what, within, connection.connect, (address, port))
            return cls(connection, decoder)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def accept(cls, listener: socket.socket, decoder: msgspec.msgpack.Decoder[T], *, within: float) -> Self:
        """Raises OSError."""
        until = time.monotonic() + within
        connection, _ = _waiting(listener, until, "be connected to", within, listener.accept)
        return cls(connection, decoder)

    def send(self, message: object, what: str, *, within: float) -> None:
        """Raises OSError."""
        body = msgspec.msgpack.encode(message)
        if len(body) > LIMIT:
            raise InternalError(f"a message of {len(body)} bytes is longer than {LIMIT}")
        left = memoryview(_HEAD.pack(len(body), zlib.crc32(body)) + body)
        until = time.monotonic() + within
        while left:
            left = left[_waiting(self._socket, until, what, within, self._socket.send, left) :]

    def receive(self, what: str, *, within: float) -> T:
        """The next message. Raises OSError."""
        until = time.monotonic() + within
        length, checksum = _HEAD.unpack(self._read(_HEAD.size, until, what, within))
        if length > LIMIT:
            raise OSError(EMSGSIZE, f"could not {what}: it is said to have {length} bytes, more than {LIMIT}")
        body = self._read(length, until, what, within)
        if zlib.crc32(body) != checksum:
            raise OSError(EBADMSG, f"could not {what}: its checksum is wrong, it was damaged on its way")
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise OSError(EPROTO, f"could not {what}: it makes no sense: {error}") from error

    def wait_end(self, what: str, *, within: float) -> None:
        """Wait until the other end has closed. Raises OSError, also if it says something more."""
        try:
            more = _waiting(self._socket, time.monotonic() + within, what, within, self._socket.recv, 1)
        except ConnectionError:
            return
        if more:
            raise OSError(EPROTO, f"could not {what}: it said something more")

    def _read(self, length: int, until: float, what: str, within: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            missing = min(length - len(data), 1 << 16)
            part = _waiting(self._socket, until, what, within, self._socket.recv, missing)
            if not part:
                raise BrokenPipeError(EPIPE, f"could not {what}: the other end is gone")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def _waiting(
    waiter: socket.socket, until: float, what: str, within: float, call: Callable[[*Ts], R], *arguments: *Ts
) -> R:
    """Make a call that may wait on this socket, until then."""
    left = until - time.monotonic()
    late = TimeoutError(ETIMEDOUT, f"waited {within:g} s to {what}")
    if left <= 0:
        raise late
    waiter.settimeout(left)
    try:
        return call(*arguments)
    except TimeoutError as error:
        raise late from error
    except OSError as error:
        number = error.errno or EPROTO
        raise OSError(number, f"could not {what}: {os.strerror(number)}") from error
