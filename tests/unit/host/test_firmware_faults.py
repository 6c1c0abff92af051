# SPDX-License-Identifier: Apache-2.0
"""Faults of the firmware against an outside that is played: what is asked of it, in which order, and what is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chaos import fault
from chaos.errors import Unsupported, UsageError
from chaos.linux.task import Sleeper
from chaos.runner.holds.failpoints import RunFailpoints, waits_for_answer
from chaos.runner.questions import (
    ArmFailpoints,
    FailpointCount,
    Granted,
    LookAtFailpoints,
    Looked,
    OutsideAnswer,
    OutsideQuestion,
    WithdrawFailpoints,
)
from faults import firmware as faults

IOCTL = (16, 7, 0xC008AEBA, 0, 0, 0, 0)
CLOSE = (3, 7, 0, 0, 0, 0, 0)


@dataclass
class Played:
    """An outside that grants everything and has `points` to tell."""

    points: tuple[FailpointCount, ...] = ()
    asked: list[OutsideQuestion] = field(default_factory=list)

    def ask(self, question: OutsideQuestion) -> OutsideAnswer:
        self.asked.append(question)
        return Looked(points=self.points, stalled="") if isinstance(question, LookAtFailpoints) else Granted()


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def patience(tmp_path: Path) -> Path:
    path = tmp_path / "psp_cmd_timeout"
    path.write_text("100\n")
    return path


@pytest.fixture
def ctx(played: Played, patience: Path) -> Any:
    platform = SimpleNamespace(status=lambda: SimpleNamespace(state=int(patience.read_text())))
    return SimpleNamespace(firmware=RunFailpoints(played, 1, platform, patience))  # type: ignore[arg-type]


def firmware(plan: str, **options: object) -> faults.Firmware:
    found = fault.find("firmware", {"plan": plan, **options})
    assert isinstance(found, faults.Firmware)
    return found


def test_a_fault_follows_its_plan_until_it_is_undone(played: Played, ctx: Any, patience: Path) -> None:
    found = firmware("NOP=skip; INIT#2=stall")
    assert found.evidence(ctx, "").struck is False, "it was not applied"
    found.apply(ctx, "")
    played.points = (FailpointCount(failpoint="NOP=skip", count=1, first=1_500_000_000, last=1_500_000_000),)
    played.points += (FailpointCount(failpoint="INIT#2=stall", count=0),)
    seen = found.evidence(ctx, "")
    assert seen.struck is None, "not yet: each of them must"
    assert seen.detail == "NOP=skip struck at 1.500000; INIT#2=stall did not strike"
    played.points = (FailpointCount(failpoint="NOP=skip", count=3, first=1, last=2_000_000_000),)
    seen = found.evidence(ctx, "")
    assert seen.struck is True
    assert seen.detail == "NOP=skip struck 3 times, from 0.000000 to 2.000000"
    assert ctx.firmware.may_stall
    found.undo(ctx, "")
    assert not ctx.firmware.may_stall
    assert [type(question) for question in played.asked] == [
        ArmFailpoints,
        LookAtFailpoints,
        LookAtFailpoints,
        WithdrawFailpoints,
    ]
    assert patience.read_text() == "100\n", "nothing in the plan needs the driver to give up"


@pytest.mark.parametrize(("options", "seconds"), [({}, 2), ({"patience": 7}, 7)])
def test_the_driver_is_made_impatient_with_the_dead(
    options: dict[str, object], seconds: int, played: Played, ctx: Any, patience: Path
) -> None:
    found = firmware("NOP=dead", **options)
    found.apply(ctx, "")
    assert int(patience.read_text()) == seconds
    found.undo(ctx, "")
    assert int(patience.read_text()) == 100
    assert isinstance(played.asked[0], ArmFailpoints), (
        "and the driver has looked at the parameter before the plan is in force"
    )


def test_without_the_device_the_driver_cannot_be_told(played: Played, patience: Path) -> None:
    firmware = RunFailpoints(played, 1, None, patience)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="/dev/sev"):
        firmware.set_patience(3)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"plan": "NOPE=skip"}, "there is no command 'NOPE'"),
        ({"plan": "NOP=skip", "patience": -1}, "patience is 0 to 600 seconds, not -1"),
        ({"plan": 5}, "plan: expected text, got a whole number"),
        ({}, "plan: it is missing"),
        ({"plans": ""}, "has no option 'plans'"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(options: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        fault.find("firmware", options)
    assert problem in refused.value.message
    assert "its options are plan, patience" in refused.value.remedy


@pytest.mark.parametrize(
    ("sleeper", "waits"),
    [
        (Sleeper(state="D", wchan="sev_wait_cmd_ioc", call=IOCTL), True),
        (Sleeper(state="D", stack=("__sev_do_cmd_locked", "sev_do_cmd"), call=IOCTL), True),
        (Sleeper(state="D", wchan="sev_wait_cmd_ioc", call=CLOSE), True),
        (Sleeper(state="D", wchan="sev_wait_cmd_ioc", call=(16, 7, 0xAE80)), False),
        (Sleeper(state="S", wchan="sev_wait_cmd_ioc", call=IOCTL), False),
        (Sleeper(state="D", wchan="sev_do_cmd", call=IOCTL), False),
        (Sleeper(state="R"), False),
    ],
)
def test_where_a_thread_waits_for_the_firmware(sleeper: Sleeper, waits: bool) -> None:
    """In the driver, and not for its turn there (`sev_do_cmd`), in a command of a VM or at the end of one."""
    assert waits_for_answer(sleeper) is waits
