# SPDX-License-Identifier: Apache-2.0
"""kfault on both kernels: tests/lab/programs/kfault tries everything in one lab each, this looks at what came out."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos.lab.build import SOURCES
from tests.kfault_manual import manual_table
from tests.lab.conftest import DEADLINE, command
from tests.lab.programs.kfault import faults, unload

pytestmark = pytest.mark.lab

CHECKS = [check.__name__ for check in (*faults.CHECKS, *unload.CHECKS)]
TESTS = Path(__file__).parent.parent


@functools.cache
def outcome(kernel: str) -> dict[str, dict[str, Any]]:
    """What each check said, by its name."""
    argv = ["python3", "-m", "tests.lab.programs.kfault"]
    options = ["--quiet", "--kernel", kernel, "--copy", str(TESTS), "--copy", str(SOURCES / "kfault_list.h")]
    done = subprocess.run(
        command("lab", "run", *options, "--", *argv), capture_output=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for line in said:
        print(line, file=sys.stderr)
    return {line["check"]: line for line in said}


@pytest.mark.parametrize("check", [*CHECKS, "quiet_kernel"])
def test_in_the_lab(kernel: str, check: str) -> None:
    said = outcome(kernel)[check]
    assert not said["why"], said["why"]


def test_a_hundred_of_a_hundred_holds(kernel: str) -> None:
    assert outcome(kernel)["hold_a_hundred_times"]["figures"] == {"held and released": 100, "of": 100}


def test_the_planted_defect_leaves_both_cgroups_charged(kernel: str) -> None:
    figures = outcome(kernel)["uncharge_skipped"]["figures"]
    assert figures == {"as it should be": [[0, 1], [0, 0], 0], "planted": [[1, 1], [1, 1], 2]}


def test_the_manual_says_which_functions_there_are(kernel: str) -> None:
    column = {"debian:6.1": 3, "debian:6.12": 4}[kernel]
    there = outcome(kernel)["functions_there"]["figures"]["there"]
    assert there == [name for name, row in manual_table().items() if row[column]]
