# SPDX-License-Identifier: Apache-2.0
"""What `sevchaos run --json` said, and the histories behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chaos.history import file
from chaos.history.records import History, Observation
from tests.lab.conftest import Sevchaos, as_expected


class Told:
    """What `sevchaos run --json` said, by experiment."""

    def __init__(self, output: bytes) -> None:
        self.runs: dict[str, Any] = {run["experiment"]: run for run in json.loads(output)["runs"]}

    def outcomes(self, name: str) -> dict[str, str]:
        """Of the promises that the experiment lists."""
        return {v["promise"]: v["outcome"] for v in self.runs[name]["verdicts"] if v["listed"]}

    def accepted(self, name: str) -> dict[str, str]:
        return {v["promise"]: v["accepted"] for v in self.runs[name]["verdicts"] if v["accepted"] and v["listed"]}

    def history(self, name: str) -> History:
        return file.read(Path(self.runs[name]["directory"]) / "history.jsonl")


def charges(told: History, label: str) -> dict[str, dict[str, int]]:
    """Cgroup → key → charge, zeros left out, of the observation of this label."""
    found = next(r for r in told.records if isinstance(r, Observation) and r.label == label)
    return {name: {k: v for k, v in files["current"].items() if v} for name, files in found.misc.items()}


def carried_out(sevchaos: Sevchaos, where: Path, kernel: str, *names: str) -> Told:
    """These experiments, on one kernel and with seed 7, all of which must end as expected."""
    options = ("--kernel", kernel, "--seed", "7", "--json", "--accept-known", "--runs", str(where))
    done = sevchaos("run", *names, *options)
    return Told(as_expected(done))
