# SPDX-License-Identifier: Apache-2.0
"""The kernels that Debian's archive has, those of them that are here, and those that were built here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chaos.cache import entries
from chaos.cache.entries import CacheEntry, Say
from chaos.errors import UsageError
from chaos.lab.kernel import archive, debian
from chaos.lab.kernel.built import BuiltManifest, read_manifest


@dataclass(frozen=True, slots=True)
class KernelOffer:
    """A kernel of which image and headers can be had, or that is here. `here` is its size in the cache in bytes, None
    if it has to be fetched first; `gone` if the archive has it no more; `built` if it was built here."""

    source: str
    version: str
    here: int | None = None
    gone: bool = False
    built: bool = False

    @property
    def series(self) -> str:
        return ".".join(self.version.split(".")[:2])


def offers(*, say: Say, refresh: bool = False) -> tuple[KernelOffer, ...]:
    """All of them, oldest first. Raises NoKernel if no list of the archive is to be had."""
    if refresh:
        archive.refresh(say=say)
    here = {entry.name.partition("_")[0]: entry for entry in _cached("kernels")}
    there = debian.whole_kernels(say=say)
    found = [KernelOffer(f"debian:{abi}", _version(version), _size(here.get(abi))) for abi, version in there.items()]
    found += [
        KernelOffer(f"debian:{abi}", _version(entry.name.partition("_")[2]), entry.size, gone=True)
        for abi, entry in here.items()
        if abi not in there
    ]
    found += [KernelOffer(made.source, made.version, entry.size, built=True) for entry, made in _built()]
    return tuple(sorted(found, key=lambda offer: (debian.by_number(offer.version), debian.by_number(offer.source))))


def newest(found: Iterable[KernelOffer]) -> tuple[KernelOffer, ...]:
    """Of each series the one that its number means, and what is here."""
    kept: dict[str, KernelOffer] = {}
    every = tuple(found)
    had = (offer for offer in every if not offer.gone and not offer.built)
    for offer in sorted(had, key=lambda offer: debian.own_and_newest(offer.source)):
        kept[offer.series] = offer
    return tuple(offer for offer in every if offer.here is not None or offer in kept.values())


def remove(sources: Iterable[str], *, say: Say) -> entries.Cleaned:
    """Remove these kernels, and the modules that were built for them; a series means the one of it that is here. Raises
    UsageError if one is not here, or several are, and then nothing was removed."""
    fetched = [(f"debian:{entry.name.partition('_')[0]}", entry) for entry in _cached("kernels")]
    here = [*fetched, *((made.source, entry) for entry, made in _built())]
    chosen: list[CacheEntry] = []
    for source in sources:
        mine = [entry for name, entry in here if name in (source, f"debian:{source}")]
        of_series = [(name, entry) for name, entry in fetched if name.startswith(f"{source}.")]
        if not mine and len(of_series) == 1:
            mine = [of_series[0][1]]
        if not mine:
            there = of_series or here
            raise UsageError(
                f"{source} is not here" if not of_series else f"of {source} there are several here",
                remedy=f"{'name one of' if of_series else 'here are'} {', '.join(n for n, _ in there) or 'none'}",
            )
        chosen += mine
    labels = tuple(map(_label, chosen))
    built = [e for e in _cached("modules") if e.name.startswith(labels)]
    return entries.remove(dict.fromkeys((*chosen, *built)), say=say)


def beside() -> tuple[CacheEntry, ...]:
    """What fetching and building kernels left: all that is no kernel that is whole, and no lab."""
    return tuple(
        e for e in entries.entries() if e.kind not in entries.LABS and (e.leftover or e.kind not in entries.KERNELS)
    )


def clean(*, say: Say) -> entries.Cleaned:
    """Remove that. What another process is at work on stays, and is named."""
    return entries.remove(beside(), say=say)


def _label(entry: CacheEntry) -> str:
    """What the names of the modules that were built for it begin with; a fetched kernel has its ABI for itself."""
    made = read_manifest(entry.name) if entry.kind == "built" else None
    return f"{entry.name.partition('_')[0]}_" if made is None else f"{made.release}_{made.identity[:12]}"


def _built() -> Iterator[tuple[CacheEntry, BuiltManifest]]:
    for entry in _cached("built"):
        made = read_manifest(entry.name)
        if made is not None:
            yield entry, made


def _cached(kind: str) -> Iterator[CacheEntry]:
    return (entry for entry in entries.entries() if entry.kind == kind and not entry.leftover)


def _size(entry: CacheEntry | None) -> int | None:
    return None if entry is None else entry.size


def _version(package: str) -> str:
    """x.y.z of a package's version: "6.12.117-1~deb12u1"."""
    found = re.match(r"\d+\.\d+\.\d+", package)
    return found[0] if found else package
