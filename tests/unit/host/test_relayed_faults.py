# SPDX-License-Identifier: Apache-2.0
"""Faults of the network by a relay, on a real link between two processes that stand for VMMs."""

from __future__ import annotations

import functools
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from chaos.errors import HostLacks, Unsupported
from chaos.fault import Evidence, Fault, find
from chaos.netns import netem, tun
from chaos.netns.link import LinkEnd
from chaos.netns.netem import Impairment
from chaos.netns.pair import Pair
from chaos.netns.relay import Relay, is_on
from chaos.netns.relay_lane import Lane
from chaos.netns.space import aside, enter
from faults import network

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")


@pytest.fixture(scope="module", autouse=True)
def _tun() -> None:
    try:
        tun.probe()
    except (HostLacks, OSError) as error:
        pytest.skip(f"no relay here: {error}")


@dataclass
class Someone:
    pid: int


@dataclass
class Context:
    """One link, from `source` to `destination`, over which datagrams go one way and segments that nobody answers."""

    pair: Pair
    pids: tuple[int, int]
    seed: int = 0

    def chance(self) -> int:
        self.seed += 1
        return self.seed

    @property
    def vmms(self) -> dict[str, Someone]:
        return {"source": Someone(self.pids[0])}

    def links(self, vmm: str) -> tuple[tuple[LinkEnd, LinkEnd, Someone], ...]:
        return ((self.pair.left, self.pair.right, Someone(self.pids[1])),)

    def talk(self, times: int = 40) -> None:
        """From the source to the destination and back: a connection each time, which is refused or times out."""
        address = str(self.pair.addresses[1].ip)

        def attempt() -> None:
            enter(self.pair.left.space.fd)
            for _ in range(times):
                with socket.socket() as out:
                    out.settimeout(0.05)
                    out.connect_ex((address, 7000))

        aside(attempt, what="talk", within=60)


@pytest.fixture
def ctx() -> Iterator[Context]:
    with Pair.create() as pair:
        pids = []
        for end in pair.ends:
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                enter(end.space.fd)
                os.write(writer, b".")
                signal.pause()
                os._exit(0)
            assert os.read(reader, 1) == b"."
            os.close(reader)
            os.close(writer)
            pids.append(pid)
        yield Context(pair, (pids[0], pids[1]))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def evidence(fault: Fault, ctx: Context) -> Evidence:
    return fault.evidence(ctx, "source")  # type: ignore[arg-type]


def told(fault: Fault, ctx: Context) -> Evidence:
    """The evidence after some talk, the fault being undone then."""
    fault.apply(ctx, "source")  # type: ignore[arg-type]
    try:
        assert evidence(fault, ctx).struck is None  # nobody has sent anything
        ctx.talk()
        return evidence(fault, ctx)
    finally:
        fault.undo(ctx, "source")  # type: ignore[arg-type]
        assert not is_on(ctx.pair.left)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("netem", {"loss": 30}),
        ("netem", {"duplication": 30}),
        ("netem", {"corruption": 30}),
        ("netem", {"delay": 5}),
        ("netem", {"delay": 5, "jitter": 3}),
        ("netem", {"rate": 1000}),
        ("netem", {"delay": 2, "loss": 20, "way": "out"}),
        ("netem", {"delay": 2, "loss": 20, "way": "in"}),
        ("partition", {}),
    ],
)
def test_it_strikes_and_says_by_whom(ctx: Context, name: str, options: dict[str, object]) -> None:
    found = told(find(name, {**options, "by": "relay"}), ctx)
    assert found.struck and "relay of left" in found.detail, found.detail


def test_reordering_needs_packets_that_follow_each_other(ctx: Context) -> None:
    """Each of these waits for the answer to the one before: none can overtake another, and none is said to have."""
    found = told(find("netem", {"delay": 5, "reordering": 50, "by": "relay"}), ctx)
    assert found.struck is None and "not met: reordering" in found.detail


def test_the_relay_stands_in_where_the_kernel_has_no_netem(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netem, "apply", _lacking)
    assert "relay of left" in told(find("netem", {"loss": 30}), ctx).detail
    with pytest.raises(HostLacks, match="no netem"):
        find("netem", {"loss": 30, "by": "netem"}).apply(ctx, "source")  # type: ignore[arg-type]


def _lacking(*_: object, **__: object) -> None:
    raise HostLacks("the kernel has no netem", remedy="modprobe sch_netem")


def test_what_a_host_must_have(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(by: str) -> None:
        find("partition", {"by": by}).require(ctx, "source")  # type: ignore[arg-type]

    monkeypatch.setattr(netem, "apply", _lacking)
    require("either")
    require("relay")
    with pytest.raises(Unsupported, match=r"^the kernel has no netem$"):
        require("netem")
    monkeypatch.setattr(tun, "DEVICE", "/dev/no-such-device")
    with pytest.raises(Unsupported, match="no netem; the kernel has no TUN devices") as caught:
        require("either")
    assert caught.value.remedy.startswith("modprobe sch_netem, or: modprobe tun")


def test_a_relay_that_dies_has_not_taken_effect(ctx: Context) -> None:
    fault = network.Netem(loss=50, by="relay")
    fault.apply(ctx, "source")  # type: ignore[arg-type]
    ctx.talk()
    assert evidence(fault, ctx).struck
    relayed = fault._put[0]
    assert isinstance(relayed, network._Relayed)
    os.kill(relayed._relay.pid, signal.SIGKILL)
    os.waitid(os.P_PID, relayed._relay.pid, os.WEXITED | os.WNOWAIT)
    ctx.talk(3)
    found = evidence(fault, ctx)
    assert found.struck is None and "died" in found.detail
    fault.undo(ctx, "source")  # type: ignore[arg-type]
    assert evidence(fault, ctx).struck is None


class Liar(Lane):
    """Counts packets as dropped that it lets pass."""

    def take(self, packet: bytes, now: int) -> None:
        before, self._impairment = self._impairment, Impairment()
        super().take(packet, now)
        self._impairment = before
        self.counts.dropped += 1


class Idler(Lane):
    """Counts what it should do to packets, and leaves them as they are."""

    def take(self, packet: bytes, now: int) -> None:
        corrupted = self.counts.corrupted
        super().take(packet, now)
        if self.counts.corrupted > corrupted:
            kept = self._waiting[-1]
            self._waiting[-1] = type(kept)(kept.due, kept.number, kept.came, kept.least, packet)


@pytest.mark.parametrize(
    ("lane", "options", "said"),
    [
        (Liar, {"loss": 30}, "the kernel has seen"),
        (Idler, {"corruption": 30}, "0 had a wrong checksum; not met"),
    ],
)
def test_a_relay_that_only_says_so_has_not_taken_effect(
    ctx: Context, monkeypatch: pytest.MonkeyPatch, lane: type[Lane], options: dict[str, object], said: str
) -> None:
    monkeypatch.setattr(network, "Relay", functools.partial(Relay, make=lane))
    fault = find("netem", {**options, "by": "relay"})
    found = told(fault, ctx)
    assert found.struck is None and said in found.detail, found.detail


def test_a_link_does_not_flap_while_packets_go_beside_it(ctx: Context) -> None:
    fault = network.Netem(loss=50, by="relay")
    fault.apply(ctx, "source")  # type: ignore[arg-type]
    flap = network.LinkFlap()
    with pytest.raises(OSError, match="by a relay"):
        flap.apply(ctx, "source")  # type: ignore[arg-type]
    assert evidence(flap, ctx).struck is False
    fault.undo(ctx, "source")  # type: ignore[arg-type]
    flap.apply(ctx, "source")  # type: ignore[arg-type]
    assert evidence(flap, ctx).struck
