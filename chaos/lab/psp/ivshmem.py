# SPDX-License-Identifier: Apache-2.0
"""The server's side of QEMU's ivshmem protocol, as much as one device and one peer need.

QEMU's `docs/specs/ivshmem-spec.rst`, "Client-Server protocol": every message is a little-endian 64-bit number, some
with one file descriptor beside it. First the protocol's version (0), then the peer's id, then -1 with the shared
memory; after that an id with an eventfd each time a peer gains a vector. The first peer told its own id so often is
how QEMU learns which eventfds are its own interrupts: writing to them raises the device's MSI-X vectors.
"""

from __future__ import annotations

import os
import socket
from struct import pack

from chaos.lab.psp.numbers import VECTORS

PROTOCOL_VERSION = 0
PEER = 0
SHARED_MEMORY = -1


def greet(connection: socket.socket, memory_fd: int) -> tuple[int, ...]:
    """Send all of it on `connection` (a stream), whose other end QEMU has or will get.

    Returns VECTORS eventfds, owned by the caller; adding 1 to the first raises the PSP's interrupt. Does not wait: the
    few bytes fit into any socket's buffer.
    """
    vectors = tuple(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(VECTORS))
    connection.sendall(pack("<q", PROTOCOL_VERSION))
    connection.sendall(pack("<q", PEER))
    socket.send_fds(connection, [pack("<q", SHARED_MEMORY)], [memory_fd])
    for vector in vectors:
        socket.send_fds(connection, [pack("<q", PEER)], [vector])
    return vectors
