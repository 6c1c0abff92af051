# SPDX-License-Identifier: Apache-2.0
"""Defects that are planted in a stock kernel, by kfault, and must be found by a whole run: runner and checkers.

Their experiments lie here and not in the catalogue. They put the checkers to the test and no kernel: they deviate on
every kernel there is, for a reason that is no finding, and they leave a host whose accounts are wrong until it is
booted anew. So each gets a lab of its own, as every experiment of a `sevchaos run` without `--repeat` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chaos.errors import ExitCode
from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab

HERE = Path(__file__).parent / "planted"
NAMES = ("planted-uncharge-left-out", "planted-charge-left-out", "planted-refusal")
Verdicts = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs() -> dict[str, Verdicts]:
    return {}


@pytest.fixture
def found(runs: dict[str, Verdicts], kernel: str, sevchaos: Sevchaos, tmp_path: Path) -> Verdicts:
    """The verdicts by experiment and promise; no finding may excuse any."""
    if kernel not in runs:
        files = [str(HERE / f"{name}.yaml") for name in NAMES]
        done = sevchaos("run", *files, "--kernel", kernel, "--json", "--runs", str(tmp_path))
        assert done.returncode == ExitCode.BROKEN, done.stderr.decode()
        told = json.loads(done.stdout)["runs"]
        runs[kernel] = {run["experiment"]: {v["promise"]: v for v in run["verdicts"]} for run in told}
    return runs[kernel]


def test_an_uncharge_that_is_left_out(found: Verdicts) -> None:
    """The source stays charged after the move, and after everything is closed."""
    balance = found["planted-uncharge-left-out"]["P1"]
    assert balance["outcome"] == "broken"
    assert balance["signature"] == "overcharged-after-move:sev"
    assert balance["expected"] == ". sev 1; source sev 0; . sev 0; source sev 0"
    assert balance["seen"] == ". sev 2; source sev 1; . sev 1; source sev 1"
    assert "source: misc.current sev = 1, expected 0" in balance["reason"]
    assert "charges were left: . sev 1, source sev 1" in found["planted-uncharge-left-out"]["P9"]["reason"]


def test_a_charge_that_is_left_out(found: Verdicts) -> None:
    """The destination has the context for nothing, and what it never paid is given back to it in the end."""
    balance = found["planted-charge-left-out"]["P1"]
    assert balance["outcome"] == "broken"
    assert balance["signature"] == "below-zero-after-close:sev+undercharged-after-move:sev"
    assert balance["expected"] == ". sev 1; destination sev 1; . sev 0; destination sev 0"
    assert balance["seen"] == ". sev 0; destination sev 0; . sev -1; destination sev -1"
    assert "destination: misc.current sev = 0, expected 1" in balance["reason"]
    assert found["planted-charge-left-out"]["P12"]["signature"] == "warn:misc_cg_uncharge-in-close", "no finding's"


def test_a_refusal_where_there_is_room(found: Verdicts) -> None:
    errors = found["planted-refusal"]["P7"]
    assert errors["outcome"] == "broken"
    assert errors["seen"] == "EBUSY" and "ok" in errors["expected"].split(" or ")
    assert "move of new from old: EBUSY, expected ok" in errors["reason"]
    assert "cgroup 'destination' had room for a charge of sev" in errors["reason"]
    assert found["planted-refusal"]["P1"]["outcome"] == "kept", "nothing was charged, and nothing had to be"
