# SPDX-License-Identifier: Apache-2.0
"""The storm of signals, against a process that handles none and lives for as long as it is said to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.vmm.harm import STORM_SIGNAL
from faults.signal import SignalStorm

SECONDS = 20.0


@dataclass
class Victim:
    pid: int
    status: int | None = None
    busy: tuple[int, ...] = ()

    def ask(self, question: object) -> dict[str, int]:
        return {"handled": 0}


def ctx(victim: Victim) -> Any:
    return SimpleNamespace(vmms={"source": victim})


@pytest.mark.parametrize(("status", "ends"), [(None, -STORM_SIGNAL), (0, 0)])
def test_a_number_that_was_a_dead_victims_gets_no_signal(status: int | None, ends: int) -> None:
    """Another process may have it by now. The one here would be ended by the signal."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        storm = SignalStorm(signals=1)
        storm.apply(ctx(Victim(child.pid, status)), "source")
        assert storm._thread is not None
        storm._thread.join(SECONDS)
        assert not storm._thread.is_alive()
        child.communicate(b"\n", timeout=SECONDS)
        assert child.returncode == ends
