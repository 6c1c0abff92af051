# SPDX-License-Identifier: Apache-2.0
"""What misc.peak and misc.events.local tell, where a kernel has them: 6.12, and not 6.1."""

from __future__ import annotations

import pytest

from tests.lab.defects.conftest import BROKEN, KEPT, SKIPPED, WithDefect, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]

WITHOUT = "debian:6.1"


def test_a_charge_that_is_made_twice_and_given_back_once(with_defect: WithDefect, kernel: str) -> None:
    """Where nobody remembers it the verdict says so."""
    run = with_defect(smallest("charged-twice"))
    assert run.activated
    if kernel == WITHOUT:
        assert run.outcome("P1") == KEPT and "misc.peak" in run.verdicts["P1"]["reason"]
    else:
        assert run.outcome("P1") == BROKEN, run.verdicts


def test_an_event_that_is_counted_at_another_level(with_defect: WithDefect, kernel: str) -> None:
    """The totals are right. 6.1 has no events of a level alone, so that nothing can be wrong about them."""
    run = with_defect(smallest("event-elsewhere"))
    if kernel == WITHOUT:
        assert run.outcome("P10") == SKIPPED, run.verdicts
    else:
        assert run.activated
        assert run.outcome("P10") == BROKEN, run.verdicts
