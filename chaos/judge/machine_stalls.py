# SPDX-License-Identifier: Apache-2.0
"""Whether what the lab's kernel takes for a lockup was the machine under the lab, which stood still (`StoodStill`).

A lockup that is reported as longer than the machine stood still is the kernel's own for the rest of its time, and of a
part nobody can say.
"""

from __future__ import annotations

import re

from chaos.history.records import Console, Kernel, StoodStill
from chaos.judge.evidence import RunEvidence
from chaos.linux.patience import HARD_LOCKUP, RCU_STALL

NS = 1_000_000_000
# How long the report says that it lasted, for those that say so.
_LASTED = re.compile(r"stuck for (\d+)s|for more than (\d+) seconds")
_LATE = 1  # seconds: a report comes when the detector looks next, and is rounded


def explained(evidence: RunEvidence, line: Kernel | Console) -> tuple[str, bool]:
    """In how far the machine stood still for as long as this report says, in words, "" if it did not; and whether that
    is all of it."""
    lasted, begun = _lasted(evidence, line), began(evidence, line)
    still = 0
    for record in evidence.history.records:
        if isinstance(record, StoodStill):
            still += max(0, min(record.until, line.t) - max(record.t, begun))
    if not lasted or still < _LATE * NS:
        return "", False
    return f"the machine under the lab, which stood still for {still / NS:.1f} s", still >= (lasted - _LATE) * NS


def began(evidence: RunEvidence, line: Kernel | Console) -> int:
    """When that which the report says lasted so long had begun at the latest, as `t`; at the report where it does not
    say."""
    lasted = _lasted(evidence, line)
    return line.t - (lasted + _LATE) * NS if lasted else line.t


def _lasted(evidence: RunEvidence, line: Kernel | Console) -> int:
    """In seconds, 0 if nobody says."""
    if found := _LASTED.search(line.text):
        return int(found[1] or found[2])
    header = evidence.history.header
    patience = {} if header is None else header.patience
    return patience.get(HARD_LOCKUP if "LOCKUP" in line.text else RCU_STALL, 0)
