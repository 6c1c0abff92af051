# SPDX-License-Identifier: Apache-2.0
"""How long this kernel waits before it reports what hangs.

Each of its detectors has a time of its own, and what ends earlier it never reports. So a run of seconds on a host with
the usual 120 s cannot see a hung task, however quiet the log is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

HUNG_TASK, SOFT_LOCKUP, HARD_LOCKUP, RCU_STALL = "hung task", "soft lockup", "hard lockup", "RCU stall"


def patience(proc: Path, modules: Path) -> Mapping[str, int]:
    """Seconds by detector, 0 for one that this kernel does not have or that is off. Never raises."""
    kernel = proc / "sys" / "kernel"
    after = _read(kernel / "watchdog_thresh") * _on(kernel / "watchdog")
    return {
        # It goes silent after hung_task_warnings reports, -1 for never.
        HUNG_TASK: _read(kernel / "hung_task_timeout_secs") * _on(kernel / "hung_task_warnings"),
        SOFT_LOCKUP: 2 * after * _on(kernel / "soft_watchdog"),  # get_softlockup_thresh() of kernel/watchdog.c
        HARD_LOCKUP: after * _on(kernel / "nmi_watchdog"),
        RCU_STALL: _read(modules / "rcupdate" / "parameters" / "rcu_cpu_stall_timeout")
        * (not _on(modules / "rcupdate" / "parameters" / "rcu_cpu_stall_suppress")),
    }


def _on(switch: Path) -> bool:
    return _read(switch) != 0


def _read(number: Path) -> int:
    try:
        return int(number.read_text())
    except (OSError, ValueError):
        return 0
