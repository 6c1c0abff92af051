# SPDX-License-Identifier: Apache-2.0
"""A refused move that marks its destination dead. That sockets of the destination's can be closed shows nothing."""

from __future__ import annotations

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_a_destination_that_is_dead_after_a_refusal(with_defect: WithDefect) -> None:
    """No step of the experiment asks the destination anything after its migration was refused."""
    run = with_defect(smallest("dead-destination"))
    assert run.activated
    assert run.outcome("P6") == BROKEN, run.verdicts
