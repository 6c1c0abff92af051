# SPDX-License-Identifier: Apache-2.0
"""What the oracle knows: a world (`chaos.judge.ledger.world`), the cgroups with their limits, the ASIDs, and the
firmware.

Cgroups go by their path below the run's own, which is ".". One without the misc controller shares the counters of the
nearest above it that has it (`World.payer`). A cgroup that was removed while something was charged to it lives on under
a name that no living cgroup has, so that its ancestors go on counting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from errno import EBUSY, EINVAL
from typing import Literal

from chaos.history.reading import levels
from chaos.judge.ledger.world import World
from chaos.judge.oracle.versions import Rules

ES = "sev_es"

Psp = Literal["well", "stalled", "dead"]


@dataclass(frozen=True, slots=True, order=True)
class OracleAnswer:
    """How an operation ends: `errno`, 0 for success. `firmware` if a status of the firmware's comes with it, `status`
    which, 0 for any.

    `at` is the cgroup whose limit it was, which counts an event there; "" if it was none of ours. `full` if that limit
    is no misc.max but the host's capacity, all of which is taken below it. `open` if the contract does not say that it
    may be answered, but nothing against it either.
    """

    errno: int = 0
    firmware: bool = False
    at: str = ""
    full: bool = False
    status: int = 0
    open: bool = False


OK = OracleAnswer()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reason to refuse. One that is not `sure` depends on what nobody recorded: both ways are allowed."""

    answer: OracleAnswer
    sure: bool = True


def sure(errno: int, *, when: bool) -> Refusal | None:
    """A check's answer, when it applies."""
    return Refusal(OracleAnswer(errno)) if when else None


def maybe(errno: int, *, when: bool, firmware: bool = False, left_open: bool = False) -> Refusal | None:
    """The same of one that nobody can be sure of."""
    return Refusal(OracleAnswer(errno, firmware, open=left_open), sure=False) if when else None


@dataclass(frozen=True, slots=True)
class State:
    """`capacity` is how many contexts of each key the host can have, `foreign` how many of them are not this run's.
    `limits` are (cgroup, key, misc.max), without those that are "max". `blocked` are the charges that were refused, by
    the cgroup whose limit it was, in order. The firmware is `stalled` once it stops answering, and `dead` once the
    driver has noticed; `flushes` unless it fails a DF_FLUSH, and `obeys` if it is known to do what it must: then it
    refuses nothing but what its own state machine makes it refuse, with the status of that. `marked` are moves under
    way that are known to have marked both their VMs as being migrated, `dying` the sources of moves that were under
    way, `half` creations of vCPUs that are known to be half done. `memlock` are the processes that were given a limit
    to what they may lock, in bytes. `storage` is what kept the host from writing the firmware's state down, if
    anything did. `flags_free` to be told of reasons other than that another move or mirror holds a
    VM's migration flag."""

    rules: Rules
    world: World = field(default_factory=World)
    cgroups: frozenset[str] = frozenset({"."})
    capacity: frozenset[tuple[str, int]] = frozenset()
    foreign: frozenset[tuple[str, int]] = frozenset()
    limits: frozenset[tuple[str, str, int]] = frozenset()
    blocked: tuple[tuple[str, str], ...] = ()
    psp: Psp = "well"
    flushes: bool = True
    obeys: bool = False
    marked: frozenset[int] = frozenset()
    dying: frozenset[str] = frozenset()
    half: frozenset[int] = frozenset()
    memlock: frozenset[tuple[str, int]] = frozenset()
    storage: frozenset[str] = frozenset()
    flags_free: bool = False

    def capacity_of(self, key: str) -> int:
        return _of(self.capacity, key)

    def children(self, cgroup: str) -> frozenset[str]:
        """The cgroups right below it."""
        return frozenset(name for name in self.cgroups if levels(name)[-2:-1] == (cgroup,))

    def limit(self, cgroup: str, key: str) -> int | None:
        """misc.max, None for "max"."""
        return next((limit for name, of, limit in self.limits if (name, of) == (cgroup, key)), None)


def charges(state: State) -> Mapping[tuple[str, str], int]:
    """What misc.current of (cgroup, key) must read; 0 where nothing is named."""
    return state.world.charges


def events(state: State) -> Mapping[tuple[str, str], int]:
    """What misc.events of (cgroup, key) must read: refusals for its own limit and for those below it."""
    total: Counter[tuple[str, str]] = Counter()
    for cgroup, key in state.blocked:
        total.update((level, key) for level in levels(cgroup))
    return total


def charge(state: State, cgroup: str, key: str) -> OracleAnswer:
    """The answer to one more charge: `OK`, or the first limit from the cgroup upwards that is in the way.

    Every level is compared with its own misc.max and with the host's capacity (misc_cg_try_charge()). The host's own
    level has no events to count.
    """
    capacity = state.capacity_of(key)
    if capacity == 0:
        return OracleAnswer(EINVAL)
    used = state.world.charges
    for level in reversed(levels(cgroup)):
        limit = state.limit(level, key)
        if used[level, key] + 1 > min(capacity, capacity if limit is None else limit):
            return OracleAnswer(EBUSY, at=level, full=limit is None or limit >= capacity)
    return OK if used[".", key] + _of(state.foreign, key) + 1 <= capacity else OracleAnswer(EBUSY)


def _of(pairs: Iterable[tuple[str, int]], key: str) -> int:
    return next((value for name, value in pairs if name == key), 0)
