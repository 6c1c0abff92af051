# SPDX-License-Identifier: Apache-2.0
"""Histories of sweeps: every point failed once or the run says nothing, and what a point failed in may say ENOMEM."""

from __future__ import annotations

import json
from errno import EBUSY, EFAULT, EINVAL, ENOMEM
from pathlib import Path

import pytest

from chaos.errors import UsageError
from chaos.experiment.load import load
from chaos.experiment.model import Experiment
from chaos.history.records import History, Value
from chaos.judge.checkers import CHECKERS
from chaos.judge.judge import judge, shortcomings
from chaos.judge.verdict import Outcome
from chaos.runner.script.sweeps import fail_each
from reports import as_json, sentences
from reports.run import Run
from tests.unit.core.build import Builder
from tests.unit.core.doctored import see

TEXT = """
name: swept
why: It is swept. It is judged.
promises: [P1, P7]
vmms: {{source: {{cgroup: source}}, other: {{cgroup: other}}}}
vms: {{vm: {{vmm: source, kind: sev}}, new: {{vmm: other, kind: plain}}}}
script:
  - do: sweep
    before: [{{do: create, vm: vm}}]
    step: {step}
    after: [{{do: close, vm: vm}}]
"""
Round = tuple[int, int, int]  # the point, whether there was one, and the errno; 0 for how many there were
WHOLE: tuple[Round, ...] = ((0, 2, 0), (0, 3, 0), (1, 1, EFAULT), (2, 1, ENOMEM), (3, 0, 0), (3, 0, 0))


def swept(path: Path, step: str = "{do: init, vm: vm}") -> Experiment:
    file = path / "swept.yaml"
    file.write_text(TEXT.format(step=step))
    return load(file)


def history(rounds: tuple[Round, ...], *, charged: bool = False) -> History:
    """`charged` if the charge of the first INIT that failed is kept."""
    b = Builder("swept")
    b.spawn("source")
    see(b, "start")
    for nth, struck, error in rounds:
        b.do("create", "source", step=0, vm="vm", kind="sev", vcpus=1, memory="guest")
        init = b.invoke("init", "source", step=0, vm="vm", key="sev")
        value: dict[str, Value] = {"fail_nth": nth, "struck": struck if nth else 0, "points": 3 if nth else struck}
        b.done(init, "fail" if error else "ok", error=error, value=value)
        if error:
            see(b, f"failed-{nth}", {"source": int(charged)})
            b.do("init", "source", step=0, vm="vm", key="sev")
        see(b, f"made-{nth}", {"source": 1 + int(charged)})
        b.do("close", "source", step=0, vm="vm")
    see(b, "end")
    return b.finish()


def test_a_sweep_that_came_to_its_end_is_judged(tmp_path: Path) -> None:
    experiment, told = swept(tmp_path), history(WHOLE)
    assert list(shortcomings(experiment, told)) == []
    verdict = CHECKERS["P7"](experiment, told)
    assert verdict.outcome is Outcome.KEPT, verdict
    assert "init of vm: EFAULT, init of vm: ENOMEM" in verdict.reason
    assert CHECKERS["P1"](experiment, told).outcome is Outcome.KEPT


@pytest.mark.parametrize(
    ("rounds", "why"),
    [
        (((0, 0, 0), (0, 0, 0)), "there is no fault point in init of vm"),
        (WHOLE[:3], "not every fault point of init of vm failed"),
        ((*WHOLE[:2], *WHOLE[3:]), "not every fault point of init of vm failed"),
        ((*WHOLE[:3], (2, 0, 0), *WHOLE[4:]), "not every fault point of init of vm failed"),
        (((0, 0, 0), (0, 1, 0), (1, 0, 0)), "not every fault point of init of vm failed"),
        ((*WHOLE, (0, 1, EBUSY)), "init of vm was refused although no fault point of it was to fail"),
        (WHOLE[1:], "the fault points of init of vm were not counted, and counted again"),
        ((), "the fault points of init of vm were not counted, and counted again"),
    ],
    ids=[
        "none",
        "broken off",
        "one left out",
        "one not met",
        "one met never",
        "count refused",
        "counted once",
        "nothing made",
    ],
)
def test_one_that_did_not_says_nothing(rounds: tuple[Round, ...], why: str, tmp_path: Path) -> None:
    assert list(shortcomings(swept(tmp_path), history(rounds))) == [f"the run is void: step 0: {why}"]


def test_an_errno_that_no_point_has_is_not_excused(tmp_path: Path) -> None:
    rounds = ((0, 1, 0), (0, 1, 0), (1, 1, EBUSY))
    verdict = CHECKERS["P7"](swept(tmp_path), history(rounds))
    assert verdict.outcome is Outcome.BROKEN
    assert "init of vm: EBUSY, expected EFAULT or EIO of the firmware or ENOMEM or ok" in verdict.reason


def test_without_a_point_that_failed_enomem_is_wrong(tmp_path: Path) -> None:
    verdict = CHECKERS["P7"](swept(tmp_path), history(((0, 1, 0), (1, 1, EFAULT), (2, 0, ENOMEM))))
    assert verdict.outcome is Outcome.BROKEN
    assert "init of vm: ENOMEM, expected EIO of the firmware or ok" in verdict.reason


def told_late(*, again: int, charged: int, firmware: int = 0) -> History:
    """INIT answers EFAULT, for the copy that failed may have been the last one; the same `again`, and what is charged
    then."""
    b = Builder("swept")
    b.spawn("source")
    see(b, "start")
    b.do("create", "source", step=0, vm="vm", kind="sev", vcpus=1, memory="guest")
    init = b.invoke("init", "source", step=0, vm="vm", key="sev")
    value: dict[str, Value] = {"fail_nth": 1, "struck": 1, "call": "KVM_MEMORY_ENCRYPT_OP KVM_SEV_INIT"}
    b.done(init, "fail", error=EFAULT, firmware=firmware, value=value)
    b.do("init", "source", step=0, vm="vm", key="sev", error=again)
    for label in ("made", "still"):
        see(b, label, {"source": charged})
    b.do("close", "source", step=0, vm="vm")
    see(b, "end")
    return b.finish()


@pytest.mark.parametrize(
    ("again", "charged", "p1", "p7"),
    [
        (EINVAL, 1, Outcome.KEPT, Outcome.KEPT),  # it had been made
        (0, 1, Outcome.KEPT, Outcome.KEPT),  # it had not
        (0, 2, Outcome.BROKEN, Outcome.KEPT),  # and had kept a charge
        (EBUSY, 1, Outcome.KEPT, Outcome.BROKEN),
    ],
)
def test_efault_of_a_command_may_come_after_its_effect(
    again: int, charged: int, p1: Outcome, p7: Outcome, tmp_path: Path
) -> None:
    told = told_late(again=again, charged=charged)
    assert [CHECKERS[promise](swept(tmp_path), told).outcome for promise in ("P1", "P7")] == [p1, p7]


def test_what_the_firmware_had_answered_until_then_comes_along(tmp_path: Path) -> None:
    told = told_late(again=0, charged=1, firmware=4)
    assert CHECKERS["P7"](swept(tmp_path), told).outcome is Outcome.KEPT


def test_a_charge_that_a_failed_init_kept_is_seen(tmp_path: Path) -> None:
    assert CHECKERS["P1"](swept(tmp_path), history(WHOLE, charged=True)).outcome is Outcome.BROKEN


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("{do: call, vm: vm, operation: launch_start, wait: false}", "left under way cannot be swept"),
        ("{do: init, vm: vm, each: flags}", "an INIT for each bit of the flags is many operations"),
        ("{do: run, vm: vm, every: 0}", "a guest that never leaves would never be let go of"),
        ("{do: migrate, source: vm, destination: new, supervise: retry}", "makes what was refused once more by itself"),
        ("{do: count, vm: vm, ticks: 5}", "count"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_its_place(step: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        swept(tmp_path, step)
    assert "script[0]" in caught.value.message


@pytest.mark.parametrize(
    ("step", "operation"),
    [
        ("{do: create, vm: vm}", ("vm", "create")),
        ("{do: call, vm: vm, operation: launch_measure}", ("vm", "launch_measure")),
        ("{do: vcpu, vm: vm, id: 3}", ("vm", "create_vcpu")),
        ("{do: memslot, vm: vm}", ("vm", "set_memory")),
        ("{do: move, fd: pipe, destination: vm}", ("vm", "move")),
        ("{do: irqfd, vm: vm, gsis: '48'}", ("vm", "irqfd")),
        ("{do: migrate, source: vm, destination: new}", ("vm", "get_state")),
        ("{do: run, vm: vm}", ("vm", "run")),
        ("{do: close, vm: vm}", ("vm", "close")),
        ("{do: platform, vmm: source, command: GET_ID2}", ("", "platform")),
    ],
)
def test_which_operation_is_swept(step: str, operation: tuple[str, str], tmp_path: Path) -> None:
    (only,) = swept(tmp_path, step).script
    assert only.operation == operation  # type: ignore[union-attr]


def test_a_command_of_the_platforms_is_on_no_vm(tmp_path: Path) -> None:
    experiment = swept(tmp_path, "{do: platform, vmm: source, command: GET_ID2, length: 64}")

    def told(rounds: tuple[Round, ...]) -> History:
        b = Builder("swept")
        b.spawn("source")
        for nth, struck, error in rounds:
            asked = b.invoke("platform", "source", step=0, command="GET_ID2", length=64)
            value: dict[str, Value] = {"fail_nth": nth, "struck": struck if nth else 0, "points": 1}
            b.done(asked, "fail" if error else "ok", error=error, value=value)
        return b.finish()

    rounds = ((0, 1, 0), (0, 1, 0), (1, 1, EFAULT))
    assert list(shortcomings(experiment, told(rounds))) == []
    short = "the run is void: step 0: not every fault point of GET_ID2 failed"
    assert list(shortcomings(experiment, told(rounds[:2]))) == [short]


@pytest.mark.parametrize(
    ("met", "tried"),
    [
        ({1: 1, 2: 1, 3: 1}, [1, 2, 3]),
        ({1: 1, 2: 2, 3: 3}, [1, 2, 3, 2, 3, 3]),
        ({1: 1, 3: 1}, [1, 2, 3, 2, 2]),  # of the second nobody knows
        ({}, [1, 2, 3, 1, 2, 3, 1, 2, 3]),
    ],
)
def test_what_is_not_met_is_tried_again(met: dict[int, int], tried: list[int]) -> None:
    """`met` is at which try."""
    made: list[int] = []

    def fails(nth: int) -> bool:
        made.append(nth)
        return made.count(nth) == met.get(nth)

    fail_each(3, fails)
    assert made == tried


def test_a_report_says_how_many_points_there_are_and_how_many_failed(tmp_path: Path) -> None:
    experiment, told = swept(tmp_path), history(WHOLE)
    said = sentences.result(experiment, told, 0)
    assert said.startswith("2 or 3 fault points: 2 failed, for 2 of them it was refused, ")
    run = Run(experiment, told, judge(experiment, told), tmp_path)
    (found,) = json.loads(as_json.render([run]))["runs"][0]["sweeps"]
    assert found == {
        "step": 0, "vm": "vm", "operation": "init", "points": 3, "tried": 3, "failed": 2, "refused": 2,
    }  # fmt: skip
