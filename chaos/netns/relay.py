# SPDX-License-Identifier: Apache-2.0
"""A relay: a process through which two VMMs talk, and which impairs what passes; netem in user space.

It works on packets, below TCP, since a stream whose bytes came twice or in another order would be no stream. Each of
the two namespaces gets a TUN device and a route to the other side by it (`chaos.netns.tun`); the relay has both
descriptors, and nobody else has. What it does in each direction is a `Lane`'s.

The link itself stays as it is. So if the relay dies, by whatever, its devices and routes are gone and packets take the
link again, unimpaired: nothing is left, and a fault that relied on it can no longer say that it took effect. It is the
runner's child. It dies with the runner (PR_SET_PDEATHSIG), and ends when the runner's end of their socket is closed.

Its own counts are not taken on trust: what it says that it has taken and given is held against what the kernel counts
on the two devices. For that it stands still between a question and the word to go on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Literal

import msgspec

from chaos.errors import CleanupFailed, HostLacks, InternalError
from chaos.linux import process
from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import Channel, Ended, pair
from chaos.netns import link, tun
from chaos.netns.link import LinkEnd
from chaos.netns.netem import Impairment
from chaos.netns.relay_lane import Counts, Lane

# It answers at once, or is stopped or broken.
ANSWER_WITHIN = 30.0
END_WITHIN = 10.0
AT_ONCE = 64  # packets of one direction before the other one's turn
LONGEST = 1 << 16

Word = Literal["stand still", "go on"]

_TO_RELAY: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)
_FROM_RELAY: msgspec.msgpack.Decoder[tuple[Counts, ...]] = msgspec.msgpack.Decoder(tuple[Counts, ...])


@dataclass(frozen=True, slots=True)
class Told:
    """Of one direction: the relay's `counts`, and what the kernel has counted on the device where packets leave for the
    relay (`sent`) and on the one where they come from it (`received`)."""

    counts: Counts
    sent: int
    received: int

    @property
    def balanced(self) -> bool:
        """Whether the relay's counts agree with each other, and with the kernel's."""
        counts = self.counts
        return counts.balanced and (self.sent, self.received) == (counts.taken + counts.strays, counts.given)


@dataclass(frozen=True, slots=True)
class _RelayWay:
    """One direction: from one descriptor to another, for whom, and what is done."""

    source: int
    target: int
    peer: bytes
    lane: Lane


class Relay:
    """Between the two ends of a link that have an address each. `impairments` are of what leaves by either end."""

    def __init__(
        self, ends: tuple[LinkEnd, LinkEnd], impairments: tuple[Impairment, Impairment], *,
        make: Callable[[Impairment], Lane] = Lane,
    ) -> None:  # fmt: skip
        """Forks: the calling process has one thread. From then on packets go by the relay.

        Raises `HostLacks` (root, or a kernel without TUN) or OSError: EBUSY if there is a relay already.
        """
        self._devices = tuple(beside(end) for end in ends)
        addresses = [ip_interface(link.look(end).addresses[0]).ip for end in ends]
        lanes = [make(impairment) for impairment in impairments]
        with ExitStack() as undo:
            one, other = (
                undo.enter_context(OwnedFd(tun.create(device, mine, peer))).number
                for device, mine, peer in zip(self._devices, addresses, reversed(addresses), strict=True)
            )
            ways = (
                _RelayWay(one, other, addresses[1].packed, lanes[0]),
                _RelayWay(other, one, addresses[0].packed, lanes[1]),
            )
            ours, theirs = pair()
            parent = os.getpid()
            with theirs:
                self.pid = process.fork(lambda: _serve(parent, theirs, ways))
            self._channel: Channel[tuple[Counts, ...]] = Channel.adopt(ours, _FROM_RELAY)
        # From here on the relay alone has the devices.
        try:
            self._hear()
        except BaseException as error:
            with contextlib.suppress(CleanupFailed):  # the first error is the one to tell
                self.close()
            if isinstance(error, Ended):
                raise InternalError("the relay ended before it had begun") from error
            raise

    def told(self) -> tuple[Told, ...] | None:
        """Of what leaves by either end; None if the relay has died, and what passed then passed unimpaired."""
        try:
            self._channel.send("stand still")
            counts = self._hear()
            try:
                devices = [link.look(device) for device in self._devices]
            finally:
                self._channel.send("go on")
        except (Ended, OSError, HostLacks):
            return None
        ways = zip(counts, devices, reversed(devices), strict=True)
        return tuple(Told(count, source.sent, target.received) for count, source, target in ways)

    def close(self) -> None:
        """End it, with the packets that wait in it. Once is enough. Raises `CleanupFailed`."""
        if self._channel.closed:
            return
        self._channel.close()
        with contextlib.suppress(ChildProcessError):
            with OwnedFd(os.pidfd_open(self.pid)) as handle:
                if not select.select([handle], [], [], END_WITHIN)[0]:
                    signal.pidfd_send_signal(handle.number, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        left = [device for device in self._devices if _is_there(device)]
        if left:
            raise CleanupFailed(f"the device {left[0]} is still there", remedy="give up the namespace")

    def _hear(self) -> tuple[Counts, ...]:
        counts, fds = self._channel.receive(ANSWER_WITHIN)
        fds.close()
        return counts


def beside(end: LinkEnd) -> LinkEnd:
    """The relay's device beside a link."""
    return LinkEnd(end.space, f"relay-{end.link}")


def is_on(end: LinkEnd) -> bool:
    """Whether what leaves by a link goes by a relay instead. Raises `HostLacks` or OSError."""
    return _is_there(beside(end))


def _is_there(device: LinkEnd) -> bool:
    try:
        link.look(device)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    return True


# -- the process ------------------------------------------------------------------------------------------


def _serve(parent: int, connection: OwnedFd, ways: Sequence[_RelayWay]) -> int:
    process.die_with(parent)
    process.leave_streams()
    process.keep_only((connection.number, *(way.source for way in ways)))
    process.be_mortal()
    channel: Channel[Word] = Channel.adopt(connection, _TO_RELAY)
    poll = select.poll()
    for fd in (channel.fileno(), *(way.source for way in ways)):
        poll.register(fd, select.POLLIN)
    try:
        _say(channel, ways)
        while True:
            ready = {fd for fd, _ in poll.poll(_rest(ways))}
            for way in ways:
                if way.source in ready:
                    _take(way)
                for packet in way.lane.give(time.monotonic_ns()):
                    os.write(way.target, packet)
            if channel.fileno() in ready:
                channel.receive()
                _say(channel, ways)
                channel.receive()  # stands still until then
    except Ended:
        return 0


def _say(channel: Channel[Word], ways: Sequence[_RelayWay]) -> None:
    channel.send(tuple(way.lane.counts for way in ways))


def _rest(ways: Sequence[_RelayWay]) -> float | None:
    """Milliseconds until a packet is to go; poll rounds them up."""
    due = [way.lane.due for way in ways if way.lane.due is not None]
    return max(0.0, (min(due) - time.monotonic_ns()) / 1e6) if due else None


def _take(way: _RelayWay) -> None:
    for packet in _packets(way.source):
        if _target(packet) == way.peer:
            way.lane.take(packet, time.monotonic_ns())
        else:
            way.lane.counts.strays += 1


def _packets(fd: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(AT_ONCE):
            yield os.read(fd, LONGEST)


def _target(packet: bytes) -> bytes:
    return packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
