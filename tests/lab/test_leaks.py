# SPDX-License-Identifier: Apache-2.0
"""The audit that says whether a dead run has left anything, and a few runs whose controller is killed.

bench/kills.py does it a thousand times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab

TESTS = Path(__file__).parents[1]
PROGRAM = ("python3", "-m", "tests.lab.programs.leaks")


def told(in_lab: Sevchaos, kernel: str, *argv: str) -> dict[str, Any]:
    done = in_lab(*PROGRAM, *argv, options=["--kernel", kernel, "--asids", "4:4", "--copy", str(TESTS)])
    assert done.returncode == 0, done.stderr.decode()
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_the_audit_sees_a_leak_of_every_kind(in_lab: Sevchaos, kernel: str) -> None:
    seen = told(in_lab, kernel, "plant")
    kinds = {name.split()[0].strip(":") for name in seen}
    assert kinds == {
        "process",
        "cgroup",
        "namespace",
        "qdisc",
        "socket",
        "file",
        "tracing",
        "asid",
        "charge",
        "setting",
        "page",
        "vm",
        "object",
        "reference",
        "table",
    }
    for name, found in seen.items():
        assert name.split()[0].strip(":") in found["during"], (name, found)
        assert found["after"] == {}, (name, found)
    vm, referred = seen["vm in the hands of another process"], seen["cgroup that is removed and referred to"]
    assert {"process", "reference"} < set(vm["during"])
    assert ("group" in referred["during"]) == (kernel != "debian:6.1"), "6.1 does not count groups by controller"


def test_a_killed_controller_leaves_nothing(in_lab: Sevchaos) -> None:
    names = ("kill-source-in-move", "move-across-cgroups-es")
    done = told(in_lab, "debian:6.12", "kill", "--runs", "5", "--kills", "2", "--seed", "1", *names)
    assert done["leaks"] == [] and done["runs"] >= 5 and sum(done["killed"].values()) >= 2
