# SPDX-License-Identifier: Apache-2.0
"""A host on which somebody else's SEV guest lives: it is left alone, and so is what it may need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chaos.errors import ExitCode
from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab

PROGRAM = Path(__file__).parent / "programs" / "foreign_guest.py"
# Each run takes all the contexts it can get, twice.
CHOSEN = ("kill-destination-in-move", "move-in-one-cgroup")


def beside(in_lab: Sevchaos, kernel: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the guest's owner saw, and what sevchaos said."""
    run = ["sevchaos", "run", "--host", "local", "--runs", "/tmp/runs", *arguments]
    done = in_lab("python3", PROGRAM.name, *run, options=["--kernel", kernel, "--copy", str(PROGRAM)])
    assert done.returncode == 0, done.stderr.decode()
    told: dict[str, Any] = json.loads(done.stdout)
    return told, " ".join(done.stderr.decode().split())


def test_a_foreign_guest_stops_a_run_before_it_begins(in_lab: Sevchaos, kernel: str) -> None:
    told, said = beside(in_lab, kernel, "kill-destination-in-move")
    assert told["code"] == ExitCode.HOST_LACKS
    assert "1 SEV guest of other owners running on this host" in said and "--shared-host" in said
    assert told["before"] == told["after"] and told["before"]["charge"].startswith("sev 1\n")


def test_on_a_shared_host_the_foreign_guest_is_untouched(in_lab: Sevchaos, kernel: str) -> None:
    told, said = beside(in_lab, kernel, "--shared-host", "--accept-known", *CHOSEN)
    assert told["before"] == told["after"] and told["before"]["charge"].startswith("sev 1\n")
    assert told["code"] == ExitCode.KEPT, said
    assert "5 sev ASIDs can be allocated again" in said  # of 8: one is the guest's, two are left to others
