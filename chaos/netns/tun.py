# SPDX-License-Identifier: Apache-2.0
"""A way around a link: a device whose packets a process of ours reads and writes (TUN), and a route that leads there.

What the kernel sends to such a device comes out of a descriptor as an IP packet, whole and with its checksums (the
device has no offloads); what is written to the descriptor the kernel receives. There is no Ethernet on it, so nobody
asks for an address, and it makes none of its own. The device goes with the last copy of the descriptor, and the route
with the device: then packets take the link again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from chaos.errors import HostLacks
from chaos.netns.link import LinkEnd, quieten_at
from chaos.netns.netlink import index_of, inside
from chaos.netns.space import WITHIN, Namespace

Address = IPv4Address | IPv6Address

DEVICE = Path("/dev/net/tun")

# include/uapi/linux/if_tun.h, rtnetlink.h
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000  # nothing before the packet
IFF_TUN_EXCL = 0x8000  # a device of its own, not one that is there
SCOPE_LINK = 253  # RT_SCOPE_LINK

_IFREQ = struct.Struct("=16sH22x")


def create(end: LinkEnd, mine: Address, peer: Address, *, within: float = WITHIN) -> int:
    """Make a device of that name, by which all goes that is sent to `peer`, from the address `mine`, and nothing else.
    Its descriptor, which does not block and is the caller's to close. Packets wait until it is read.

    The longest prefix wins, so the route goes before that of a link. Raises `HostLacks` (root, or a kernel without TUN)
    or OSError: EBUSY if the name is taken.
    """

    def make(route: Any) -> int:
        fd = _open(end.link)
        try:
            index = index_of(route, end.link)
            quieten_at(route, index)
            route.link("set", index=index, state="up")
            host = f"{peer}/{peer.max_prefixlen}"
            route.route("add", dst=host, oif=index, prefsrc=str(mine), scope=SCOPE_LINK)
        except BaseException:
            os.close(fd)
            raise
        return fd

    return inside(end.space.fd, make, what=f"make the device {end}", within=within, discard=os.close)


def probe(*, within: float = WITHIN) -> None:
    """Make a device and let it go. Raises `HostLacks` or OSError."""

    def attempt(_: Any) -> None:
        os.close(_open("probe"))

    with Namespace.create() as space:
        inside(space.fd, attempt, what="make a TUN device", within=within)


def _open(name: str) -> int:
    """In the namespace of the calling thread."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise
        raise HostLacks("the kernel has no TUN devices", remedy="modprobe tun, or a kernel with CONFIG_TUN") from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), IFF_TUN | IFF_NO_PI | IFF_TUN_EXCL))
    except BaseException:
        os.close(fd)
        raise
    return fd
