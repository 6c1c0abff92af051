# SPDX-License-Identifier: Apache-2.0
"""How often `sevchaos run` opens a host, and which runs it carries out again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from chaos.cli import run_verb
from chaos.errors import LabHung
from chaos.verdict import Outcome, RunVerdict, Verdict, spoiled, worst

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


def conducted(experiment: Any, *, broken: LabHung | None = None, verdicts: Sequence[Verdict] = ()) -> Any:
    outcome = worst(one.outcome for one in verdicts) if verdicts else Outcome.HELD
    judged = RunVerdict(
        experiment=experiment.name, kernel="6.12.1", host="lab", seed=7, outcome=outcome, verdicts=tuple(verdicts)
    )
    return SimpleNamespace(experiment=experiment, history=None, verdict=judged, directory=Path("runs"), broken=broken)


def carried_out(monkeypatch: pytest.MonkeyPatch, host: FakeHost, repeat: int = 1) -> list[list[str]]:
    async def one(_host: Any, session: Any, _console: Any, experiment: Any, seed: int, *_: Any) -> Any:
        host.sessions[-1].append(f"{experiment.name} {seed}")
        session.spent = "it stays broken" if experiment.name == host.spending else ""
        return conducted(experiment, broken=LabHung("it hangs") if experiment.name == host.breaking else None)

    monkeypatch.setattr(run_verb, "_one", one)
    plan = run_verb._Plan(
        seed=7, repeat=repeat, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False
    )
    stints = run_verb._stints([host], WANTED, plan)  # type: ignore[list-item, arg-type]
    done = asyncio.run(run_verb._all(stints, 1, plan, lambda run, doing: None))
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
        return conducted(experiment)

    monkeypatch.setattr(run_verb, "_one", one)
    plan = run_verb._Plan(seed=7, repeat=1, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False)
    stints = run_verb._stints([FakeHost(anew=True)], WANTED, plan)  # type: ignore[list-item, arg-type]
    done: Any = asyncio.run(run_verb._all(stints, jobs, plan, lambda run, doing: None))
    assert max(most) == min(jobs, len(WANTED))
    assert [one.experiment.name for one in done] == ["first", "second", "third"]


def test_one_lab_that_cannot_be_had_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def one(_host: Any, _session: Any, _console: Any, experiment: Any, *_: Any) -> Any:
        if experiment.name == "second":
            raise LabHung("it cannot be had")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(experiment.name)

    monkeypatch.setattr(run_verb, "_one", one)
    plan = run_verb._Plan(seed=7, repeat=1, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False)
    stints = run_verb._stints([FakeHost(anew=True)], WANTED, plan)  # type: ignore[list-item, arg-type]
    with pytest.raises(LabHung, match="it cannot be had"):
        asyncio.run(run_verb._all(stints, 2, plan, lambda run, doing: None))
    assert ended == ["first"]


BROKE = Verdict(promise="P6", outcome=Outcome.UNKNOWN, reason="it broke", signature="astray-before-move")
EXPECTED = Verdict(
    promise="P5", outcome=Outcome.DEVIATED, reason="as found", signature="guest_status", accepted="finding 0001"
)
OTHER = Verdict(promise="P1", outcome=Outcome.DEVIATED, reason="not charged", signature="charge-missing")
BOTH = Verdict(promise="P5", outcome=Outcome.DEVIATED, reason="two", signature="guest_status+part-unknown+broke-later")
UNASKED = Verdict(promise="P6", outcome=Outcome.UNKNOWN, reason="nobody asked")
REFUSED = Verdict(promise="P5", outcome=Outcome.UNKNOWN, reason="", signature="stopped-before-move:KVM_RUN-EINVAL")


@pytest.mark.parametrize(
    ("verdicts", "runs"),
    [
        ([EXPECTED], 1), ([BROKE], 3), ([BROKE, EXPECTED], 3), ([BOTH], 3), ([BROKE, BOTH], 3),
        ([BROKE, OTHER], 1), ([BROKE, UNASKED], 1), ([UNASKED], 1), ([OTHER], 1), ([REFUSED], 1),
    ],
)  # fmt: skip
def test_only_a_run_that_the_lab_spoiled_is_carried_out_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdicts: list[Verdict], runs: int
) -> None:
    made = []

    async def one(_host: Any, _session: Any, _console: Any, experiment: Any, *_: Any) -> Any:
        made.append(conducted(experiment, verdicts=verdicts))
        return made[-1]

    monkeypatch.setattr(run_verb, "_one", one)
    monkeypatch.setattr(run_verb, "judge", lambda _experiment, _history, known: made[-1].verdict)
    plan = run_verb._Plan(
        seed=7, repeat=1, runs=Path("runs"), timeout=1, known=(), withhold=frozenset(), shared=False, again=2
    )
    stints = run_verb._stints([FakeHost(anew=True)], WANTED[:1], plan)  # type: ignore[list-item, arg-type]
    done = asyncio.run(run_verb._all(stints, 1, plan, lambda run, doing: None))
    assert len(made) == runs and done == made[-1:]
    assert capsys.readouterr().err.count("the lab broke a guest of first, see runs: once more") == runs - 1


def test_on_a_real_host_a_guest_that_breaks_is_told_and_nothing_else() -> None:
    judged = conducted(WANTED[0], verdicts=[BROKE]).verdict
    assert spoiled(judged) and not spoiled(msgspec.structs.replace(judged, host="local"))
    assert not spoiled(msgspec.structs.replace(judged, left="a cgroup"))
