# SPDX-License-Identifier: Apache-2.0
"""Points of the kernel's that fail. Stock kernels have no fault injection, and skip them; what they say on a kernel
that has some is tried where one was built (docs/outcomes.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import experiments
from chaos.errors import ExitCode
from tests.lab.conftest import Sevchaos, skip_unless_built

SWEEPS = [name for name, path in experiments.catalogue().items() if path.parent.name == "sweeps"]
ONE = "point-fails-in-migration"
# Before 7.3 a move in a migration has no such point.
ON_KERNELS = {"debian:6.12+kasan": SWEEPS, "debian:7.3+kasan": [*SWEEPS, ONE]}

pytestmark = pytest.mark.lab


def test_a_kernel_without_fault_injection_skips_them_and_says_what_it_lacks(
    sevchaos: Sevchaos, kernel: str, tmp_path: Path
) -> None:
    names = ["sweep-move"]
    if kernel == "debian:7.3":  # before, a move has no such point, and it is skipped for that
        names.append(ONE)
    done = sevchaos("run", *names, "--kernel", kernel, "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.SKIPPED, done.stderr.decode()
    runs = json.loads(done.stdout)["runs"]
    assert [run["experiment"] for run in runs] == names
    for run in runs:
        assert {verdict["outcome"] for verdict in run["verdicts"]} == {"skipped"}
        assert "lets no fault point fail: it lacks FAULT_INJECTION" in run["verdicts"][0]["reason"]


@pytest.mark.nightly
@pytest.mark.parametrize(("kernel", "name"), [(kernel, name) for kernel, names in ON_KERNELS.items() for name in names])
def test_every_fault_point_fails_once(kernel: str, name: str, sevchaos: Sevchaos, tmp_path: Path) -> None:
    skip_unless_built(kernel)
    argv = ("run", name, "--kernel", kernel, "--json", "--accept-known", "--runs", str(tmp_path))
    done = sevchaos(*argv, within=4000.0)
    assert done.returncode == ExitCode.KEPT, done.stdout.decode()
