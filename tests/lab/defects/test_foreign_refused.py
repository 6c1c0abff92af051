# SPDX-License-Identifier: Apache-2.0
"""Every move from a VM of another process is told EBADF."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.defects.conftest import BROKEN, WithDefect, also, smallest

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_a_descriptor_that_was_received_and_is_refused(with_defect: WithDefect) -> None:
    run = with_defect(smallest("foreign-refused"))
    assert run.activated
    assert run.outcome("P7") == BROKEN, run.verdicts


def test_it_in_the_catalogue(with_defect: WithDefect, tmp_path: Path) -> None:
    run = with_defect(also("two-destinations-for-one-source", "foreign-refused", tmp_path))
    assert run.activated
    assert run.outcome("P7") == BROKEN, run.verdicts
