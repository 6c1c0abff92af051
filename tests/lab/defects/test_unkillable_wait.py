# SPDX-License-Identifier: Apache-2.0
"""A move that waits for a vCPU and cannot be killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, also, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_a_wait_that_a_fatal_signal_does_not_end(with_defect: WithDefect) -> None:
    run = with_defect(smallest("unkillable-wait"))
    assert run.activated
    assert run.outcome("P8") == BROKEN, run.verdicts


def test_it_in_the_catalogue(with_defect: WithDefect, tmp_path: Path) -> None:
    run = with_defect(also("kill-destination-in-move", "unkillable-wait", tmp_path))
    assert run.activated
    assert run.outcome("P8") == BROKEN, run.verdicts
