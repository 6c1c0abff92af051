# SPDX-License-Identifier: Apache-2.0
"""pyroute2 inside a namespace that is given by a descriptor, with a deadline and with errors of ours.

pyroute2 has no types; what is not typed stays in this file and in those that call `inside`, which see a socket of type
Any. pyroute2 itself can open a socket in another namespace, but forks a process for each and bounds that wait only. In
a thread that is in the namespace already it need not know that there are namespaces, and one deadline covers it all.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from chaos.netns.space import WITHIN, aside, enter, refused

T = TypeVar("T")

# include/uapi/linux/rtnetlink.h: groups as bits for bind(2), types of messages, one attribute
GROUP_LINK = 1 << 0  # RTNLGRP_LINK is 1
GROUP_NSID = 1 << 27  # RTNLGRP_NSID is 28
RTM_DELNSID = 89
NETNSA_NSID = 1

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_GENERAL = 4  # struct rtgenmsg, padded
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type


def inside(
    space: int | None, body: Callable[[Any], T], *, what: str, within: float = WITHIN,
    discard: Callable[[T], object] | None = None,
) -> T:  # fmt: skip
    """`body`, given a pyroute2.IPRoute in the namespace `space` (a descriptor; None is the caller's own).

    `what` finishes the sentence "cannot ...". `discard` is given what came too late. Raises `HostLacks`, or OSError
    with the kernel's errno and words.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    def work() -> T:
        if space is not None:
            enter(space)
        with IPRoute(ext_ack=True) as route:
            route.status["nlm_generator"] = False  # nlm_request reads it, and IPRoute of pyroute2 0.9.7 leaves it out
            return body(route)

    try:
        return aside(work, what=what, within=within, discard=discard)
    except NetlinkError as error:
        raise refused(error.code, what, str(error.args[-1])) from error


def index_of(route: Any, link: str) -> int:
    """Raises OSError: ENODEV if there is no such link."""
    for message in route.get_links():
        if message.get_attr("IFLA_IFNAME") == link:
            return int(message["index"])
    raise OSError(errno.ENODEV, f"there is no link {link!r} in the namespace")


class Listener:
    """The kernel's news of some groups, from the moment this is made. Of the namespace of the calling thread."""

    def __init__(self, groups: int) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, groups))

    def news(self, until: float) -> Iterator[tuple[int, bytes]]:
        """(type, payload) of each message as it comes, until that time of time.monotonic() has passed.

        (0, b"") says that some were lost: whoever relies on them has to look for himself.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                try:
                    yield from _split(self._socket.recv(1 << 16))
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    yield 0, b""

    def close(self) -> None:
        self._socket.close()


def _split(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def departed(kind: int, payload: bytes) -> int | None:
    """The id of the namespace that went, if that is what a message of GROUP_NSID says."""
    if kind != RTM_DELNSID:
        return None
    rest = payload[_GENERAL:]
    while len(rest) >= _ATTRIBUTE.size:
        length, attribute = _ATTRIBUTE.unpack_from(rest)
        if attribute == NETNSA_NSID and length >= _ATTRIBUTE.size + 4:
            return int(struct.unpack_from("=i", rest, _ATTRIBUTE.size)[0])
        rest = rest[max(_ATTRIBUTE.size, (length + 3) & ~3) :]
    return None
