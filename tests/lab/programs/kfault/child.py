# SPDX-License-Identifier: Apache-2.0
"""Processes to be stopped, and the cgroups they live in.

A child is forked before kfault is opened: an inherited descriptor would keep a slot armed after its owner's end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chaos.kvm.sev import Platform, Sev
from chaos.kvm.system import System
from chaos.kvm.vm import KvmVm
from chaos.linux.task import look

ROOT = Path("/sys/fs/cgroup")


class Group:
    """A cgroup, removed at the end; that it can be is a check of its own, since a charge keeps it alive only unseen."""

    def __init__(self, name: str, *, sev_max: str = "max") -> None:
        self.path = ROOT / name
        self.path.mkdir()
        (self.path / "misc.max").write_text(f"sev {sev_max}")

    def charges(self) -> int:
        return self._keyed("misc.current")["sev"]

    def refusals(self) -> int:
        return self._keyed("misc.events").get("sev.max", 0)

    def _keyed(self, file: str) -> dict[str, int]:
        words = (self.path / file).read_text().split()
        return {key: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text("0")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        deadline = time.monotonic() + 5
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError:  # who lived in it is still on the way out
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


class Vms:
    """What a child works with: VMs that stay open."""

    def __init__(self) -> None:
        self.system = System.open()
        self.platform = Platform.open()
        self.vms: list[KvmVm] = []

    def create(self) -> KvmVm:
        self.vms.append(self.system.create_vm())
        return self.vms[-1]

    def init(self, vm: KvmVm) -> None:
        Sev(vm.fd.number, self.platform.fd.number).init()

    def close(self) -> None:
        while self.vms:
            self.vms.pop().close()


class Child:
    """A process that does `body` whenever it is told to, and answers what that returned, or the errno it ended with."""

    def __init__(self, body: Callable[[Vms], Any], group: Group | None = None) -> None:
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._here.close()
                if group is not None:
                    group.join()
                _serve(there, body)
            finally:
                os._exit(1)
        there.close()
        self._end = os.pidfd_open(self.pid)
        self._reaped = False

    def go(self) -> Self:
        self._here.send(b"go")
        return self

    def answered(self, within: float) -> bool:
        return bool(select.select([self._here], [], [], within)[0])

    def answer(self, within: float = 10.0) -> Any:
        assert self.answered(within), f"{self.pid} did not answer within {within:g} s: {look(self.pid, self.pid)}"
        said = self._here.recv(1 << 16)
        assert said, f"{self.pid} has ended without an answer"
        return json.loads(said)

    def ask(self, within: float = 10.0) -> Any:
        return self.go().answer(within)

    def asleep(self, within: float = 2.0) -> bool:
        """Whether it comes to sleep where only a fatal signal reaches it."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            there = look(self.pid, self.pid)
            if there is not None and there.state == "D":
                return True
            time.sleep(0.001)
        return False

    def ended(self, within: float = 10.0) -> bool:
        if not self._reaped and select.select([self._end], [], [], within)[0]:
            os.waitpid(self.pid, 0)
            os.close(self._end)
            self._reaped = True
        return self._reaped

    def kill(self) -> None:
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self._here.close()
        assert self.ended(), f"{self.pid} does not end: {look(self.pid, self.pid)}"


def _serve(there: socket.socket, body: Callable[[Vms], Any]) -> None:
    vms = Vms()
    while there.recv(16):
        try:
            said = body(vms)
        except OSError as error:
            said = error.errno
        there.send(json.dumps(said).encode())
