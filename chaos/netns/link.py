# SPDX-License-Identifier: Apache-2.0
"""Links between namespaces: veth pairs, their addresses, up and down, and what is there.

A veth pair is quiet: what a qdisc on it counts is what somebody sent through it, and nothing else. It gets no IPv6
address of its own making, and so sends no router solicitations or listener reports. And nobody on it asks for an
address, by ARP or by neighbour discovery: a neighbour that has not been heard of for a while is asked again at any
time, and a fault that met only such a question would seem to have taken effect. Without these, the kernel sends to its
own hardware address (arp_constructor in net/ipv4/arp.c, ndisc_constructor), so both ends have the same one. Unlike
permanent neighbour entries, that outlives an end that goes down.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any

from chaos.errors import HostLacks
from chaos.netns.netlink import GROUP_LINK, Listener, index_of, inside
from chaos.netns.space import WITHIN, Namespace

Interface = IPv4Interface | IPv6Interface

# include/uapi/linux: if.h, if_addr.h, if_link.h
IFF_UP = 1
OPER_UP = "UP"  # IF_OPER_UP, as pyroute2 spells it
IFA_F_NODAD = 2
IN6_ADDR_GEN_MODE_NONE = 1

HARDWARE = "02:5e:c0:00:00:01"  # of both ends of every pair; locally administered


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link, by its name in a namespace. The namespace stays its owner's."""

    space: Namespace
    link: str

    def __str__(self) -> str:
        return self.link


@dataclass(frozen=True, slots=True)
class Link:
    """What the kernel says about a link.

    `carrier`: the other end is up too. `running`: the kernel's own bookkeeping has caught up with that, see
    `wait_running`. `kind` is "veth" or the like, "" for what was not made by anybody; `qdisc` that of its root. `sent`
    and `received` count packets.
    """

    name: str
    index: int
    kind: str
    up: bool
    carrier: bool
    running: bool
    qdisc: str
    addresses: tuple[str, ...]
    sent: int
    received: int


def connect(left: LinkEnd, right: LinkEnd, *, within: float = WITHIN) -> None:
    """Make a veth pair, down and without addresses. Undo: `remove` one end, or let one of the namespaces go.

    Raises `HostLacks` (root, or a kernel without veth) or OSError: EEXIST if a name is taken, EINVAL if it is no name.
    """
    _make(left, right, lambda route: _add(route, left, right), within)
    try:
        for end in (left, right):
            quieten(end, within=within)
    except BaseException:
        with contextlib.suppress(OSError, HostLacks):  # the first error is the one to tell
            remove(left, within=within)
        raise


def lay(left: LinkEnd, right: LinkEnd, addresses: tuple[Interface, Interface], *, within: float = WITHIN) -> None:
    """Make a veth pair with addresses, over which packets pass when this returns. Undo and errors as of `connect`.

    Each namespace is gone into once, which is most of what this takes. Where it fails a part of it may be left.
    """
    mine, others = addresses

    def here(route: Any) -> None:
        _add(route, left, right)
        _ready(route, left, mine)

    _make(left, right, here, within)
    inside(right.space.fd, lambda route: _ready(route, right, others), what=f"set up {right}", within=within)
    wait_running(left, within=within)


def _make(left: LinkEnd, right: LinkEnd, body: Callable[[Any], None], within: float) -> None:
    try:
        inside(left.space.fd, body, what=f"make a veth pair {left}, {right}", within=within)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise HostLacks("the kernel has no veth", remedy="modprobe veth, or a kernel with CONFIG_VETH") from error


def _add(route: Any, left: LinkEnd, right: LinkEnd) -> None:
    peer = {"ifname": right.link, "net_ns_fd": right.space.fd, "address": HARDWARE}
    route.link("add", ifname=left.link, kind="veth", address=HARDWARE, peer=peer)


def _ready(route: Any, end: LinkEnd, address: Interface) -> None:
    index = index_of(route, end.link)
    quieten_at(route, index)
    _assign(route, index, address)
    route.link("set", index=index, state="up")


def quieten(end: LinkEnd, *, within: float = WITHIN) -> None:
    """Let the link send nothing of its own accord; before it is up. Raises `HostLacks` or OSError."""
    inside(
        end.space.fd,
        lambda route: quieten_at(route, index_of(route, end.link)),
        what=f"keep {end} quiet",
        within=within,
    )


def quieten_at(route: Any, index: int) -> None:
    """`quieten`, for who is inside a namespace already."""
    from pyroute2.netlink.exceptions import NetlinkError

    route.link("set", index=index, arp=False)
    mode = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]})]}
    try:
        route.link("set", index=index, IFLA_AF_SPEC=mode)
    except NetlinkError as error:
        if error.code != errno.EAFNOSUPPORT:  # a kernel without IPv6 is quiet anyway
            raise


def remove(end: LinkEnd, *, within: float = WITHIN) -> None:
    """Remove a link, and with it the other end of a pair; nothing to do if it is gone. Raises `HostLacks`, OSError."""

    def delete(route: Any) -> None:
        route.link("del", index=index_of(route, end.link))

    try:
        inside(end.space.fd, delete, what=f"remove the link {end}", within=within)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def _assign(route: Any, index: int, address: Interface) -> None:
    flags = IFA_F_NODAD if address.version == 6 else 0
    route.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, flags=flags)


def set_up(end: LinkEnd, up: bool, *, within: float = WITHIN) -> None:
    """Set a link up or down. While one end is down, no packet passes either way. Raises `HostLacks` or OSError."""

    def change(route: Any) -> None:
        route.link("set", index=index_of(route, end.link), state="up" if up else "down")

    inside(end.space.fd, change, what=f"set {end} {'up' if up else 'down'}", within=within)


def wait_running(end: LinkEnd, *, within: float = WITHIN) -> None:
    """Wait until packets can leave by an end that was up before the other one was.

    The end that comes up last passes packets at once. The one that was up before is told by the kernel a moment later
    (net/core/link_watch.c), and what it sends until then is dropped. For the last one `running` is of no account and
    may come a second later.

    Raises TimeoutError, `HostLacks` or OSError.
    """

    def wait(route: Any) -> None:
        until = time.monotonic() + within
        with contextlib.closing(Listener(GROUP_LINK)) as listener:  # before looking, so that nothing is missed
            if _one(route, end.link).running:
                return
            for _ in listener.news(until):
                if _one(route, end.link).running:
                    return
        raise TimeoutError(errno.ETIMEDOUT, f"waited {within:g} s for {end} to be running: is the other end up?")

    inside(end.space.fd, wait, what=f"wait for {end} to be running", within=within + WITHIN)


def look(end: LinkEnd, *, within: float = WITHIN) -> Link:
    """What the kernel says about a link. Raises `HostLacks` or OSError: ENODEV if it is gone."""
    return inside(end.space.fd, lambda route: _one(route, end.link), what=f"look at {end}", within=within)


def links(space: Namespace, *, within: float = WITHIN) -> tuple[Link, ...]:
    """All links of a namespace. Raises `HostLacks` or OSError."""
    return inside(space.fd, lambda route: tuple(_all(route)), what="list links", within=within)


def _one(route: Any, name: str) -> Link:
    for link in _all(route):
        if link.name == name:
            return link
    raise OSError(errno.ENODEV, f"there is no link {name!r} in the namespace")


def _all(route: Any) -> Iterator[Link]:
    addresses: dict[int, list[str]] = {}
    for message in route.get_addr():
        address = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
        addresses.setdefault(int(message["index"]), []).append(address)
    for message in route.get_links():
        index = int(message["index"])
        info = message.get_attr("IFLA_LINKINFO")
        carrier = bool(message.get_attr("IFLA_CARRIER"))
        counters = message.get_attr("IFLA_STATS64") or {}
        yield Link(
            name=str(message.get_attr("IFLA_IFNAME")),
            index=index,
            kind=str(info.get_attr("IFLA_INFO_KIND") or "") if info is not None else "",
            up=bool(message["flags"] & IFF_UP),
            carrier=carrier,
            running=carrier and message.get_attr("IFLA_OPERSTATE") == OPER_UP,  # the latter lags in both directions
            qdisc=str(message.get_attr("IFLA_QDISC") or ""),
            addresses=tuple(addresses.get(index, ())),
            sent=int(counters.get("tx_packets", 0)),
            received=int(counters.get("rx_packets", 0)),
        )
