# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ledger begin with."""

from __future__ import annotations

from chaos.history.records import Invoke
from chaos.judge.ledger.replay import Ledger, replay
from tests.unit.core.build import Builder


def two() -> Builder:
    """Source and destination, with a guest at the source."""
    b = Builder()
    b.spawn("source")
    b.spawn("destination")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    return b


def ledger(b: Builder) -> Ledger:
    return replay(b.history())


def payers(replayed: Ledger) -> set[tuple[str, ...]]:
    """Who may pay at the end: the payers of each possible world."""
    return {tuple(sorted(context.payer for context in world.contexts)) for world in replayed.worlds}


def held() -> tuple[Builder, Invoke]:
    """A move that is seen to sleep after it has charged its cgroup."""
    b = two()
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.hold(invoke)
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    return b, invoke
