# SPDX-License-Identifier: Apache-2.0
"""A fault and an experiment in a package of somebody's own, as docs/own-faults.md says, run in the lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos.errors import ExitCode
from tests.lab.conftest import command

pytestmark = pytest.mark.lab

PACKAGE = Path(__file__).parent / "programs" / "own_fault"


def sevchaos(site: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command(*arguments), env=environment, capture_output=True, timeout=240, check=False)


def installed(site: Path) -> Path:
    """The package as pip would leave it, without asking the network for its build tools."""
    info = site / "niceness-1.dist-info"
    info.mkdir(parents=True)
    (site / "niceness.py").write_text((PACKAGE / "niceness.py").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: niceness\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sevchaos.faults]\nrenice = niceness:Renice\n")
    return site


def test_a_fault_of_ones_own_runs_in_the_lab(tmp_path: Path) -> None:
    site = installed(tmp_path / "site")
    explained = sevchaos(site, "explain", "renice")
    assert b"Give a VMM the lowest priority" in explained.stdout, explained.stderr.decode()
    runs = str(tmp_path / "runs")
    done = sevchaos(site, "run", "--quiet", "--json", "--accept-known", "--runs", runs, str(PACKAGE / "nice.yaml"))
    assert done.returncode == ExitCode.KEPT, done.stderr.decode()
    (run,) = json.loads(done.stdout)["runs"]
    assert {v["promise"]: v["outcome"] for v in run["verdicts"] if v["listed"]} == {"P3": "kept", "P9": "kept"}
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "runs" / "nice" / "latest" / "history.jsonl").open()
    ]
    (evidence,) = [r for r in records if r["type"] == "Fault" and r["event"] == "evidence"]
    assert evidence["struck"] and evidence["detail"] == "destination has niceness 19"
    options = ("--quiet", "--accept-known", "--withhold", "renice", "--runs", runs)
    withheld = sevchaos(site, "run", *options, str(PACKAGE / "nice.yaml"))
    assert withheld.returncode == ExitCode.UNKNOWN


def test_it_is_gone_with_its_package(tmp_path: Path) -> None:
    assert sys.modules.get("niceness") is None
    done = sevchaos(tmp_path, "validate", str(PACKAGE / "nice.yaml"))
    assert done.returncode == ExitCode.USAGE and b"there is no fault 'renice'" in done.stderr
