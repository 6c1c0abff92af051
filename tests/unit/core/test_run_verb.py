# SPDX-License-Identifier: Apache-2.0
"""How often `sevchaos run` opens a host: a lab for each experiment, this machine once for all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.cli import run_verb
from chaos.errors import LabHung

WANTED = [SimpleNamespace(name=name) for name in ("first", "second", "third")]


@dataclass
class FakeHost:
    """Notes what is carried out in each session. `breaking` breaks the host, `spending` leaves a fault in it."""

    anew: bool
    breaking: str = ""
    spending: str = ""
    sessions: list[list[str]] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Any]:
        self.sessions.append([])
        yield SimpleNamespace(spent="")


def carried_out(monkeypatch: pytest.MonkeyPatch, host: FakeHost, repeat: int = 1) -> list[list[str]]:
    async def one(_host: Any, session: Any, _console: Any, experiment: Any, seed: int, *_: Any) -> Any:
        host.sessions[-1].append(f"{experiment.name} {seed}")
        session.spent = "it stays broken" if experiment.name == host.spending else ""
        return SimpleNamespace(broken=LabHung("it hangs") if experiment.name == host.breaking else None)

    monkeypatch.setattr(run_verb, "_one", one)
    plan = run_verb._Plan(
        seed=7, repeat=repeat, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False
    )
    done = asyncio.run(run_verb._all([host], WANTED, plan, lambda run, doing: None))  # type: ignore[list-item, arg-type]
    assert len(done) == len(WANTED) * repeat
    return host.sessions


def test_a_lab_is_opened_for_each_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=True)) == [["first 7"], ["second 7"], ["third 7"]]
    twice = [["first 7", "first 8"], ["second 7", "second 8"], ["third 7", "third 8"]]
    assert carried_out(monkeypatch, FakeHost(anew=True), repeat=2) == twice


def test_this_machine_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=False)) == [["first 7", "second 7", "third 7"]]


@pytest.mark.parametrize("bad", ["breaking", "spending"])
def test_what_is_broken_is_opened_again(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    machine, lab = FakeHost(anew=False), FakeHost(anew=True)
    for host in (machine, lab):
        setattr(host, bad, "second")
    assert carried_out(monkeypatch, machine) == [["first 7", "second 7"], ["third 7"]]
    assert carried_out(monkeypatch, lab, repeat=2)[1:3] == [["second 7"], ["second 8"]]
