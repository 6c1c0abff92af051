# SPDX-License-Identifier: Apache-2.0
"""A killed move that leaves its source marked as being moved, so that no other move of it is let in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, also, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_a_guest_that_can_never_be_moved_again(with_defect: WithDefect) -> None:
    run = with_defect(smallest("flag-left"))
    assert run.activated
    assert run.outcome("P6") == BROKEN, run.verdicts


def test_two_heirs_of_whom_neither_gets_anything(with_defect: WithDefect, tmp_path: Path) -> None:
    """Each try of two loops is told EBUSY, and either might have been the other's fault."""
    run = with_defect(also("two-heirs", "flag-left", tmp_path))
    assert run.activated
    assert BROKEN in {run.outcome(promise) for promise in ("P6", "P7") if promise in run.verdicts}, run.verdicts
