# SPDX-License-Identifier: Apache-2.0
"""The kernels that Debian's archive has, and those of them that are here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from chaos.cache import entries
from chaos.cache.entries import CacheEntry, Say
from chaos.errors import UsageError
from chaos.lab.kernel import archive, debian


@dataclass(frozen=True, slots=True)
class KernelOffer:
    """A kernel of which image and headers can be had, or that is here. `here` is its size in the cache in bytes, None
    if it has to be fetched first; `gone` if the archive has it no more."""

    abi: str
    version: str
    here: int | None = None
    gone: bool = False

    @property
    def source(self) -> str:
        return f"debian:{self.abi}"

    @property
    def series(self) -> str:
        return ".".join(self.version.split(".")[:2])


def offers(*, say: Say, refresh: bool = False) -> tuple[KernelOffer, ...]:
    """All of them, oldest first. Raises NoKernel if no list of the archive is to be had."""
    if refresh:
        archive.refresh(say=say)
    here = {entry.name.partition("_")[0]: entry for entry in _cached()}
    there = debian.whole_kernels(say=say)
    found = [KernelOffer(abi, _version(version), _size(here.get(abi))) for abi, version in there.items()]
    found += [
        KernelOffer(abi, _version(entry.name.partition("_")[2]), entry.size, gone=True)
        for abi, entry in here.items()
        if abi not in there
    ]
    return tuple(sorted(found, key=lambda offer: debian.by_number(offer.abi)))


def newest(found: Iterable[KernelOffer]) -> tuple[KernelOffer, ...]:
    """Of each series the one that its number means, and what is here."""
    kept: dict[str, KernelOffer] = {}
    every = tuple(found)
    for offer in sorted((o for o in every if not o.gone), key=lambda offer: debian.own_and_newest(offer.abi)):
        kept[offer.series] = offer
    return tuple(offer for offer in every if offer.here is not None or offer in kept.values())


def remove(sources: Iterable[str], *, say: Say) -> entries.Cleaned:
    """Remove these kernels, and the modules that were built for them. Raises UsageError if one is not here, and then
    nothing was removed."""
    cached = tuple(_cached())
    chosen: list[CacheEntry] = []
    for source in sources:
        abi = source.removeprefix("debian:")
        mine = [entry for entry in cached if entry.name.startswith(f"{abi}_")]
        if not mine:
            names = ", ".join(f"debian:{entry.name.partition('_')[0]}" for entry in cached)
            raise UsageError(f"{source} is not here", remedy=f"here are {names or 'none'}")
        chosen += mine
    abis = tuple(f"{entry.name.partition('_')[0]}_" for entry in chosen)
    built = [e for e in entries.entries() if e.kind == "modules" and e.name.startswith(abis)]
    doomed = {entry.name for entry in (*chosen, *built)}
    return entries.clean(kinds={"kernels", "modules"}, names=doomed, say=say)


def _cached() -> Iterable[CacheEntry]:
    return (entry for entry in entries.entries() if entry.kind == "kernels" and not entry.leftover)


def _size(entry: CacheEntry | None) -> int | None:
    return None if entry is None else entry.size


def _version(package: str) -> str:
    """x.y.z of a package's version: "6.12.117-1~deb12u1"."""
    found = re.match(r"\d+\.\d+\.\d+", package)
    return found[0] if found else package
