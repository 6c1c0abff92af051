# SPDX-License-Identifier: Apache-2.0
"""Faults of the network between two VMMs that hand a guest over. Both live in namespaces of their own; nothing else is
on the link, so what its counters say is the migration's own traffic.

What is done to packets is done by the kernel's netem, or where there is none by a relay of ours in user space
(`chaos.netns.relay`). The one is told by the kernel's counters; the other by its own, which must agree with the
kernel's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EBUSY
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from chaos.errors import HostLacks, Unsupported, UsageError
from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.netns import link, netem, relay, tun
from chaos.netns.link import LinkEnd
from chaos.netns.netem import Impairment, Reading
from chaos.netns.relay import Relay, Told

_NEEDS = "network namespaces and veth, and VMMs that migrate"
_ONE_OF = f"{_NEEDS}; a kernel with netem, or with TUN devices for a relay in its place"
_WHERE = "at any step, before any phase of a migration; what it meets is what passes between the two VMMs"

By = Literal["netem", "relay", "either"]
_PROBES: dict[By, tuple[Callable[[], None], ...]] = {
    "netem": (netem.probe,), "relay": (tun.probe,), "either": (netem.probe, tun.probe)
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Netem(Fault):
    """Impair the links of a VMM: delay and jitter in milliseconds; loss, duplication, reordering and corruption in
    percent; rate in kilobits a second.

    `way` is what is impaired: what the VMM sends (out), what it receives (in), or both. `by` is who does it: the
    kernel's netem, a relay in user space through which the two VMMs talk meanwhile, or either: netem if the kernel
    has it. Under the run's seed the relay does the same to the n-th packet of each direction, and so does netem
    from Linux 6.6 on.
    """

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = _ONE_OF
    PROOF: ClassVar[str] = (
        "the kernel's own counters: packets that passed delayed or limited, were dropped, or overtook others; of "
        "duplication and corruption, more packets that came than were sent, and wrong checksums. Of a relay its own "
        "counters, as long as it lives and they agree with the kernel's, and wrong checksums"
    )

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    corruption: float = 0.0
    rate: int = 0
    way: Literal["out", "in", "both"] = "both"
    by: By = "either"
    _put: list[_Put] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        try:
            if not self._impairment.effects:
                raise ValueError("nothing is impaired: give delay, jitter, loss, duplication, reordering, …")
        except UsageError as error:
            raise ValueError(error.message) from error

    @property
    def _impairment(self) -> Impairment:
        return Impairment(
            delay_us=round(self.delay * 1000), jitter_us=round(self.jitter * 1000), loss=self.loss,
            duplication=self.duplication, reordering=self.reordering, corruption=self.corruption,
            rate=self.rate * 1000,
        )  # fmt: skip

    def require(self, ctx: FaultContext, target: str) -> None:
        lacking = []
        for probe in _PROBES[self.by]:
            try:
                probe()
            except HostLacks as error:
                lacking.append(error)
            else:
                return
        remedies = dict.fromkeys(error.remedy for error in lacking)
        raise Unsupported("; ".join(error.message for error in lacking), remedy=", or: ".join(remedies))

    def apply(self, ctx: FaultContext, target: str) -> None:
        pid = ctx.vmms[target].pid
        for own, other, peer in ctx.links(target):
            out = _Way(own, pid, peer.pid, self._asked("out", ctx.chance()))
            back = _Way(other, peer.pid, pid, self._asked("in", ctx.chance()))
            if self.by != "relay":
                try:
                    self._by_netem(way for way in (out, back) if way.asked.effects)
                    continue
                except HostLacks:
                    if self.by == "netem":
                        raise
            self._put.append(_Relayed(out, back))

    def _asked(self, way: str, seed: int) -> Impairment:
        """Of one direction, which may be the one that nothing is done to."""
        asked = self._impairment if self.way in (way, "both") else Impairment()
        return dataclasses.replace(asked, seed=seed)

    def _by_netem(self, ways: Iterator[_Way]) -> None:
        for way in ways:
            put = _InKernel(way)
            self._put.append(put)
            try:
                put.apply()
            except HostLacks:
                self._put.remove(put)
                raise

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """Each effect must have been met on at least one of the links."""
        told = [put.told() for put in self._put]
        met = {effect for effects, _ in told for effect in effects}
        wanted = set(self._impairment.effects)
        details = "; ".join(text for _, text in told) or "no link was struck"
        missed = sorted(wanted - met)
        return Evidence(None if missed else True, details + (f"; not met: {', '.join(missed)}" if missed else ""))

    def undo(self, ctx: FaultContext, target: str) -> str:
        for put in self._put:
            put.take_off()
        return "the links are as they were"


class _Put(Protocol):
    """What impairs a link."""

    def told(self) -> tuple[set[str], str]:
        """The effects that packets have met, and the numbers that say so."""

    def take_off(self) -> None:
        """Twice is once. Raises `CleanupFailed`."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One direction of a link: what leaves by `end`. `sender` and `receiver` are processes in the two namespaces."""

    end: LinkEnd
    sender: int
    receiver: int
    asked: Impairment


@dataclass(slots=True)
class _Counts:
    """Of the IP layers at both sides of a link: packets the sender has sent, the receiver has got, and segments that
    it threw away for a wrong checksum."""

    sent: int
    came: int
    bad_checksums: int


@dataclass(slots=True, eq=False)
class _InKernel:
    """netem on one end."""

    way: _Way
    before: Reading | None = None
    counts: _Counts | None = None

    def apply(self) -> None:
        self.before = netem.apply(self.way.end, self.way.asked)
        self.counts = _counts(self.way.sender, self.way.receiver)

    def told(self) -> tuple[set[str], str]:
        end, after = self.way.end, netem.read(self.way.end)
        if self.before is None or after is None:
            return set(), f"{end}: no netem is on it"
        met = {effect for effect, seen in netem.took_effect(self.before, after).items() if seen}
        now = _counts(self.way.sender, self.way.receiver)
        text = (
            f"netem of {end}: {after.passed} packets passed, {after.dropped} dropped, {after.reordered} overtook others"
        )
        if now is not None and self.counts is not None:
            more = (now.came - self.counts.came) - (now.sent - self.counts.sent)
            bad = now.bad_checksums - self.counts.bad_checksums
            met |= {"duplication"} if more > 0 else set()
            met |= {"corruption"} if bad > 0 else set()
            text += f", {max(more, 0)} more came than were sent, {bad} had a wrong checksum"
        return met & set(self.before.impairment.effects), text

    def take_off(self) -> None:
        netem.undo(self.way.end)


class _Relayed:
    """A relay between both ends."""

    def __init__(self, out: _Way, back: _Way) -> None:
        self._ways = (out, back)
        self._before = [_counts(way.sender, way.receiver) for way in self._ways]
        self._relay = Relay((out.end, back.end), (out.asked, back.asked))

    def told(self) -> tuple[set[str], str]:
        directions = self._relay.told()
        if directions is None:
            return set(), f"the relay of {self._ways[0].end} died, and what passed then was not impaired"
        met: set[str] = set()
        texts = []
        for way, before, told in zip(self._ways, self._before, directions, strict=True):
            now = _counts(way.sender, way.receiver)
            bad = now.bad_checksums - before.bad_checksums if now is not None and before is not None else None
            if way.asked.effects:
                met |= _met(told, bad) & set(way.asked.effects)
            texts.append(_accounts(way.end, told, bad))
        return (met if all(told.balanced for told in directions) else set()), "; ".join(texts)

    def take_off(self) -> None:
        self._relay.close()


def _met(told: Told, bad: int | None) -> set[str]:
    counts = told.counts
    waited = ("delay_us", "jitter_us", "rate") if counts.slowed else ()
    others = {
        "loss": counts.dropped, "duplication": counts.duplicated, "reordering": counts.reordered,
        "corruption": counts.corrupted and bad,
    }  # fmt: skip
    return {*waited, *(effect for effect, count in others.items() if count)}


def _accounts(end: LinkEnd, told: Told, bad: int | None) -> str:
    counts = told.counts
    text = (
        f"relay of {end}: {counts.taken} packets taken, {counts.given} given, {counts.dropped} dropped, "
        f"{counts.duplicated} duplicated, {counts.slowed} slowed, {counts.reordered} overtook others, "
        f"{counts.corrupted} corrupted"
    )
    if bad is not None:
        text += f", {bad} had a wrong checksum"
    if not told.balanced:
        text += f"; the kernel has seen {told.sent} go to it and {told.received} come from it, which is not the same"
    return text


def _counts(sender: int, receiver: int) -> _Counts | None:
    """None if one of the two is gone, and its namespace cannot be asked through it."""
    try:
        return _Counts(
            sent=_snmp(sender, "Ip")["OutRequests"],
            came=_snmp(receiver, "Ip")["InReceives"],
            bad_checksums=_snmp(receiver, "Tcp")["InCsumErrors"] + _snmp(receiver, "Ip")["InHdrErrors"],
        )
    except (OSError, KeyError):
        return None


def _snmp(pid: int, layer: str) -> dict[str, int]:
    """/proc/PID/net/snmp: for each layer a line of names and a line of numbers."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()]
    names, numbers = (row for row in rows if row[0] == f"{layer}:")
    return dict(zip(names[1:], map(int, numbers[1:]), strict=True))


@dataclass(kw_only=True, slots=True)
class Partition(Fault):
    """Let no packet pass between a VMM and those it migrates with, in either direction, until it is undone: `by` netem,
    a relay, or either (see netem)."""

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = _ONE_OF
    PROOF: ClassVar[str] = "packets of the migration that the kernel, or a relay that agrees with it, counts as dropped"

    by: By = "either"
    _netem: Netem = field(init=False, default_factory=lambda: Netem(loss=100.0))

    def __post_init__(self) -> None:
        self._netem.by = self.by

    def require(self, ctx: FaultContext, target: str) -> None:
        self._netem.require(ctx, target)

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._netem.apply(ctx, target)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        return self._netem.evidence(ctx, target)

    def undo(self, ctx: FaultContext, target: str) -> str:
        return self._netem.undo(ctx, target)


@dataclass(kw_only=True, slots=True)
class LinkFlap(Fault):
    """Take the links of a VMM down and up again, `times` in all, and leave them up. Not while a relay is beside them:
    packets would go that way."""

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = _NEEDS
    PROOF: ClassVar[str] = "the kernel said that the link was down after each time it was taken down, and up again"

    times: int = 1
    _seen: list[bool] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 1 <= self.times <= 100:
            raise ValueError(f"times is 1 to 100, not {self.times}")

    def apply(self, ctx: FaultContext, target: str) -> None:
        for own, _, _ in ctx.links(target):
            if relay.is_on(own):
                raise OSError(EBUSY, "packets go by a relay, and not by the link")
            for _ in range(self.times):
                link.set_up(own, False)
                down = not link.look(own).up
                link.set_up(own, True)
                link.wait_running(own)
                self._seen.append(down and link.look(own).up)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        return Evidence(
            bool(self._seen) and all(self._seen), f"{sum(self._seen)} of {len(self._seen)} times down and up"
        )

    def undo(self, ctx: FaultContext, target: str) -> str:
        for own, _, _ in ctx.links(target):
            with contextlib.suppress(OSError):  # the namespace has gone with its VMM
                link.set_up(own, True)
        return "the links are up"
