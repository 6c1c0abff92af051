# SPDX-License-Identifier: Apache-2.0
"""kfault on every kernel: tests/lab/programs/kfault tries everything in one lab each, this looks at what came out."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos.lab.kernel import build
from chaos.lab.kernel.build import SOURCES
from chaos.lab.kernel.find import build_module, find_kernel
from tests.kfault_manual import manual_table
from tests.lab.conftest import DEADLINE, command
from tests.lab.programs.kfault import faults, unload

pytestmark = pytest.mark.lab

CHECKS = [check.__name__ for check in (*faults.CHECKS, *unload.CHECKS)]
TESTS = Path(__file__).parent.parent


@functools.cache
def outcome(kernel: str) -> dict[str, dict[str, Any]]:
    return run_checks(kernel)


def run_checks(kernel: str, *checks: str, module: Path | None = None) -> dict[str, dict[str, Any]]:
    """What each check said, by its name; of all of them if none is named."""
    argv = ["env", f"KFAULT_MODULE={module.name}"] if module else []
    argv += ["python3", "-m", "tests.lab.programs.kfault", *checks]
    copied = [TESTS, SOURCES / "kfault" / "known.h", *([module] if module else [])]
    options = ["--quiet", "--kernel", kernel, *(word for path in copied for word in ("--copy", str(path)))]
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
    column = {"debian:6.1": 3, "debian:6.12": 4, "debian:7.3": 5}[kernel]
    there = outcome(kernel)["functions_there"]["figures"]["there"]
    assert there == [name for name, row in manual_table().items() if row[column]]


def test_unloading_waits_for_whoever_is_slow(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two windows that unloading has to wait for are a few instructions wide, and no load hits them reliably. So
    they are made half a second wide, in a module of its own: one before a task counts itself out, one behind."""
    windows = """\
	if (may_sleep())
		schedule_timeout_uninterruptible(HZ / 2);
	if (atomic_dec_and_test(&slot->inside))
		wake_up(&all_left);
	for (u64 t = ktime_get_ns() + NSEC_PER_SEC / 2; ktime_get_ns() < t;)
		cpu_relax();
	return passage;
"""
    source = shutil.copytree(SOURCES / "kfault", tmp_path / "kfault") / "probe.c"
    end = re.compile(r"\tif \(atomic_dec_and_test\(&slot->inside\)\)\n\t\twake_up\(&all_left\);\n\treturn passage;\n")
    text, places = end.subn(windows, source.read_text())
    assert places == 1
    source.write_text(text)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    slow = build_module(find_kernel(kernel), "kfault")

    said = run_checks(kernel, "with_everybody_inside", "quiet_kernel", module=slow)
    assert [line["why"] for line in said.values()] == ["", ""]
    assert said["with_everybody_inside"]["figures"]["rmmod seconds"] > 0.9
