# SPDX-License-Identifier: Apache-2.0
"""netem on a link: what is done to packets that leave by one end of it, and what the kernel says it has done.

A qdisc works on what leaves a link, so one end is one direction. Ours has a handle of its own, which is how it is told
from one that somebody else put there: that is neither changed nor removed.

What was asked for is read back before it counts as applied. That it is there does not show that it did anything:
`took_effect` compares the kernel's own counters for that.
"""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from chaos.errors import CleanupFailed, HostLacks, UsageError
from chaos.netns import qdisc
from chaos.netns.link import LinkEnd
from chaos.netns.netlink import index_of, inside
from chaos.netns.space import WITHIN, Namespace

PERCENTAGES = ("loss", "duplication", "reordering", "corruption")
FINEST = 1e-6  # percent; the kernel's own steps are a fortieth of it
ALWAYS = 0xFFFFFFFF  # a probability of one, in the kernel's units
MAX_DELAY_US = 3_600_000_000  # an hour
MAX_JITTER_US = 2_000_000  # the kernel cuts it off at 2^31 ns
MAX_RATE = 8 * 0xFFFFFFFF  # what the attribute holds, which is in bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """What is done to each packet. The default does nothing.

    delay_us        microseconds that each packet waits
    jitter_us       plus or minus this, evenly spread; packets overtake each other by it
    loss            percent that are dropped
    duplication     percent that are sent twice
    reordering      percent that skip the delay, and so overtake others; needs a delay
    corruption      percent in which one bit is flipped
    rate            bits a second, 0 for no limit
    limit           packets that may wait; what comes then is dropped, and counted as dropped like what was lost
    seed            of the kernel's random numbers, 64 bits, for loss, duplication, reordering and jitter (not for
                    which bit is flipped); None lets the kernel choose. A kernel before 6.6 has none and goes without.

    Raises `UsageError` for what makes no sense.
    """

    delay_us: int = 0
    jitter_us: int = 0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    corruption: float = 0.0
    rate: int = 0
    limit: int = 1000
    seed: int | None = None

    def __post_init__(self) -> None:
        _whole("delay_us", self.delay_us, 0, MAX_DELAY_US)
        _whole("jitter_us", self.jitter_us, 0, MAX_JITTER_US)
        for name in PERCENTAGES:
            _percent(name, getattr(self, name))
        if self.rate:
            _whole("rate", self.rate, 8, MAX_RATE)
        _whole("limit", self.limit, 1, 1_000_000)
        if self.seed is not None:
            _whole("seed", self.seed, 0, (1 << 64) - 1)
        if self.reordering and not self.delay_us:
            raise UsageError("reordering does nothing without a delay", remedy="give delay_us too")

    @property
    def effects(self) -> tuple[str, ...]:
        """The names of what is done to packets, `limit` and `seed` aside."""
        names = (field.name for field in fields(self) if field.name not in ("limit", "seed"))
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, slots=True)
class Reading:
    """What the kernel says: how the qdisc is set, and what it has counted since it was made.

    `impairment.seed` is the one in use, None if the kernel does not tell. `passed` packets (of `octets` bytes) have
    left it, each of them delayed; `dropped` were lost or found it full; `reordered` skipped the delay; `waiting` are in
    it.
    The kernel does not count what was duplicated or corrupted.
    """

    impairment: Impairment
    passed: int
    octets: int
    dropped: int
    reordered: int
    waiting: int


def took_effect(before: Reading, after: Reading) -> dict[str, bool | None]:
    """For each effect that was set: whether packets met it between the two readings of one qdisc.

    None for duplication and corruption, of which the kernel keeps no count. Where `dropped` grew, that may also be for
    lack of room: `limit` says how much there is.
    """
    went = after.passed > before.passed or after.waiting > before.waiting
    answers: dict[str, bool | None] = {
        "delay_us": went,
        "jitter_us": went,
        "rate": went,
        "loss": after.dropped > before.dropped,
        "reordering": after.reordered > before.reordered,
    }
    return {effect: answers.get(effect) for effect in before.impairment.effects}


def apply(end: LinkEnd, impairment: Impairment, *, within: float = WITHIN) -> Reading:
    """Put it on the link, and read it back. Undo: `undo`, which may be called before and after and twice.

    Raises `HostLacks` (root, or a kernel without netem, or one whose netem does not take all of it), or OSError: EEXIST
    if the link has a qdisc of somebody's, ENODEV if there is no such link.
    """
    asked = _options(impairment)

    def put(route: Any) -> Reading:
        index = index_of(route, end.link)
        qdisc.create(route, index, asked)
        return _checked(route, index, asked)

    try:
        return inside(end.space.fd, put, what=f"put netem on {end}", within=within)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        raise HostLacks(
            "the kernel has no netem", remedy="modprobe sch_netem, or a kernel with CONFIG_NET_SCH_NETEM"
        ) from error


def probe() -> None:
    """Have the kernel put one on a link of no account. Raises `HostLacks` or OSError."""
    with Namespace.create() as space:
        apply(LinkEnd(space, "lo"), Impairment(delay_us=1))


def change(end: LinkEnd, impairment: Impairment, *, within: float = WITHIN) -> Reading:
    """Set what is there to something else, all of it. Packets that wait keep their time, and the counters go on.

    Without a seed the random numbers go on too. Raises as `apply` does, and OSError ENOENT if nothing of ours is there.
    """
    asked = _options(impairment)

    def put(route: Any) -> Reading:
        index = index_of(route, end.link)
        if qdisc.find(route, index) is None:
            raise FileNotFoundError(errno.ENOENT, f"there is no netem of ours on {end}")
        qdisc.change(route, index, asked)
        return _checked(route, index, asked)

    return inside(end.space.fd, put, what=f"change netem on {end}", within=within)


def undo(end: LinkEnd, *, within: float = WITHIN) -> None:
    """Take it off, with the packets that wait in it. Nothing to do if there is none of ours, or the link is gone.

    Raises `CleanupFailed`.
    """

    def take(route: Any) -> None:
        index = index_of(route, end.link)
        if qdisc.find(route, index) is not None:
            qdisc.delete(route, index)
            if qdisc.find(route, index) is not None:
                raise OSError(errno.EEXIST, "it came back")

    try:
        inside(end.space.fd, take, what=f"take netem off {end}", within=within)
    except (OSError, HostLacks) as error:
        if not isinstance(error, OSError) or error.errno != errno.ENODEV:
            raise CleanupFailed(f"netem may still be on {end}: {error}", remedy="give up the namespace") from error


def read(end: LinkEnd, *, within: float = WITHIN) -> Reading | None:
    """How our netem is set and what it has counted; None if there is none. Raises `HostLacks` or OSError."""

    def look(route: Any) -> Reading | None:
        found = qdisc.find(route, index_of(route, end.link))
        return None if found is None else _reading(*found)

    return inside(end.space.fd, look, what=f"read netem of {end}", within=within)


def _checked(route: Any, index: int, asked: qdisc.Options) -> Reading:
    """What is there, if that is what was asked for; else it is taken off again."""
    found = qdisc.find(route, index)
    if found is not None:
        took, _ = found
        # A kernel without seeds tells none, and one that was asked for none tells the one it has chosen.
        if took == replace(asked, seed=took.seed) and (asked.seed in (None, took.seed) or took.seed is None):
            return _reading(*found)
        qdisc.delete(route, index)
    raise HostLacks(
        f"the kernel's netem was given {asked}, and took {found[0] if found else 'nothing'}",
        remedy="leave out what it does not know, or use a newer kernel",
    )


def _options(impairment: Impairment) -> qdisc.Options:
    """In the kernel's units."""
    return qdisc.Options(
        delay=impairment.delay_us * 1000,
        jitter=impairment.jitter_us * 1000,
        loss=_probability(impairment.loss),
        duplicate=_probability(impairment.duplication),
        reorder=_probability(impairment.reordering),
        corrupt=_probability(impairment.corruption),
        rate=impairment.rate // 8,
        limit=impairment.limit,
        seed=impairment.seed,
    )


def _reading(options: qdisc.Options, counters: qdisc.Counters) -> Reading:
    impairment = Impairment(
        delay_us=options.delay // 1000,
        jitter_us=options.jitter // 1000,
        loss=_percentage(options.loss),
        duplication=_percentage(options.duplicate),
        reordering=_percentage(options.reorder),
        corruption=_percentage(options.corrupt),
        rate=options.rate * 8,
        limit=options.limit,
        seed=options.seed,
    )
    return Reading(
        impairment=impairment,
        passed=counters.packets,
        octets=counters.bytes,
        dropped=counters.drops,
        reordered=counters.requeues,
        waiting=counters.qlen,
    )


def _probability(percentage: float) -> int:
    return round(percentage / 100 * ALWAYS)


def _percentage(probability: int) -> float:
    return round(probability * 100 / ALWAYS, 6)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name}: {value!r} is not a whole number from {low} to {high}", remedy=f"correct {name}")


def _percent(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value == 0 or FINEST <= value <= 100):  # type: ignore[operator]
        raise UsageError(f"{name}: {value!r} is not a percentage from 0 to 100", remedy=f"correct {name}")
