# SPDX-License-Identifier: Apache-2.0
"""GUEST_STATUS that is not permitted to whoever got its context by a move."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.defects.conftest import BROKEN, KEPT, WithDefect, also, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_an_owner_that_may_not_ask(with_defect: WithDefect) -> None:
    """Its answer shows no owner, so P4 is not kept; that an owner is refused its own status breaks P5."""
    run = with_defect(smallest("status-refused"))
    assert run.activated
    assert run.outcome("P5") == BROKEN and run.outcome("P4") != KEPT, run.verdicts


def test_it_in_the_catalogue(with_defect: WithDefect, tmp_path: Path) -> None:
    """It lists P4 and neither P5 nor P7."""
    run = with_defect(also("stop-source-in-move", "status-refused", tmp_path))
    assert run.activated
    assert run.outcome("P5") == BROKEN and run.outcome("P4") != KEPT, run.verdicts
