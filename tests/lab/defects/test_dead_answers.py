# SPDX-License-Identifier: Apache-2.0
"""A dead VM of which one thing still answers: an ioctl among many, a descriptor of a kind of its own."""

from __future__ import annotations

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


@pytest.mark.parametrize("defect", ["region-answers", "device-answers"])
def test_what_a_dead_vm_answers(with_defect: WithDefect, defect: str) -> None:
    """Nobody saw it as long as nobody asked: then the defect is not activated either."""
    run = with_defect(smallest(defect))
    assert run.activated
    assert run.outcome("P3") == BROKEN, run.verdicts
