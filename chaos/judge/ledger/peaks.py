# SPDX-License-Identifier: Apache-2.0
"""How high each counter of the misc controller can have been since its cgroup was made: what misc.peak may read.

A charge that is taken ahead counts (a move charges the destination before it uncharges the source, so that a shared
ancestor has one more for an instant), and so does one that was refused further up: the levels below had it until then.
Operations that are under way at the same time add up. The run's own cgroup is older than the first observation: the
host was filled to capacity from below it before. What it reads there is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chaos.history.reading import KEYS, argument, charged, levels, names
from chaos.history.records import Invoke, Observation
from chaos.judge.ledger.world import World

ChargePlace = tuple[str, str]


@dataclass(slots=True)
class Peaks:
    """`highest` by (cgroup, key), of all worlds that were possible at any moment. `before` is what the cgroups of the
    first observation had read until then."""

    highest: dict[ChargePlace, int] = field(default_factory=dict)
    before: dict[ChargePlace, int] | None = None

    def rise(self, worlds: Iterable[World], loops: Iterable[Invoke]) -> None:
        """These worlds are possible now, with these loops of moves under way."""
        under_way = tuple(loops)
        for world in worlds:
            total = dict(world.charges)
            for loop in under_way:
                for place in _ahead(world, loop):
                    total[place] = total.get(place, 0) + 1
            for place, value in total.items():
                self.highest[place] = max(value, self.highest.get(place, value))

    def renew(self, change: Invoke) -> None:
        """After this operation the files of some cgroups are new ones."""
        for place in [place for place in self.highest if renews(change, place[0])]:
            del self.highest[place]
        if self.before:
            self.before = {place: value for place, value in self.before.items() if not renews(change, place[0])}

    def of(self, record: Observation, cgroup: str, key: str) -> int:
        """The most that misc.peak may read in this observation."""
        if self.before is None:
            self.before = peaks_of(record)
        return max(self.highest.get((cgroup, key), 0), self.before.get((cgroup, key), 0))


def peaks_of(record: Observation) -> dict[ChargePlace, int]:
    """misc.peak of (cgroup, key); nothing before 6.12, which has no such file."""
    return {
        (cgroup, key): charged(files["peak"].get(key, 0))
        for cgroup, files in record.misc.items()
        if "peak" in files
        for key in KEYS
    }


def renews(change: Invoke, cgroup: str) -> bool:
    """Whether after this operation on cgroups the files of the cgroup are new ones: no limit, nothing counted."""
    name = argument(change, "cgroup")
    match change.f:
        case "add_cgroup" | "remove_cgroup":
            return name in levels(cgroup)
        case "disable_misc" | "enable_misc":
            return name in levels(cgroup)[:-1]
    return False


def _ahead(world: World, loop: Invoke) -> Iterable[ChargePlace]:
    """The levels that a move of the loop may have charged ahead: of one at a time, since it marks its VMs."""
    payer = world.home(loop.agent)
    contexts = [world.context(source) for source in names(loop, "sources")]
    keys = {context.key for context in contexts if context is not None and context.payer != payer}
    return [(level, key) for key in keys for level in levels(payer)] if payer is not None else []
