# SPDX-License-Identifier: Apache-2.0
"""How often `sevchaos run` opens a host: a lab anew when a run left traces in it, this machine once for all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.controller import campaign
from chaos.controller.lab_host import LabHost
from chaos.errors import LabHung
from chaos.history.records import History, Kernel
from chaos.judge.verdict import Outcome, Verdict
from chaos.lab.session import Wish

WANTED = [SimpleNamespace(name=name) for name in ("first", "second", "third")]


CLEAN = {"P9": "kept", "P12": "kept"}


def ended(broken: LabHung | None = None, left: str = "", **outcomes: Any) -> Any:
    """What came of a run: what broke the host, what it left, and how promises ended beside those of `CLEAN`."""
    told = [Verdict(promise=p, outcome=Outcome(o), reason="") for p, o in {**CLEAN, **outcomes}.items()]
    verdict = SimpleNamespace(verdicts=told, left=left)
    return SimpleNamespace(broken=broken, verdict=verdict, history=History(()))


@dataclass
class FakeHost:
    """Notes what is carried out in each session. `breaking` breaks the host, `spending` leaves a fault in it, `leaking`
    a trace."""

    anew: bool
    breaking: str = ""
    spending: str = ""
    leaking: str = ""
    sessions: list[list[str]] = field(default_factory=list, compare=False)
    wants: str = ""

    def suited(self, experiment: Any) -> FakeHost:
        return replace(self, wants=getattr(experiment, "wants", ""))

    @contextlib.asynccontextmanager
    async def open(self, console: Callable[[str], None]) -> AsyncIterator[Any]:
        self.sessions.append([])
        yield SimpleNamespace(spent="")


def campaign_of(*, repeat: int = 1, fresh: bool = False) -> campaign.Campaign:
    return campaign.Campaign(seed=7, repeat=repeat, runs=Path("runs"), timeout=1, known=(), fresh=fresh)


def carried_out(
    monkeypatch: pytest.MonkeyPatch, host: FakeHost, wanted: Sequence[Any] = WANTED, **order: Any
) -> list[list[str]]:
    """What each session carried out, one after the other."""

    async def one(session: Any, _console: Any, run: Any, *_: Any) -> Any:
        name = run.experiment.name
        host.sessions[-1].append(f"{name} {run.seed}")
        session.spent = "it stays broken" if name == host.spending else ""
        broken = LabHung("it hangs") if name == host.breaking else None
        return ended(broken, "", **({"P9": "broken"} if name == host.leaking else {}))

    monkeypatch.setattr(campaign, "_one", one)
    campaign_ = campaign_of(**order)
    planned = campaign.plan([host], wanted, campaign_)  # type: ignore[list-item]
    done = asyncio.run(campaign.carry_out_all(planned, 1, campaign_, lambda run, doing: None))
    assert len(done) == len(planned) == len(wanted) * campaign_.repeat
    return host.sessions


ALL = ["first 7", "second 7", "third 7"]


@pytest.mark.parametrize("anew", [True, False])
def test_a_host_is_opened_once_for_runs_that_leave_no_trace(monkeypatch: pytest.MonkeyPatch, *, anew: bool) -> None:
    assert carried_out(monkeypatch, FakeHost(anew)) == [ALL]


def test_a_lab_with_traces_is_left_and_this_machine_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=True, leaking="second")) == [ALL[:2], ALL[2:]]
    assert carried_out(monkeypatch, FakeHost(anew=False, leaking="second")) == [ALL]
    twice = carried_out(monkeypatch, FakeHost(anew=True, leaking="second"), repeat=2)
    assert twice == [["first 7", "first 8", "second 7"], ["second 8"], ["third 7", "third 8"]]


def test_fresh_is_a_lab_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(monkeypatch, FakeHost(anew=True), fresh=True) == [[run] for run in ALL]
    assert carried_out(monkeypatch, FakeHost(anew=False), fresh=True) == [ALL]


def test_runs_that_want_the_same_lab_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [SimpleNamespace(name=name, wants=wants) for name, wants in zip("abcd", "1213", strict=True)]
    assert carried_out(monkeypatch, FakeHost(anew=True), wanted) == [["a 7", "c 7"], ["b 7"], ["d 7"]]


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (ended(), ""),
        (ended(P3="broken", P4="unknown", P5="broken", P6="broken", P7="broken", P10="broken"), ""),
        (ended(P1="unknown", P8="skipped"), ""),
        (ended(P9="skipped", P12="skipped"), ""),
        (ended(left="cgroup x"), "cgroup x"),
        (ended(P9="skipped", P12="skipped", left="cgroup x"), "cgroup x"),
        (ended(P9="unknown"), "P9 unknown"),
        (ended(P9="skipped"), "P9 skipped"),
        (ended(P12="broken"), "P12 broken"),
        (ended(P1="broken", P14="broken", left="cgroup x"), "cgroup x, P1 broken, P14 broken"),
        *((ended(None, "", **{p: "broken"}), f"{p} broken") for p in ("P1", "P2", "P8", "P11", "P13", "P14")),
    ],
)
def test_what_a_run_leaves_for_the_next_one(run: Any, told: str) -> None:
    assert campaign.traces(run.verdict, run.history) == told


def test_what_a_skipped_run_has_read_of_the_one_before_is_a_trace() -> None:
    skipped = ended(P9="skipped", P12="skipped")
    for text, trace in (("BUG: workqueue lockup", "P9 skipped, P12 skipped"), ("eth0: link becomes ready", "")):
        history = History((Kernel(t=1, level=4, text=text),))
        assert campaign.traces(skipped.verdict, history) == trace


def test_an_experiment_gets_a_lab_whose_driver_has_the_parameters_that_it_wants() -> None:
    lab = LabHost(Wish(kernel="debian:6.12", ccp=(("psp_cmd_timeout", "7"),)), say=pytest.fail)
    experiment = SimpleNamespace(ccp={"init_ex_path": "/run/psp/state"})
    suited = lab.suited(experiment)  # type: ignore[arg-type]
    assert suited._wish.ccp == (("init_ex_path", "/run/psp/state"), ("psp_cmd_timeout", "7"))
    assert lab._wish.ccp == (("psp_cmd_timeout", "7"),)


@pytest.mark.parametrize("bad", ["breaking", "spending"])
def test_what_is_broken_is_opened_again(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    machine, lab = FakeHost(anew=False), FakeHost(anew=True)
    for host in (machine, lab):
        setattr(host, bad, "second")
    assert carried_out(monkeypatch, machine) == carried_out(monkeypatch, lab) == [ALL[:2], ALL[2:]]


@pytest.mark.parametrize("jobs", [1, 2, 3, 5])
def test_as_many_labs_are_open_at_a_time_as_there_are_jobs(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    under_way: list[str] = []
    most: list[int] = []

    async def one(_session: Any, _console: Any, run: Any, *_: Any) -> Any:
        experiment = run.experiment
        under_way.append(experiment.name)
        most.append(len(under_way))
        for _turn in range(10 * (len(WANTED) - WANTED.index(experiment))):  # the first ends last
            await asyncio.sleep(0)
        under_way.remove(experiment.name)
        return SimpleNamespace(**vars(ended()), name=experiment.name)

    monkeypatch.setattr(campaign, "_one", one)
    order = campaign_of()
    planned = campaign.plan([FakeHost(anew=True)], WANTED, order)  # type: ignore[list-item, arg-type]
    done: Any = asyncio.run(campaign.carry_out_all(planned, jobs, order, lambda run, doing: None))
    assert max(most) == min(jobs, len(WANTED))
    assert [result.name for result in done] == ["first", "second", "third"]


def test_one_lab_that_cannot_be_had_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    async def one(_session: Any, _console: Any, run: Any, *_: Any) -> Any:
        if run.experiment.name == "second":
            raise LabHung("it cannot be had")
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(run.experiment.name)

    monkeypatch.setattr(campaign, "_one", one)
    order = campaign_of()
    planned = campaign.plan([FakeHost(anew=True)], WANTED, order)  # type: ignore[list-item, arg-type]
    with pytest.raises(LabHung, match="it cannot be had"):
        asyncio.run(campaign.carry_out_all(planned, 2, order, lambda run, doing: None))
    assert stopped == ["first"]
