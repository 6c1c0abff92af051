# SPDX-License-Identifier: Apache-2.0
"""Namespaces and links, in namespaces that the tests make. What a kernel with netem does is tried in the lab."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from chaos.errors import CleanupFailed, HostLacks, InternalError, SevchaosError
from chaos.netns import link, netem, space
from chaos.netns.link import LinkEnd
from chaos.netns.netem import Impairment
from chaos.netns.netlink import Listener, index_of, inside
from chaos.netns.pair import Pair, destroy
from chaos.netns.space import Namespace, aside, enter

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair.create() as made:
        yield made


def own() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def child(body: Callable[[], object]) -> tuple[int, int]:
    """Fork a process that does `body` and then waits to be killed; its pid, and a pipe that ends with its life. It
    has written a byte there when it has done it, "-" if that failed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            body()
            os.write(writer, b"+")
            time.sleep(60)
        except BaseException:
            os.write(writer, b"-")
        finally:
            os._exit(1)
    os.close(writer)
    return pid, reader


def stop(pid: int, reader: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)


def tell(body: Callable[[], str]) -> str:
    """What `body` says, in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, body().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


# -- work aside -----------------------------------------------------------------------------------------------


def test_work_aside_returns_and_raises() -> None:
    assert aside(threading.current_thread, what="look", within=5) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0, what="divide", within=5)
    assert threading.active_count() == 1


def test_work_aside_has_a_deadline_and_its_late_fruit_is_thrown_away() -> None:
    go, thrown = threading.Event(), threading.Event()
    with pytest.raises(TimeoutError, match=r"waited 0\.05 s to wait for go") as caught:
        aside(go.wait, what="wait for go", within=0.05, discard=lambda _: thrown.set())
    assert caught.value.errno == errno.ETIMEDOUT
    assert not thrown.is_set()
    go.set()
    assert thrown.wait(5)


def test_an_interrupted_wait_throws_the_fruit_away_too(monkeypatch: pytest.MonkeyPatch) -> None:
    thrown: list[str] = []

    def interrupted(outcomes: list[Any], _: float) -> None:
        assert outcomes[0].result(5) == "fruit"
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aside(lambda: "fruit", what="pick", within=5, discard=thrown.append)
    assert thrown == ["fruit"]


# -- namespaces -----------------------------------------------------------------------------------------------


@needs_root
def test_a_namespace_is_new_empty_and_nobody_has_moved() -> None:
    before = own()
    with Namespace.create() as made:
        assert made.inode != before == own()
        assert [(found.name, found.up) for found in link.links(made)] == [("lo", False)]
        assert made.residents() == ()
        assert os.getpid() in space.residents(before)
    with pytest.raises(InternalError):
        _ = made.fd
    made.close()  # twice is once


@needs_root
def test_a_process_enters_a_namespace() -> None:
    with Namespace.create() as made:
        assert tell(lambda: _seen_in(made)) == f"{made.inode} ['lo']"
        pid, reader = child(lambda: enter(made.fd))
        assert os.read(reader, 1) == b"+"
        assert made.residents() == (pid,)
        stop(pid, reader)


def _seen_in(where: Namespace) -> str:
    enter(where.fd)
    return f"{own()} {[name for _, name in socket.if_nameindex()]}"


@needs_root
def test_a_descriptor_of_something_else_cannot_be_entered() -> None:
    with open(os.devnull) as null, pytest.raises(OSError, match="cannot enter a network namespace") as caught:  # noqa: PTH123
        enter(null.fileno())
    assert caught.value.errno == errno.EINVAL


@needs_root
def test_without_root_the_host_lacks_it() -> None:
    def attempt() -> str:
        os.setgid(65534)
        os.setuid(65534)
        try:
            Namespace.create()
        except HostLacks as error:
            return f"{error.message}; {error.remedy}"
        return "made"

    assert tell(attempt) == "it is not permitted to make a network namespace; become root: CAP_SYS_ADMIN and " \
        "CAP_NET_ADMIN"  # fmt: skip


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "as many network namespaces as"), (errno.EINVAL, "no network namespaces"), (errno.EPERM, "permit")],
)
def test_what_else_may_be_lacking(number: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def unshare(_: int) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(space, "_libc", Libc)
    with pytest.raises(HostLacks, match=message) as caught:
        Namespace.create()
    assert caught.value.remedy


# -- pairs ----------------------------------------------------------------------------------------------------


@needs_root
def test_packets_pass_at_once_and_only_between_the_two(pair: Pair) -> None:
    address = str(pair.addresses[0].ip)
    listener = aside(lambda: _listen(pair.left.space, address), what="listen", within=5)
    with listener:
        port = listener.getsockname()[1]
        said = tell(lambda: _call(pair.right.space, address, port))
        assert said == "hello from 192.0.2.2"
    with Namespace.create() as elsewhere:
        assert tell(lambda: _attempt(elsewhere, address, port)) == "ENETUNREACH"


def _listen(where: Namespace, address: str) -> socket.socket:
    enter(where.fd)
    listener = socket.create_server((address, 0))
    threading.Thread(target=_answer, args=[listener], daemon=True).start()
    return listener


def _answer(listener: socket.socket) -> None:
    stream, peer = listener.accept()
    with stream:
        stream.sendall(f"hello from {peer[0]}".encode())


def _call(where: Namespace, address: str, port: int) -> str:
    enter(where.fd)
    with socket.create_connection((address, port), timeout=5) as stream:
        return stream.recv(100).decode()


def _attempt(where: Namespace, address: str, port: int) -> str:
    try:
        return _call(where, address, port)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@needs_root
def test_only_what_was_sent_goes_over_a_link(pair: Pair) -> None:
    """Nobody asks for the other's address, neither at first nor after the link was down."""
    address = str(pair.addresses[1].ip)
    with aside(lambda: _datagrams(pair.right.space, address), what="listen", within=5) as there:
        port = there.getsockname()[1]
        for sent in (3, 6):
            assert tell(lambda: _send(pair.left.space, address, port, 3)) == "sent"
            assert [there.recv(10) for _ in range(3)] == [b"x"] * 3
            assert (link.look(pair.left).sent, link.look(pair.right).received) == (sent, sent)
            assert (link.look(pair.right).sent, link.look(pair.left).received) == (0, 0)
            link.set_up(pair.left, False)
            link.set_up(pair.left, True)


def _datagrams(where: Namespace, address: str) -> socket.socket:
    enter(where.fd)
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind((address, 0))
    bound.settimeout(5)
    return bound


def _send(where: Namespace, address: str, port: int, count: int) -> str:
    enter(where.fd)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        for _ in range(count):
            out.sendto(b"x", (address, port))
    return "sent"


@needs_root
def test_what_is_there(pair: Pair) -> None:
    loopback, veth = link.links(pair.left.space)
    assert (loopback.name, loopback.up, loopback.kind) == ("lo", True, "")
    assert (veth.name, veth.kind, veth.up, veth.carrier, veth.qdisc) == ("left", "veth", True, True, "noqueue")
    assert veth.addresses == ("192.0.2.1/30",)  # and no link-local one
    assert (veth.sent, veth.received) == (0, 0)
    assert link.look(pair.right).addresses == ("192.0.2.2/30",)
    with pytest.raises(OSError, match="no link 'nosuch'") as caught:
        link.look(LinkEnd(pair.left.space, "nosuch"))
    assert caught.value.errno == errno.ENODEV


@needs_root
def test_a_cut_link(pair: Pair) -> None:
    link.set_up(pair.right, False)
    assert not link.look(pair.left).carrier
    with pytest.raises(TimeoutError, match="is the other end up"):
        link.wait_running(pair.left, within=0.1)
    link.set_up(pair.right, True)
    link.wait_running(pair.left)
    assert link.look(pair.left).running
    assert link.look(pair.left).addresses == ("192.0.2.1/30",)


@needs_root
def test_a_removed_end_takes_the_other_with_it(pair: Pair) -> None:
    link.remove(pair.left)
    link.remove(pair.left)
    link.remove(pair.right)
    assert [found.name for found in link.links(pair.right.space)] == ["lo"]


@needs_root
def test_names_and_addresses_of_ones_own() -> None:
    ours = (ip_interface("2001:db8::1/64"), ip_interface("2001:db8::2/64"))
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("the kernel has no IPv6")
    with Pair.create(names=("a", "b"), addresses=ours) as pair:
        assert link.look(pair.right).name == "b"
        assert link.look(pair.right).addresses == ("2001:db8::2/64",)


@needs_root
def test_a_name_that_is_taken_and_one_that_is_none(pair: Pair) -> None:
    with pytest.raises(OSError, match="make a veth pair") as caught:
        link.connect(pair.left, LinkEnd(pair.right.space, "other"))
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(OSError, match="make a veth pair") as caught:
        link.connect(LinkEnd(pair.left.space, "a/b"), LinkEnd(pair.right.space, "other"))
    assert caught.value.errno == errno.EINVAL


@needs_root
def test_what_fails_half_way_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(OSError, match="make a veth pair"):
        Pair.create(names=("left", "no such name, it is too long"))
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_kernel_without_veth(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Unknown device type")

    monkeypatch.setattr(link, "inside", unsupported)
    with Namespace(os.open(os.devnull, os.O_RDONLY)) as anything:
        with pytest.raises(HostLacks, match="no veth") as caught:
            link.connect(LinkEnd(anything, "a"), LinkEnd(anything, "b"))
    assert "CONFIG_VETH" in caught.value.remedy


# -- the end --------------------------------------------------------------------------------------------------


@needs_root
def test_a_destroyed_pair_is_gone() -> None:
    pair = Pair.create()
    pair.destroy()
    with pytest.raises(InternalError):
        _ = pair.left.space.fd
    assert threading.active_count() == 1


@needs_root
def test_who_keeps_a_namespace_is_told() -> None:
    pair = Pair.create()

    def stay() -> None:
        enter(pair.left.space.fd)
        pair.close()

    pid, reader = child(stay)
    assert os.read(reader, 1) == b"+"
    with pytest.raises(CleanupFailed, match=rf"1 of 2 .* within 0\.2 s: processes {pid} are still in it"):
        pair.destroy(within=0.2)
    stop(pid, reader)


@needs_root
def test_a_descriptor_keeps_a_namespace_too() -> None:
    made = Namespace.create()
    with Namespace(os.dup(made.fd)) as kept:
        with pytest.raises(CleanupFailed, match="a descriptor or a socket somewhere is"):
            destroy([made], within=0.1)
        destroy([kept])  # by now it has an id already


@needs_root
def test_news_that_were_lost_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Listener):
        def news(self, until: float) -> Iterator[tuple[int, bytes]]:
            yield 99, b"of something else"
            while time.monotonic() < until:
                yield 0, b""

    monkeypatch.setattr("chaos.netns.pair.Listener", Deaf)
    Pair.create().destroy()


def test_a_flood_of_news_is_told() -> None:
    class Flooded:
        def __init__(self, number: int) -> None:
            self.number = number

        def fileno(self) -> int:
            return reader

        def recv(self, _: int) -> bytes:
            raise OSError(self.number, os.strerror(self.number))

    reader, writer = os.pipe()
    listener = Listener(0)
    listener.close()
    os.write(writer, b"x")
    listener._socket = Flooded(errno.ENOBUFS)  # type: ignore[assignment]
    assert next(listener.news(time.monotonic() + 5)) == (0, b"")
    assert list(listener.news(time.monotonic() - 1)) == []
    listener._socket = Flooded(errno.EIO)  # type: ignore[assignment]
    with pytest.raises(OSError, match="Input/output"):
        next(listener.news(time.monotonic() + 5))
    os.close(reader)
    os.close(writer)


def test_what_cannot_be_watched_is_let_go_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostLacks("it is not permitted to do that", remedy="become root")

    monkeypatch.setattr("chaos.netns.pair.inside", refuse)
    anything = Namespace(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(CleanupFailed, match="may be left: it is not permitted"):
        destroy([anything])
    with pytest.raises(InternalError):
        _ = anything.fd


@needs_root
def test_nothing_is_left_of_a_process_that_is_killed() -> None:
    mounts = Path("/proc/mounts").read_text()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        made = Pair.create()
        os.write(writer, f"{made.left.space.fd} {made.right.space.fd}".encode())
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    numbers = os.read(reader, 100).split()
    theirs = [Namespace(os.open(f"/proc/{pid}/fd/{int(number)}", os.O_RDONLY)) for number in numbers]
    assert all(made.inode != own() for made in theirs)
    stop(pid, reader)
    destroy(theirs)  # it would not end if anything but these two descriptors were left
    assert Path("/proc/mounts").read_text() == mounts


# -- netem ----------------------------------------------------------------------------------------------------


@needs_root
def test_netem_or_what_is_lacking(pair: Pair) -> None:
    netem.undo(pair.left)  # before there is anything
    assert netem.read(pair.left) is None
    asked = Impairment(delay_us=1500, loss=12.5, rate=1_000_000, limit=77)
    try:
        reading = netem.apply(pair.left, asked)
    except HostLacks as error:
        assert error.message == "the kernel has no netem"
        assert "CONFIG_NET_SCH_NETEM" in error.remedy
        assert link.look(pair.left).qdisc == "noqueue"
        pytest.skip(error.message)
    assert reading.impairment == Impairment(
        delay_us=1500, loss=12.5, rate=1_000_000, limit=77, seed=reading.impairment.seed
    )
    netem.undo(pair.left)
    assert netem.read(pair.left) is None


@needs_root
def test_netem_of_a_link_that_is_gone(pair: Pair) -> None:
    link.remove(pair.left)
    netem.undo(pair.left)
    with pytest.raises(OSError, match="no link 'left'"):
        netem.read(pair.left)
    with pytest.raises(OSError, match="no link 'left'"):
        netem.apply(pair.left, Impairment())


@needs_root
def test_somebody_elses_qdisc_stays(pair: Pair) -> None:
    def put(route: Any) -> None:
        route.tc("add", "pfifo", index=index_of(route, "left"), handle="1:", parent=0xFFFFFFFF, limit=100)

    inside(pair.left.space.fd, put, what="put a qdisc")
    with pytest.raises((OSError, SevchaosError)):
        netem.apply(pair.left, Impairment(loss=1))
    with pytest.raises(FileNotFoundError, match="no netem of ours on left"):
        netem.change(pair.left, Impairment(loss=1))
    netem.undo(pair.left)
    assert link.look(pair.left).qdisc == "pfifo"


def test_an_undo_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostLacks("it is not permitted", remedy="become root")

    monkeypatch.setattr(netem, "inside", refuse)
    with Namespace(os.open(os.devnull, os.O_RDONLY)) as anything:
        with pytest.raises(CleanupFailed, match="netem may still be on left: it is not permitted"):
            netem.undo(LinkEnd(anything, "left"))
