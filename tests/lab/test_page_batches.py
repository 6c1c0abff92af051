# SPDX-License-Identifier: Apache-2.0
"""What keeps a removed memory cgroup is not always a leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab

PROGRAMS = Path(__file__).parent / "programs"


def test_pages_in_the_batch_of_an_idle_cpu_keep_a_removed_cgroup_until_they_are_drained(
    in_lab: Sevchaos, kernel: str
) -> None:
    done = in_lab("python3", "programs/page_batches.py", options=["--kernel", kernel, "--copy", str(PROGRAMS)])
    kept = 0 if kernel == "debian:7.3" else 1  # 7.3 gives the pages of a removed cgroup to the one above it
    assert (done.stdout, done.stderr) == (f"{kept} 0\n".encode(), b"")
