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

from chaos.controller import campaign
from chaos.controller.lab_host import LabHost
from chaos.errors import LabHung
from chaos.lab.session import Wish

WANTED = [SimpleNamespace(name=name) for name in ("first", "second", "third")]


@dataclass
class FakeHost:
    """Notes what is carried out in each session. `breaking` breaks the host, `spending` leaves a fault in it."""

    anew: bool
    breaking: str = ""
    spending: str = ""
    sessions: list[list[str]] = field(default_factory=list)

    def suited(self, experiment: Any) -> FakeHost:
        return self

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Any]:
        self.sessions.append([])
        yield SimpleNamespace(spent="")


def carried_out(monkeypatch: pytest.MonkeyPatch, host: FakeHost, repeat: int = 1, jobs: int = 1) -> list[list[str]]:
    """What each session carried out; one after the other, however many jobs the stints are made for."""

    async def one(_host: Any, session: Any, _console: Any, experiment: Any, seed: int, *_: Any) -> Any:
        host.sessions[-1].append(f"{experiment.name} {seed}")
        session.spent = "it stays broken" if experiment.name == host.spending else ""
        return SimpleNamespace(broken=LabHung("it hangs") if experiment.name == host.breaking else None)

    monkeypatch.setattr(campaign, "_one", one)
    plan = campaign.Campaign(
        seed=7, repeat=repeat, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False
    )
    stints = campaign.stints([host], WANTED, plan, jobs)  # type: ignore[list-item, arg-type]
    done = asyncio.run(campaign.carry_out_all(stints, 1, plan, lambda run, doing: None))
    assert len(done) == len(WANTED) * repeat
    return host.sessions


def test_a_lab_is_opened_for_each_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=True)) == [["first 7"], ["second 7"], ["third 7"]]
    twice = [["first 7", "first 8"], ["second 7", "second 8"], ["third 7", "third 8"]]
    assert carried_out(monkeypatch, FakeHost(anew=True), repeat=2) == twice


def test_where_labs_would_be_idle_the_repetitions_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    divided = [["first 7", "first 8"], ["first 9"], ["second 7", "second 8"]]
    assert carried_out(monkeypatch, FakeHost(anew=True), repeat=3, jobs=4)[:3] == divided
    assert len(carried_out(monkeypatch, FakeHost(anew=True), repeat=2, jobs=50)) == 2 * len(WANTED)
    assert len(carried_out(monkeypatch, FakeHost(anew=True), repeat=2, jobs=len(WANTED))) == len(WANTED)
    assert len(carried_out(monkeypatch, FakeHost(anew=False), repeat=2, jobs=50)) == 1


def test_an_experiment_gets_a_lab_whose_driver_has_the_parameters_that_it_wants() -> None:
    lab = LabHost(Wish(kernel="debian:6.12", ccp=(("psp_cmd_timeout", "7"),)), say=pytest.fail)
    experiment = SimpleNamespace(ccp={"init_ex_path": "/run/psp/state"})
    suited = lab.suited(experiment)  # type: ignore[arg-type]
    assert suited._wish.ccp == (("init_ex_path", "/run/psp/state"), ("psp_cmd_timeout", "7"))
    assert lab._wish.ccp == (("psp_cmd_timeout", "7"),)


def test_this_machine_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=False)) == [["first 7", "second 7", "third 7"]]


@pytest.mark.parametrize("bad", ["breaking", "spending"])
def test_what_is_broken_is_opened_again(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    machine, lab = FakeHost(anew=False), FakeHost(anew=True)
    for host in (machine, lab):
        setattr(host, bad, "second")
    assert carried_out(monkeypatch, machine) == [["first 7", "second 7"], ["third 7"]]
    assert carried_out(monkeypatch, lab, repeat=2)[1:3] == [["second 7"], ["second 8"]]


@pytest.mark.parametrize("jobs", [1, 2, 3, 5])
def test_as_many_labs_are_open_at_a_time_as_there_are_jobs(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    under_way: list[str] = []
    most: list[int] = []

    async def one(_host: Any, _session: Any, _console: Any, experiment: Any, *_: Any) -> Any:
        under_way.append(experiment.name)
        most.append(len(under_way))
        for _turn in range(10 * (len(WANTED) - WANTED.index(experiment))):  # the first ends last
            await asyncio.sleep(0)
        under_way.remove(experiment.name)
        return SimpleNamespace(broken=None, name=experiment.name)

    monkeypatch.setattr(campaign, "_one", one)
    plan = campaign.Campaign(
        seed=7, repeat=1, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False
    )
    stints = campaign.stints([FakeHost(anew=True)], WANTED, plan)  # type: ignore[list-item, arg-type]
    done: Any = asyncio.run(campaign.carry_out_all(stints, jobs, plan, lambda run, doing: None))
    assert max(most) == min(jobs, len(WANTED))
    assert [result.name for result in done] == ["first", "second", "third"]


def test_one_lab_that_cannot_be_had_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def one(_host: Any, _session: Any, _console: Any, experiment: Any, *_: Any) -> Any:
        if experiment.name == "second":
            raise LabHung("it cannot be had")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(experiment.name)

    monkeypatch.setattr(campaign, "_one", one)
    plan = campaign.Campaign(
        seed=7, repeat=1, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False
    )
    stints = campaign.stints([FakeHost(anew=True)], WANTED, plan)  # type: ignore[list-item, arg-type]
    with pytest.raises(LabHung, match="it cannot be had"):
        asyncio.run(campaign.carry_out_all(stints, 2, plan, lambda run, doing: None))
    assert ended == ["first"]
