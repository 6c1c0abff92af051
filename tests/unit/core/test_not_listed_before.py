# SPDX-License-Identifier: Apache-2.0
"""What checkers took for deviations in experiments that did not list their promise, and is none."""

from __future__ import annotations

from errno import EBADF, EINTR, EINVAL, ENOTTY

import msgspec
import pytest

from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep
from chaos.history.records import Fault, History
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE, begun, verdict_of


def limits(b: Builder, label: str) -> None:
    for files in b.observe(label, {"source": 1}).misc.values():
        files |= {"max": {}, "events": {"sev.max": 0, "sev_es.max": 0}}


def left_out(
    answer: int,
    *,
    value: str = "-EINTR",
    struck: bool = True,
    when: str = "meanwhile",
    planted: bool = False,
    withheld: bool = False,
) -> Verdict:
    """P7 of a move that was answered so while a function of the kernel was left out, or before or after that."""
    options: dict[str, str | int | float | bool] = {"function": "f", "value": value, "planted": planted}
    strike = FaultStep(fault="kernel-return", target="destination", options=options)
    experiment: Experiment = msgspec.structs.replace(shipped(MOVE), script=(strike,))
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    limits(b, "before")
    done = Fault(t=0, fault="kernel-return", event="evidence", step=0, target="destination", struck=struck)
    begun_as = "withheld" if withheld else "apply"
    faults = [msgspec.structs.replace(done, event=begun_as, struck=None), done]
    faults.append(msgspec.structs.replace(done, event="undo", struck=None))
    for fault, moment in zip((*faults, None), ("before", "meanwhile", "", "after"), strict=True):
        if when == moment:
            b.move("old", "new", "destination", error=answer)
        if fault is not None:
            b.add(msgspec.structs.replace(fault, t=b.tick()))
    limits(b, "after")
    return CHECKERS["P7"](experiment, b.end())


def test_an_errno_that_a_fault_has_chosen_is_none_of_the_kernels() -> None:
    assert left_out(EINTR).outcome is Outcome.UNKNOWN
    assert left_out(EINTR, value="-4").outcome is Outcome.UNKNOWN
    for wrong in (
        left_out(EINVAL),
        left_out(EINTR, value="-EBUSY"),
        left_out(EINTR, value="0"),
        left_out(EINTR, struck=False),
        left_out(EINTR, when="before"),
        left_out(EINTR, when="after"),
        left_out(EINTR, struck=False, withheld=True),
        left_out(EINTR, planted=True),
    ):
        assert wrong.outcome is Outcome.BROKEN, wrong.reason


def slot(*, move_over: bool, error: int = 0) -> History:
    """A slot of the source is taken away while its move is held behind the commit, or after the move."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    limits(b, "before")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold_at(move, function="sev_init_vmcb")
    if move_over:
        b.done(move)
    b.do("set_memory", "source", vm="old", there=False, error=error)
    if not move_over:
        b.done(move)
    return b.end()


def test_a_source_may_answer_until_its_move_is_over() -> None:
    assert verdict_of("P7", slot(move_over=False)).outcome is not Outcome.BROKEN
    late = verdict_of("P7", slot(move_over=True))
    assert (late.outcome, late.signature) == (Outcome.BROKEN, "set_memory:ok-for-EIO")


@pytest.mark.parametrize(("key", "error"), [("", ENOTTY), ("sev", EBADF)])
def test_who_was_never_asked_and_has_no_context_need_not_answer_after_a_failed_move(key: str, error: int) -> None:
    b = begun()
    b.do("create", "source", vm="old", kind=key or "plain", vcpus=1, memory="guest")
    if key:
        b.do("init", "source", vm="old", key=key)
    b.launch("new", "source")
    b.observe("before", {"source": 1} if key else {})
    b.move("old", "new", "source", error=EINVAL)
    b.observe("after", {"source": 1} if key else {})
    b.status("old", "source", error=error)
    assert verdict_of("P6", b.end()).outcome is Outcome.UNKNOWN
