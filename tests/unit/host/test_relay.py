# SPDX-License-Identifier: Apache-2.0
"""A relay between two namespaces: real packets, real TUN devices. Nothing here needs netem."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.errors import HostLacks, InternalError
from chaos.netns import link, tun
from chaos.netns.netem import Impairment
from chaos.netns.pair import Pair, destroy
from chaos.netns.relay import Relay, Told, beside, is_on
from chaos.netns.relay_lane import Fate, Lane
from chaos.netns.space import Namespace, aside, enter

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")
COUNT = 200
NOTHING = Impairment()
SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h

pytestmark = needs_root


@pytest.fixture(scope="module", autouse=True)
def _tun() -> None:
    try:
        tun.probe()
    except (HostLacks, OSError) as error:
        pytest.skip(f"no relay here: {error}")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair.create() as made:
        yield made


@pytest.fixture
def there(pair: Pair) -> Iterator[socket.socket]:
    """Datagrams to the right end arrive here."""
    with aside(lambda: _bound(pair.right.space, str(pair.addresses[1].ip)), what="bind", within=5) as bound:
        yield bound


def _bound(where: Namespace, address: str) -> socket.socket:
    enter(where.fd)
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)  # for all that is sent, and for the copies
    bound.bind((address, 0))
    bound.settimeout(5)
    return bound


def send(pair: Pair, there: socket.socket, count: int = COUNT) -> None:
    """Numbered datagrams from left to right."""
    target = there.getsockname()
    with aside(lambda: _bound(pair.left.space, str(pair.addresses[0].ip)), what="bind", within=5) as out:
        for number in range(count):
            out.sendto(number.to_bytes(4, "big") + bytes(100), target)


def settled(relay: Relay, count: int = COUNT) -> Told:
    """What is said of the way from left to right when all that was sent has come through."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        told = relay.told()
        assert told is not None
        if told[0].counts.taken == count and not told[0].counts.waiting:
            return told[0]
        time.sleep(0.01)
    raise TimeoutError(f"waited 20 s for {count} packets to pass: {told}")


def came(there: socket.socket, count: int) -> list[int]:
    """The numbers of so many datagrams, and that there are no more."""
    numbers = [int.from_bytes(there.recv(2000)[:4], "big") for _ in range(count)]
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(2000)
    there.settimeout(5)
    return numbers


def through(
    pair: Pair, there: socket.socket, impairment: Impairment, make: Callable[[Impairment], Lane] = Lane
) -> tuple[list[int], Told]:
    relay = Relay(pair.ends, (impairment, NOTHING), make=make)
    try:
        send(pair, there)
        told = settled(relay)
        return came(there, told.received - told.counts.corrupted), told
    finally:
        relay.close()


def test_a_relay_that_is_asked_for_nothing_does_nothing(pair: Pair, there: socket.socket) -> None:
    numbers, told = through(pair, there, NOTHING)
    assert numbers == list(range(COUNT))
    assert told.balanced and (told.sent, told.received, told.counts.strays) == (COUNT, COUNT, 0)
    assert link.look(pair.left).sent == 0  # all of it went by the relay
    assert [found.name for found in link.links(pair.left.space)] == ["lo", "left"]  # and that is gone


def test_loss_strikes_and_the_seed_repeats_it(pair: Pair, there: socket.socket) -> None:
    some, told = through(pair, there, Impairment(loss=30, seed=1))
    assert told.balanced and len(some) == COUNT - told.counts.dropped < COUNT
    assert through(pair, there, Impairment(loss=30, seed=1))[0] == some
    assert through(pair, there, Impairment(loss=30, seed=2))[0] != some


def test_duplication_strikes(pair: Pair, there: socket.socket) -> None:
    numbers, told = through(pair, there, Impairment(duplication=50, seed=1))
    assert told.balanced and len(numbers) == COUNT + told.counts.duplicated > COUNT
    assert set(numbers) == set(range(COUNT))


def test_corruption_is_seen_by_the_receiver(pair: Pair, there: socket.socket) -> None:
    """The datagrams do not arrive: their checksums, or that of the IP header, are wrong."""
    numbers, told = through(pair, there, Impairment(corruption=30, seed=1))
    assert told.balanced and len(numbers) == COUNT - told.counts.corrupted < COUNT
    assert told.received == COUNT


def test_reordering_and_jitter_strike(pair: Pair, there: socket.socket) -> None:
    for asked in (Impairment(delay_us=20_000, reordering=25, seed=1), Impairment(delay_us=20_000, jitter_us=15_000)):
        numbers, told = through(pair, there, asked)
        assert told.balanced and told.counts.reordered > 0 and told.counts.slowed > 0
        assert numbers != sorted(numbers) == list(range(COUNT))


def test_what_is_narrow_keeps_the_order(pair: Pair, there: socket.socket) -> None:
    numbers, told = through(pair, there, Impairment(rate=8_000_000))
    assert numbers == list(range(COUNT)) and told.counts.slowed == COUNT


def test_both_directions_and_streams_pass(pair: Pair) -> None:
    """TCP mends what is done to its packets, with the checksums that the kernel leaves to a device's hardware."""
    address, data = str(pair.addresses[1].ip), os.urandom(300_000)
    asked = Impairment(delay_us=2000, reordering=20, corruption=5, duplication=5, seed=4)
    with aside(lambda: _listening(pair.right.space, address), what="listen", within=5) as listener:
        relay = Relay(pair.ends, (asked, asked))
        try:
            port = listener.getsockname()[1]
            out = aside(lambda: _connected(pair.left.space, address, port), what="connect", within=20)
            stream, _ = listener.accept()
            with out, stream:
                stream.settimeout(30)
                assert aside(lambda: _exchanged(out, stream, data), what="exchange", within=60) == data
            told = relay.told()
            assert told is not None and all(way.balanced and way.counts.taken for way in told)
        finally:
            relay.close()


def _listening(where: Namespace, address: str) -> socket.socket:
    enter(where.fd)
    return socket.create_server((address, 0))


def _connected(where: Namespace, address: str, port: int) -> socket.socket:
    enter(where.fd)
    return socket.create_connection((address, port), timeout=20)


def _exchanged(out: socket.socket, back: socket.socket, data: bytes) -> bytes:
    received = bytearray()
    view = memoryview(data)
    out.setblocking(False)
    while len(received) < len(data):
        readable, writable, _ = select.select([back], [out] if view else [], [], 30)
        if writable:
            view = view[out.send(view) :]
        if readable:
            received += back.recv(1 << 16)
    return bytes(received)


def test_what_is_for_somebody_else_goes_nowhere_and_is_told(pair: Pair) -> None:
    relay = Relay(pair.ends, (Impairment(loss=100), Impairment(loss=100)))
    try:
        _to_device(pair, beside(pair.left).link)
        told = relay.told()
        until = time.monotonic() + 10
        while told is not None and not told[0].counts.strays and time.monotonic() < until:
            told = relay.told()
        assert told is not None and told[0].balanced
        assert (told[0].counts.strays, told[0].counts.taken, told[0].counts.dropped) == (1, 0, 0)
    finally:
        relay.close()


def _to_device(pair: Pair, device: str) -> None:
    with aside(lambda: _bound(pair.left.space, str(pair.addresses[0].ip)), what="bind", within=5) as out:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        out.sendto(b"x", ("255.255.255.255", 7000))


# -- a relay that does not do what it says ---------------------------------------------------------------------


class CountsWhatItDoesNotDrop(Lane):
    def take(self, packet: bytes, now: int) -> None:
        before = self.counts.dropped
        super().take(packet, now)
        if self.counts.dropped > before:
            self._keep(packet, Fate(lost=False, doubled=False, early=True, flipped=None, spread=0), now)


class CountsItAway(CountsWhatItDoesNotDrop):
    """And makes its own counts add up."""

    def give(self, now: int) -> Iterator[bytes]:
        yield from super().give(now)
        self.counts.given = self.counts.taken - self.counts.dropped


class CountsWhatItDoesNotDouble(Lane):
    def _keep(self, packet: bytes, fate: Fate, now: int) -> None:
        if not fate.doubled:
            super()._keep(packet, fate, now)


class DropsWhatItDoesNotCount(Lane):
    def give(self, now: int) -> Iterator[bytes]:
        yield from list(super().give(now))[1:]


@pytest.mark.parametrize(
    ("defect", "asked"),
    [
        (CountsWhatItDoesNotDrop, Impairment(loss=30, seed=1)),
        (CountsItAway, Impairment(loss=30, seed=1)),
        (CountsWhatItDoesNotDouble, Impairment(duplication=30, seed=1)),
        (DropsWhatItDoesNotCount, NOTHING),
    ],
)
def test_a_relay_that_lies_is_found_out(
    pair: Pair, there: socket.socket, defect: type[Lane], asked: Impairment
) -> None:
    _, told = through(pair, there, asked, make=defect)
    assert not told.balanced


# -- its life --------------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Whether it has ended within 10 seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)


def test_one_that_is_killed_is_told_and_packets_take_the_link_again(pair: Pair, there: socket.socket) -> None:
    relay = Relay(pair.ends, (Impairment(loss=100), NOTHING))
    assert is_on(pair.left) and is_on(pair.right)
    os.kill(relay.pid, signal.SIGKILL)
    assert gone(relay.pid)
    assert relay.told() is None
    relay.close()
    relay.close()
    assert not is_on(pair.left) and not is_on(pair.right)
    send(pair, there)
    assert came(there, COUNT) == list(range(COUNT))
    assert relay.told() is None


def test_one_that_is_stopped_is_ended_all_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.netns.relay.ANSWER_WITHIN", 0.1)
    monkeypatch.setattr("chaos.netns.relay.END_WITHIN", 0.1)
    relay = Relay(pair.ends, (NOTHING, NOTHING))
    os.kill(relay.pid, signal.SIGSTOP)
    assert relay.told() is None
    relay.close()
    assert not is_on(pair.left)


@pytest.mark.parametrize("stopped", [False, True])
def test_it_dies_with_the_process_that_made_it(stopped: bool) -> None:
    """Killed with SIGKILL, also while the relay itself can do nothing. Nothing is left."""
    reader, writer = os.pipe()
    runner = os.fork()
    if runner == 0:
        pair = Pair.create()
        relay = Relay(pair.ends, (Impairment(delay_us=1000), NOTHING))
        os.write(writer, f"{relay.pid} {pair.left.space.fd} {pair.right.space.fd}".encode())
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    pid, *fds = map(int, os.read(reader, 100).split())
    os.close(reader)
    spaces = [Namespace(os.open(f"/proc/{runner}/fd/{fd}", os.O_RDONLY)) for fd in fds]
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    os.kill(runner, signal.SIGKILL)
    os.waitpid(runner, 0)
    assert gone(pid)
    destroy(spaces)  # it would not end if the relay or a device were left


def test_there_is_one_at_a_time(pair: Pair) -> None:
    relay = Relay(pair.ends, (NOTHING, NOTHING))
    try:
        with pytest.raises(OSError, match="busy") as caught:
            Relay(pair.ends, (NOTHING, NOTHING))
        assert caught.value.errno == errno.EBUSY
        assert relay.told() is not None
    finally:
        relay.close()


def test_what_fails_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    monkeypatch.setattr("chaos.netns.relay._serve", lambda *_: 1)
    with pytest.raises(InternalError, match="before it had begun"):
        Relay(pair.ends, (NOTHING, NOTHING))
    assert not is_on(pair.left)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_kernel_without_tun(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun, "DEVICE", Path("/dev/no-such-device"))
    with pytest.raises(HostLacks, match="no TUN devices") as caught:
        Relay(pair.ends, (NOTHING, NOTHING))
    assert "CONFIG_TUN" in caught.value.remedy
    with pytest.raises(HostLacks, match="no TUN devices"):
        tun.probe()
