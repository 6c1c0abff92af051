# SPDX-License-Identifier: Apache-2.0
"""Two namespaces joined by a link, made and given up as one."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Sequence
from ipaddress import IPv4Interface
from types import TracebackType
from typing import Any, Self

from chaos.errors import CleanupFailed, HostLacks
from chaos.netns.link import Interface, LinkEnd, lay, set_up
from chaos.netns.netlink import GROUP_NSID, Listener, departed, inside
from chaos.netns.space import WITHIN, Namespace, residents

# TEST-NET-1 of RFC 5737: nobody routes it, and in namespaces of their own it meets nobody.
ADDRESSES: tuple[Interface, Interface] = (IPv4Interface("192.0.2.1/30"), IPv4Interface("192.0.2.2/30"))
NAMES = ("left", "right")


class Pair:
    """Two namespaces that reach each other over one link and nobody else. Loopback is up in both.

    A process that is about to be a VMM goes into one by `enter(pair.left.space.fd)`. The kernel takes all of it away
    when the last process in it is gone and this object has let go, or has died.
    """

    __slots__ = ("addresses", "left", "right")

    def __init__(self, left: LinkEnd, right: LinkEnd, addresses: tuple[Interface, Interface]) -> None:
        self.left = left
        self.right = right
        self.addresses = addresses

    @classmethod
    def create(
        cls,
        *,
        names: tuple[str, str] = NAMES,
        addresses: tuple[Interface, Interface] = ADDRESSES,
        within: float = WITHIN,
    ) -> Pair:
        """A new pair, over which packets pass. `within` seconds is for each step. Raises `HostLacks` or OSError."""
        with contextlib.ExitStack() as undo:
            ends = []
            for name in names:
                space = Namespace.create(within=within)
                undo.callback(space.close)
                ends.append(LinkEnd(space, name))
            left, right = ends
            for end in ends:
                set_up(LinkEnd(end.space, "lo"), True, within=within)
            lay(left, right, addresses, within=within)
            undo.pop_all()
        return cls(left, right, addresses)

    @property
    def ends(self) -> tuple[LinkEnd, LinkEnd]:
        return self.left, self.right

    def close(self) -> None:
        """Let go of it. What is still in it keeps it."""
        for end in self.ends:
            end.space.close()

    def destroy(self, *, within: float = WITHIN) -> None:
        """Let go of it, and see that it goes. Raises `CleanupFailed` and says who keeps it, if that is a process."""
        destroy([end.space for end in self.ends], within=within)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def destroy(spaces: Sequence[Namespace], *, within: float = WITHIN) -> None:
    """Let go of namespaces, and wait until nothing keeps them any more and the kernel has begun to take them down.

    Each gets an id in the caller's namespace first (unless it has one), since the kernel tells the end of a namespace
    by its id. The id goes with the namespace. Raises `CleanupFailed` after `within` seconds.
    """
    inodes = [space.inode for space in spaces]

    def wait(route: Any) -> set[int]:
        until = time.monotonic() + within
        with contextlib.closing(Listener(GROUP_NSID)) as listener:
            left = {_identify(route, space.fd) for space in spaces}
            for space in spaces:
                space.close()
            left = {number for number in left if _is_there(route, number)}
            news = listener.news(until)
            while left and (message := next(news, None)) is not None:
                left.discard(departed(*message))  # by its news and not by a look: ids are given out again
                if message == (0, b""):
                    left = {number for number in left if _is_there(route, number)}
            return left

    try:
        left = inside(None, wait, what="give up network namespaces", within=within + WITHIN)
    except (OSError, HostLacks) as error:
        raise CleanupFailed(
            f"network namespaces may be left: {error}", remedy="they go with their processes"
        ) from error
    finally:
        for space in spaces:
            space.close()
    if left:
        pids = sorted({pid for inode in inodes for pid in residents(inode)})
        who = f"processes {', '.join(map(str, pids))} are" if pids else "a descriptor or a socket somewhere is"
        raise CleanupFailed(
            f"{len(left)} of {len(spaces)} network namespaces did not go within {within:g} s: {who} still in it",
            remedy="end those processes; a namespace goes with the last one",
        )


def _identify(route: Any, fd: int) -> int:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route.set_netnsid(fd=fd)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
    return int(route.get_netnsid(fd=fd)["nsid"])


def _is_there(route: Any, number: int) -> bool:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route.get_netnsid(nsid=number)
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise
        return False
    return True
