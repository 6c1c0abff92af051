# SPDX-License-Identifier: Apache-2.0
"""One checker a promise: a pure function from an experiment and its history to a verdict with its evidence."""

from __future__ import annotations

from collections.abc import Callable

from chaos.experiment.model import Experiment
from chaos.history.records import History
from chaos.judge.checkers import (
    p01_balance,
    p02_one_charge,
    p03_dead_source,
    p04_one_owner,
    p05_guest_goes_on,
    p06_clean_failure,
    p07_errors,
    p08_no_deadlock,
    p09_nothing_leaks,
    p10_limits,
    p11_charges_stay,
    p12_quiet_kernel,
    p13_no_firmware_traffic,
    p14_within_bounds,
)
from chaos.judge.verdict import Verdict

Checker = Callable[[Experiment, History], Verdict]

CHECKERS: dict[str, Checker] = {
    "P1": p01_balance.check,
    "P2": p02_one_charge.check,
    "P3": p03_dead_source.check,
    "P4": p04_one_owner.check,
    "P5": p05_guest_goes_on.check,
    "P6": p06_clean_failure.check,
    "P7": p07_errors.check,
    "P8": p08_no_deadlock.check,
    "P9": p09_nothing_leaks.check,
    "P10": p10_limits.check,
    "P11": p11_charges_stay.check,
    "P12": p12_quiet_kernel.check,
    "P13": p13_no_firmware_traffic.check,
    "P14": p14_within_bounds.check,
}
