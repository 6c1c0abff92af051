# SPDX-License-Identifier: Apache-2.0
"""Faults of the network between two VMMs that hand a guest over. Both live in namespaces of their own; nothing else is
on the link, so what its counters say is the migration's own traffic.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from chaos.errors import UsageError
from chaos.fault import Evidence, Fault, Scene, Target
from chaos.netns import link, netem
from chaos.netns.link import End
from chaos.netns.netem import Impairment, Reading

_NEEDS = "network namespaces and veth, and VMMs that migrate"
_WHERE = "at any step, before any phase of a migration; what it meets is what passes between the two VMMs"


@dataclass(kw_only=True, slots=True)
class Netem(Fault):
    """Impair the links of a VMM by netem: delay and jitter in milliseconds; loss, duplication, reordering and
    corruption in percent; rate in kilobits a second.

    `way` is what is struck: what the VMM sends (out), what it receives (in), or both.
    """

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = f"{_NEEDS}; a kernel with netem"
    PROOF: ClassVar[str] = (
        "the kernel's own counters: packets that passed delayed or limited, were dropped, or overtook others; of "
        "duplication and corruption, more packets that came than were sent, and wrong checksums"
    )

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    corruption: float = 0.0
    rate: int = 0
    way: Literal["out", "in", "both"] = "both"
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

    def apply(self, scene: Scene, target: str) -> None:
        for own, other, peer in scene.links(target):
            pid = scene.vmm(target).pid
            ways = {"out": _Put(own, pid, peer.pid), "in": _Put(other, peer.pid, pid)}
            for put in ways.values() if self.way == "both" else (ways[self.way],):
                self._put.append(put)
                put.before, put.counts = netem.apply(put.end, self._impairment), _counts(put.sender, put.receiver)

    def evidence(self, scene: Scene, target: str) -> Evidence:
        """Each effect must have been met on at least one of the links."""
        told = [put.told() for put in self._put]
        met = {effect for effects, _ in told for effect in effects}
        wanted = set(self._impairment.effects)
        details = "; ".join(text for _, text in told) or "no link was struck"
        missed = sorted(wanted - met)
        return Evidence(None if missed else True, details + (f"; not met: {', '.join(missed)}" if missed else ""))

    def undo(self, scene: Scene, target: str) -> str:
        for put in self._put:
            netem.undo(put.end)
        return "the links are as they were"


@dataclass(slots=True)
class _Counts:
    """Of the IP layers at both sides of a link: packets the sender has sent, the receiver has got, and segments that
    it threw away for a wrong checksum."""

    sent: int
    came: int
    wrong: int


@dataclass(slots=True)
class _Put:
    """netem on one end. `sender` and `receiver` are processes in the two namespaces."""

    end: End
    sender: int
    receiver: int
    before: Reading | None = None
    counts: _Counts | None = None

    def told(self) -> tuple[set[str], str]:
        """The effects that packets have met, and the numbers that say so."""
        after = netem.read(self.end)
        if self.before is None or after is None:
            return set(), f"{self.end}: no netem is on it"
        met = {effect for effect, struck in netem.struck(self.before, after).items() if struck}
        now = _counts(self.sender, self.receiver)
        text = f"{self.end}: {after.passed} packets passed, {after.dropped} dropped, {after.reordered} overtook others"
        if now is not None and self.counts is not None:
            more = (now.came - self.counts.came) - (now.sent - self.counts.sent)
            wrong = now.wrong - self.counts.wrong
            met |= {"duplication"} if more > 0 else set()
            met |= {"corruption"} if wrong > 0 else set()
            text += f", {max(more, 0)} more came than were sent, {wrong} had a wrong checksum"
        return met & set(self.before.impairment.effects), text


def _counts(sender: int, receiver: int) -> _Counts | None:
    """None if one of the two is gone, and its namespace cannot be asked through it."""
    try:
        return _Counts(
            sent=_snmp(sender, "Ip")["OutRequests"],
            came=_snmp(receiver, "Ip")["InReceives"],
            wrong=_snmp(receiver, "Tcp")["InCsumErrors"] + _snmp(receiver, "Ip")["InHdrErrors"],
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
    """Let no packet pass between a VMM and those it migrates with, in either direction, until it is undone."""

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = f"{_NEEDS}; a kernel with netem"
    PROOF: ClassVar[str] = "packets of the migration that the kernel counts as dropped, and none that passed"

    _netem: Netem = field(init=False, default_factory=lambda: Netem(loss=100.0))

    def apply(self, scene: Scene, target: str) -> None:
        self._netem.apply(scene, target)

    def evidence(self, scene: Scene, target: str) -> Evidence:
        return self._netem.evidence(scene, target)

    def undo(self, scene: Scene, target: str) -> str:
        return self._netem.undo(scene, target)


@dataclass(kw_only=True, slots=True)
class LinkFlap(Fault):
    """Take the links of a VMM down and up again, `times` in all, and leave them up."""

    TARGET: ClassVar[Target] = "link"
    WHERE: ClassVar[str] = _WHERE
    NEEDS: ClassVar[str] = _NEEDS
    PROOF: ClassVar[str] = "the kernel said that the link was down after each time it was taken down, and up again"

    times: int = 1
    _seen: list[bool] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 1 <= self.times <= 100:
            raise ValueError(f"times is 1 to 100, not {self.times}")

    def apply(self, scene: Scene, target: str) -> None:
        for own, _, _ in scene.links(target):
            for _ in range(self.times):
                link.set_up(own, False)
                down = not link.look(own).up
                link.set_up(own, True)
                link.wait_running(own)
                self._seen.append(down and link.look(own).up)

    def evidence(self, scene: Scene, target: str) -> Evidence:
        return Evidence(
            bool(self._seen) and all(self._seen), f"{sum(self._seen)} of {len(self._seen)} times down and up"
        )

    def undo(self, scene: Scene, target: str) -> str:
        for own, _, _ in scene.links(target):
            with contextlib.suppress(OSError):  # the namespace has gone with its VMM
                link.set_up(own, True)
        return "the links are up"
