# SPDX-License-Identifier: Apache-2.0
"""What the kernel itself says of a defect: SLUB of a red zone, the watch over tasks of one that is never woken.

6.12.117 also warns (WARN_ON in object_err()) whenever SLUB reports; 6.1 does not, so the report itself has to be known.
"""

from __future__ import annotations

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_a_red_zone_that_was_written_to(with_defect: WithDefect) -> None:
    run = with_defect(smallest("slab-overrun"))
    assert run.activated
    assert run.outcome("P12") == BROKEN, run.verdicts
    assert "BUG planted_move" in run.verdicts["P12"]["reason"], "the report, and not the warning that some kernels add"


def test_a_task_that_hangs_for_longer_than_the_kernel_puts_up_with(with_defect: WithDefect) -> None:
    """For 25 seconds, after which the move goes on as if nothing had been."""
    run = with_defect(smallest("lost-wakeup"))
    assert run.activated
    assert run.outcome("P12") == BROKEN, run.verdicts
