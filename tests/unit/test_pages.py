# SPDX-License-Identifier: Apache-2.0
"""The commands of README that need no lab do what it says; those that do are in tests/lab/test_pages.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import README, commands

LABLESS = {
    "list": "move-across-cgroups",
    "plan": "launch old",
    "explain": "End the process with a signal",
    "new": "mine.yaml",
    "doctor": "QEMU",
    "findings": "0001",
}


def sevchaos(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "chaos.cli", *arguments]
    root = str(README.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(argv, cwd=where, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [c for c in commands(README) if c[0] in LABLESS], ids=" ".join)
def test_a_command_of_the_readme_that_needs_no_lab(arguments: list[str], tmp_path: Path) -> None:
    done = sevchaos(*arguments, where=tmp_path)
    assert done.returncode == 0, done.stderr
    assert LABLESS[arguments[0]] in done.stdout + done.stderr


def test_the_scaffold_of_the_readme_is_an_experiment(tmp_path: Path) -> None:
    (new,) = (c for c in commands(README) if c[0] == "new")
    assert sevchaos(*new, where=tmp_path).returncode == 0
    done = sevchaos("validate", f"{new[1]}.yaml", where=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_s_commands_are_all_of_a_kind_that_some_test_carries_out() -> None:
    others = {" ".join(c) for c in commands(README) if c[0] not in LABLESS}
    assert others == {"run move-across-cgroups --accept-known", "run --all --accept-known -j 2"}
