# SPDX-License-Identifier: Apache-2.0
"""`sevchaos findings --kernel` on kernels on which somebody has looked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaos.judge import findings
from tests.lab.conftest import Sevchaos

pytestmark = [pytest.mark.lab, pytest.mark.nightly]


def test_every_written_finding_is_seen_where_it_is_written_and_no_other_is(
    sevchaos: Sevchaos, kernel: str, tmp_path: Path
) -> None:
    done = sevchaos("findings", "--kernel", kernel, "--runs", str(tmp_path), "--json", "--quiet", within=600)
    (column,) = json.loads(done.stdout)["kernels"]
    seen = {one["finding"]: (one["seen"], one["reason"]) for one in column["sightings"]}
    here = {finding.id for finding in findings.load() if finding.holds(column["version"])}
    assert {number for number, (word, _) in seen.items() if word == "seen"} == here, seen
    assert not any(word == "unknown" for word, _ in seen.values()), seen
    assert done.returncode == 0
