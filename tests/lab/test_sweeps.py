# SPDX-License-Identifier: Apache-2.0
"""Sweeps of the kernel's fault points. Stock kernels have no fault injection, and skip them; what they say on a kernel
that has some is tried where one was built (docs/outcomes.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaos.errors import ExitCode, NoKernel
from chaos.lab.kernel.find import find_kernel
from tests.lab.conftest import Sevchaos

HERE = Path(__file__).parent / "sweeps"
SWEEPS = sorted(HERE.glob("*.yaml"))
KASAN = "debian:7.3+kasan"

pytestmark = pytest.mark.lab


def test_a_kernel_without_fault_injection_skips_them_and_says_what_it_lacks(
    sevchaos: Sevchaos, kernel: str, tmp_path: Path
) -> None:
    done = sevchaos("run", str(HERE / "sweep-move.yaml"), "--kernel", kernel, "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.SKIPPED, done.stderr.decode()
    (run,) = json.loads(done.stdout)["runs"]
    assert {verdict["outcome"] for verdict in run["verdicts"]} == {"skipped"}
    assert "lets no fault point fail: it lacks FAULT_INJECTION" in run["verdicts"][0]["reason"]


@pytest.mark.nightly
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_fault_point_fails_once(sweep: Path, sevchaos: Sevchaos, tmp_path: Path) -> None:
    try:
        find_kernel(KASAN)
    except NoKernel as lacking:
        pytest.skip(f"{lacking.message}: {lacking.remedy}")
    argv = ("run", str(sweep), "--kernel", KASAN, "--json", "--accept-known", "--runs", str(tmp_path))
    done = sevchaos(*argv, "--timeout", "3600", within=4000.0)
    assert done.returncode == ExitCode.KEPT, done.stdout.decode()
