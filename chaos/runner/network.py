# SPDX-License-Identifier: Apache-2.0
"""The network of a run: a namespace for each VMM that takes part in a migration, and a link between each two that hand
a guest over.

It is made before the VMMs, which are put into it before they do anything, and given up when they have ended. Nothing
of it has a name on the host: if the runner is killed, the kernel takes it away with the last of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network

from chaos.errors import HostLacks, Unsupported, UsageError
from chaos.netns import link, pair
from chaos.netns.link import LinkEnd
from chaos.netns.space import WITHIN, Namespace

# TEST-NET-1 of RFC 5737: nobody routes it. A link has four addresses of it.
ADDRESSES = tuple(IPv4Network("192.0.2.0/24").subnets(new_prefix=30))

Route = tuple[str, str]
"""Two VMMs that are linked."""


@dataclass(frozen=True, slots=True)
class VmmInterface:
    """An end of a link, in the namespace of a VMM, with its address."""

    end: LinkEnd
    address: IPv4Interface


@dataclass(frozen=True, slots=True)
class Network:
    """`spaces` are by VMM, `interfaces` by VMM and the VMM at the other end of the link."""

    spaces: dict[str, Namespace] = field(default_factory=dict)
    interfaces: dict[Route, VmmInterface] = field(default_factory=dict)

    @classmethod
    def lay(cls, routes: Collection[Route]) -> Network:
        """Over which packets pass. Of no routes it is empty. Raises `Unsupported`, OSError, `UsageError`."""
        if len(routes) > len(ADDRESSES):
            raise UsageError(
                f"{len(routes)} pairs of VMMs migrate, and there are addresses for {len(ADDRESSES)}",
                remedy="migrate between fewer",
            )
        network = cls()
        with ExitStack() as undo:
            try:
                for vmm in dict.fromkeys(vmm for route in routes for vmm in route):
                    space = network.spaces[vmm] = Namespace.create()
                    undo.callback(space.close)
                for number, (route, subnet) in enumerate(zip(routes, ADDRESSES, strict=False)):
                    network._link(number, route, subnet)
            except HostLacks as lacking:
                raise Unsupported(f"VMMs cannot migrate here: {lacking.message}", remedy=lacking.remedy) from lacking
            undo.pop_all()
        return network

    def _link(self, number: int, route: Route, subnet: IPv4Network) -> None:
        name = f"peer{number}"
        one, other = (LinkEnd(self.spaces[vmm], name) for vmm in route)
        mine, others = (IPv4Interface((host, subnet.prefixlen)) for host in subnet.hosts())
        link.lay(one, other, (mine, others))
        self.interfaces[route] = VmmInterface(one, mine)
        self.interfaces[route[::-1]] = VmmInterface(other, others)

    def space(self, vmm: str) -> Namespace | None:
        """None if the VMM takes part in no migration: then it is where the runner is."""
        return self.spaces.get(vmm)

    def address(self, vmm: str, peer: str) -> str:
        """The address by which `peer` reaches `vmm`."""
        return str(self.interfaces[vmm, peer].address.ip)

    def give_up(self, *, within: float = WITHIN) -> None:
        """Let go of it and see that it goes, its VMMs having ended. Raises `CleanupFailed`."""
        if self.spaces:
            pair.destroy(tuple(self.spaces.values()), within=within)


def between(pairs: Sequence[Route]) -> tuple[Route, ...]:
    """The links that these pairs of VMMs need: one for each two, whoever is named first."""
    return tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
