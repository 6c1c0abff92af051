# SPDX-License-Identifier: Apache-2.0
"""P9: what is left at the end, in every place where it shows."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Exited, Filled, Header, Observation, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import MOVE, Change, charge, check, replaced, without


@pytest.mark.parametrize(
    ("change", "signature"),
    [
        (charge("end", ".", 1), "charge-left:sev"),
        (charge("end", "destination", 1, "sev_es"), "charge-left:sev_es"),
        (replaced(Observation, {"label": "end"}, guests=1), "firmware-counts-more"),
        (replaced(Observation, {"label": "start"}, guests=1), "firmware-counts-fewer"),
        (replaced(Observation, {"label": "end"}, dying=1), "dying-cgroups"),
        (replaced(Observation, {"label": "end"}, pinned=6), "more-pages-pinned"),
        (replaced(Observation, {"label": "end"}, pinned=4), "fewer-pages-pinned"),
        (replaced(Filled, {"label": "end"}, count={"sev": 7, "sev_es": 7}), "fewer-contexts:sev"),
        (replaced(Filled, {"label": "start"}, count={"sev": 8, "sev_es": 6}), "more-contexts:sev_es"),
    ],
)
def test_p9_deviations(change: Change, signature: str) -> None:
    verdict = check("P9", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(Observation, label="start"), "not observed at the start"),
        (without(Observation, label="end"), "not observed at the end"),
        (without(Filled, label="start"), "not filled to capacity at the start"),
        (without(Filled), "not filled to capacity at the start and end"),
        (replaced(Filled, {}, count={}), "no key was filled"),
        (replaced(Filled, {"label": "end"}, errno={"sev": errno.ENOMEM, "sev_es": errno.EBUSY}), "different reasons"),
        (replaced(Observation, {"label": "end"}, guests=None), "the firmware could not be asked"),
        (replaced(Observation, {"label": "end"}, misc={}), "were not read at its end"),
        (replaced(Observation, {"label": "end"}, pinned=None), "pages of the host were not counted"),
        (replaced(Observation, {"label": "start"}, pinned=None), "pages of the host were not counted"),
        (without(Exited, agent="source"), "source still lived"),
    ],
)
def test_p9_needs_its_witnesses(change: Change, reason: str) -> None:
    verdict = check("P9", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


@pytest.mark.parametrize(("shared", "outcome"), [(False, Outcome.UNKNOWN), (True, Outcome.SKIPPED)])
def test_p9_on_a_host_with_others_a_pin_may_be_theirs(shared: bool, outcome: Outcome) -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == "end":
            return msgspec.structs.replace(record, pinned=6)
        return msgspec.structs.replace(record, host="local", shared=shared) if isinstance(record, Header) else record

    verdict = check("P9", MOVE, change)
    assert verdict.outcome is outcome and "others on this host may pin some too" in verdict.reason


def test_p9_a_spawn_that_failed_leaves_no_process() -> None:
    b = Builder()
    b.begin()
    b.do("spawn", "third", cgroup="third", error=errno.EAGAIN)
    assert CHECKERS["P9"](shipped(MOVE), b.finish()).outcome is Outcome.KEPT
