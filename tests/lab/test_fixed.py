# SPDX-License-Identifier: Apache-2.0
"""A kernel with the findings mended keeps every promise of the whole catalogue: what was broken on the stock one were
the findings, and no words of ours. It takes twenty minutes to build, so nothing builds it for this: `sevchaos kernel
build debian:7.3 --with fixes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chaos.errors import ExitCode
from tests.lab.conftest import Sevchaos, skip_unless_built

pytestmark = [pytest.mark.lab, pytest.mark.nightly]
FIXED = ("debian:6.12+fixed", "debian:7.3+fixed")


@pytest.mark.parametrize("kernel", FIXED)
def test_nothing_is_broken_on_a_kernel_with_the_findings_mended(
    kernel: str, sevchaos: Sevchaos, tmp_path: Path
) -> None:
    """What is accepted may be no deviation: of a question that cannot be asked the experiment says so."""
    skip_unless_built(kernel)
    options = ("--kernel", kernel, "--seed", "7", "--accept-known", "--json", "--runs", str(tmp_path), "-j", "2")
    done = sevchaos("run", "--all", *options, within=5400.0)
    told = json.loads(done.stdout)
    broken = [
        (run["experiment"], verdict["promise"], verdict["signature"])
        for run in told["runs"]
        for verdict in run["verdicts"]
        if verdict["outcome"] == "broken"
    ]
    assert (done.returncode, broken) == (ExitCode.KEPT, [])
    assert told["counts"]["kept"] > 1000


@pytest.mark.parametrize("kernel", FIXED)
def test_a_thousand_moves_across_cgroups_keep_every_promise(kernel: str, sevchaos: Sevchaos, tmp_path: Path) -> None:
    skip_unless_built(kernel)
    repeat = ("--repeat", "1000", "--seed", "1000", "-j", "2", "--max-unknown", "0", "--json", "--runs", str(tmp_path))
    done = sevchaos("run", "move-across-cgroups", "--kernel", kernel, *repeat, within=7200.0)
    told = json.loads(done.stdout)
    assert (done.returncode, len(told["runs"])) == (ExitCode.KEPT, 1000)
    assert {run["outcome"] for run in told["runs"]} == {"kept"}
