# SPDX-License-Identifier: Apache-2.0
"""Sweeps on a kernel with fault injection. Only a kernel that was built for it has any, so this is for the night."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.conftest import Sevchaos

pytestmark = [pytest.mark.lab]


def test_a_kernel_without_fault_injection_skips_a_sweep_and_says_what_it_lacks(
    sevchaos: Sevchaos, kernel: str, tmp_path: Path
) -> None:
    done = sevchaos("run", "sweep-init2", "sweep-move", "--kernel", kernel, "--json", "--runs", str(tmp_path))
    assert done.returncode == 4, done.stderr.decode()
    for run in json.loads(done.stdout)["runs"]:
        outcomes = {verdict["outcome"] for verdict in run["verdicts"]}
        assert outcomes == {"skipped"}
        assert all("fault point" in verdict["reason"] or "type" in verdict["reason"] for verdict in run["verdicts"])
