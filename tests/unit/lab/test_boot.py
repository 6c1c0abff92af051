# SPDX-License-Identifier: Apache-2.0
"""A lab that fails while it boots, before anybody's program has run in it: when it is booted once more."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.errors import LabFailed, QemuDied
from chaos.lab import session
from chaos.lab.machine import SerialLines
from chaos.lab.session import Wish

LOST = "[   24.4] rcu: rcu_preempt kthread timer wakeup didn't happen for 5260 jiffies! g-1043 f0x0 ->state=I"
KERNEL = SimpleNamespace(slowness=1, release="7.3.4")
SPEC: Any = SimpleNamespace(
    kernel=KERNEL, qemu=SimpleNamespace(version=(10, 0, 2), threads="multi"), cpus=2, memory=1 << 30
)


class Booting:
    """Stands for `Lab`: what each boot comes to."""

    outcomes: list[str]
    stopped = 0

    def __init__(self, _: object, console: SerialLines) -> None:
        self.console = console
        self.outcome = Booting.outcomes.pop(0)
        self.ready = SimpleNamespace(sev=self.outcome == "well")

    async def start(self) -> None: ...

    async def greet(self, _: float, *, warm: bool) -> None:
        if self.outcome == "died":
            raise QemuDied("QEMU ended (killed by SIGABRT):\nit said nothing")
        self.console.lines.append(LOST if self.outcome == "lost" else "ccp: no such device")

    async def stop(self) -> None:
        Booting.stopped += 1


def booted(monkeypatch: pytest.MonkeyPatch, *outcomes: str) -> list[str]:
    """What was said until the lab was there. Raises what booting it raises."""
    Booting.outcomes, Booting.stopped = list(outcomes), 0
    said: list[str] = []
    monkeypatch.setattr(session, "Lab", Booting)

    async def boot() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await session._booted(SPEC, Wish(kernel="debian:7.3"), stack, said.append, None)
        assert not Booting.outcomes

    try:
        asyncio.run(boot())
    finally:
        assert Booting.stopped == len(outcomes), "every lab that was begun is ended"
    return said


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("died", "QEMU ended (killed by SIGABRT) before the lab had booted"),
        ("lost", "a CPU lost a timer before the lab"),
    ],
)
def test_what_the_emulator_did_is_tried_once_more_and_said(
    first: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = booted(monkeypatch, first, "well")
    assert told in said[1] and len(said) == 3


@pytest.mark.parametrize("outcomes", [("without",), ("lost", "lost"), ("died", "died"), ("lost", "without")])
def test_what_fails_twice_or_for_another_reason_is_an_error(
    outcomes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((LabFailed, QemuDied)):
        booted(monkeypatch, *outcomes)
