# SPDX-License-Identifier: Apache-2.0
"""An ASID that is never handed out: it is missing before the run as after it."""

from __future__ import annotations

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_an_asid_that_nobody_can_have(with_defect: WithDefect) -> None:
    """One that an earlier run of the same lab has leaked looks the same."""
    run = with_defect(smallest("last-asid"))
    assert run.activated
    assert run.outcome("P9") == BROKEN, run.verdicts
