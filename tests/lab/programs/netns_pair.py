# SPDX-License-Identifier: Apache-2.0
"""Runs in the lab, as root: two namespaces, packets between them, everything netem and a relay can do to these, and
nothing left.

Prints a JSON object, from the name of what was tried to what was seen.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.netns import link, netem
from chaos.netns.netem import Impairment, Reading
from chaos.netns.netlink import index_of, inside
from chaos.netns.pair import Pair
from chaos.netns.relay import Relay
from chaos.netns.space import Namespace, enter

PORT = 7000
DATAGRAMS = 200
SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def within(space: Namespace, body: Callable[[], Any]) -> Any:
    """What `body` returns, as a JSON value, when a process does it that lives in that namespace and dies of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            enter(space.fd)
            os.write(writer, json.dumps(body()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def echo(space: Namespace, address: str) -> int:
    """A server in the namespace: TCP echoes, UDP is answered with the numbers of all that came when an empty one
    does. Its pid, when it listens."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        enter(space.fd)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # All of them may come before this is on a CPU again, and then they have to wait somewhere.
        datagrams.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        datagrams.bind((address, PORT))
        listener = socket.create_server((address, PORT))
        os.write(writer, b".")
        threading.Thread(target=answer, args=[datagrams]).start()
        while True:
            stream, _ = listener.accept()
            while data := stream.recv(4096):
                stream.sendall(data)
            stream.close()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return child


def answer(datagrams: socket.socket) -> None:
    came: list[int] = []
    while True:
        data, sender = datagrams.recvfrom(2048)
        if len(data) == 1:
            datagrams.sendto(json.dumps(came).encode(), sender)
            came = []
        else:
            came.append(int.from_bytes(data[:4], "big"))


def rounds(address: str, count: int) -> list[float]:
    """Seconds of each exchange of a byte over one TCP connection."""
    with socket.create_connection((address, PORT), timeout=20) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = []
        for _ in range(count):
            began = time.monotonic()
            stream.sendall(b"x")
            stream.recv(1)
            seconds.append(time.monotonic() - began)
        return seconds


def send(address: str) -> None:
    """Numbered datagrams of 104 bytes, as fast as they go."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for number in range(DATAGRAMS):
            out.sendto(number.to_bytes(4, "big") + bytes(100), (address, PORT))


def came(address: str) -> list[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.settimeout(20)
        out.sendto(b"?", (address, PORT))
        return list(json.loads(out.recv(1 << 16)))


def told(reading: Reading | None) -> dict[str, Any]:
    assert reading is not None
    return {name: getattr(reading, name) for name in ("passed", "dropped", "reordered", "waiting")}


def stream_through(pair: Pair, impairment: Impairment) -> dict[str, Any]:
    """Datagrams from left to right while netem is on the left end, and what was seen of them on both sides."""
    address = str(pair.addresses[1].ip)
    before = netem.apply(pair.left, impairment)
    try:
        within(pair.left.space, lambda: send(address))
        until = time.monotonic() + 20
        after = netem.read(pair.left)
        while after is not None and after.waiting and time.monotonic() < until:
            time.sleep(0.02)
            after = netem.read(pair.left)
    finally:
        netem.undo(pair.left)
    assert after is not None
    numbers = within(pair.left.space, lambda: came(address))
    return {
        "numbers": numbers,
        "struck": netem.took_effect(before, after),
        "seed": after.impairment.seed,
        **told(after),
    }


def relayed(pair: Pair, impairment: Impairment) -> dict[str, Any]:
    """The same by a relay, and how long a byte takes to and fro over it if nothing is done to the way back."""
    address = str(pair.addresses[1].ip)
    relay = Relay(pair.ends, (impairment, Impairment()))
    try:
        seconds = [] if impairment.effects else within(pair.left.space, lambda: rounds(address, 20))
        first = relay.told()
        assert first is not None
        within(pair.left.space, lambda: send(address))
        until, told = time.monotonic() + 20, relay.told()
        while told is not None and time.monotonic() < until:
            if told[0].counts.taken == first[0].counts.taken + DATAGRAMS and not told[0].counts.waiting:
                break
            time.sleep(0.02)
            told = relay.told()
        assert told is not None
    finally:
        relay.close()
    numbers = within(pair.left.space, lambda: came(address))
    counts = {name: getattr(told[0].counts, name) for name in told[0].counts.__slots__}
    return {"numbers": numbers, "seconds": seconds, "balanced": told[0].balanced, **counts}


def main() -> None:
    seen: dict[str, Any] = {"release": os.uname().release}
    began = time.monotonic()
    pair = Pair.create()
    seen["seconds to create"] = time.monotonic() - began
    server = echo(pair.right.space, str(pair.addresses[1].ip))
    address = str(pair.addresses[1].ip)
    try:
        seen["quiet"] = [link.look(end).sent for end in pair.ends]
        seen["plain"] = within(pair.left.space, lambda: rounds(address, 20))
        before = netem.apply(pair.left, Impairment(delay_us=80_000))
        seen["delayed"] = within(pair.left.space, lambda: rounds(address, 5))
        after = netem.read(pair.left)
        assert after is not None
        seen["delay struck"] = netem.took_effect(before, after)
        seen["qdisc"] = link.look(pair.left).qdisc
        seen["changed"] = str(netem.change(pair.left, Impairment(loss=12.5, corruption=3, rate=8_000_000)).impairment)
        seen["cleared"] = str(netem.change(pair.left, Impairment(seed=5)).impairment)
        netem.undo(pair.left)
        netem.undo(pair.left)
        seen["undone"] = [link.look(pair.left).qdisc, netem.read(pair.left)]
        for name, impairment in {
            "all lost": Impairment(loss=100),
            "some lost": Impairment(loss=30, seed=1),
            "the same lost": Impairment(loss=30, seed=1),
            "others lost": Impairment(loss=30, seed=2),
            "duplicated": Impairment(duplication=50),
            "reordered": Impairment(delay_us=20_000, reordering=25),
            "jittered": Impairment(delay_us=20_000, jitter_us=15_000),
            "corrupted": Impairment(corruption=100),
            "slow": Impairment(rate=8 * 104 * DATAGRAMS),
            "full": Impairment(delay_us=500_000, limit=50),
        }.items():
            began = time.monotonic()
            seen[name] = {**stream_through(pair, impairment), "seconds": time.monotonic() - began}
        for name, impairment in {
            "relayed": Impairment(),
            "some lost by relay": Impairment(loss=30, seed=1),
            "most happens by relay": Impairment(
                delay_us=100_000, reordering=25, duplication=30, corruption=20, loss=10, seed=2
            ),
        }.items():
            seen[name] = relayed(pair, impairment)
        seen["cut"] = cut(pair)
        seen["somebody else's"] = foreign(pair)
    finally:
        os.kill(server, 9)
        os.waitpid(server, 0)
        pair.destroy(within=30)
    seen["left"] = {
        "mounts": Path("/proc/mounts").read_text().count("nsfs"),
        "links": sorted(entry.name for entry in Path("/sys/class/net").iterdir()),
        "named": Path("/run/netns").exists(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": [target for target in held() if target.startswith("net:")],
    }
    print(json.dumps(seen))


def held() -> list[str]:
    """What the descriptors of this process refer to."""
    targets = []
    for link_to in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            targets.append(str(link_to.readlink()))
    return targets


def cut(pair: Pair) -> dict[str, Any]:
    """One end down, and up again."""
    address = str(pair.addresses[1].ip)

    def connects() -> bool:
        try:
            rounds(address, 1)
        except OSError:
            return False
        return True

    link.set_up(pair.right, False)
    down = link.look(pair.left)
    silent = within(pair.left.space, lambda: attempt(address))
    link.set_up(pair.right, True)
    link.wait_running(pair.left)
    return {"carrier": down.carrier, "connects": silent, "again": within(pair.left.space, connects)}


def foreign(pair: Pair) -> dict[str, Any]:
    """Somebody has put a qdisc of his own on the link."""

    def put(route: Any) -> None:
        route.tc("add", "pfifo", index=index_of(route, pair.left.link), handle="1:", parent=0xFFFFFFFF, limit=100)

    inside(pair.left.space.fd, put, what="put a qdisc")
    said = []
    for change in (netem.apply, netem.change):
        try:
            change(pair.left, Impairment(loss=1))
        except OSError as error:
            said.append(errno.errorcode[error.errno or 0])
    netem.undo(pair.left)
    return {"errors": said, "qdisc": link.look(pair.left).qdisc}


def attempt(address: str) -> bool:
    try:
        socket.create_connection((address, PORT), timeout=1.5).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
