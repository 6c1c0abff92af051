# SPDX-License-Identifier: Apache-2.0
"""What `sevchaos doctor` says of what it finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.controller.doctor import DoctorState, _network


@pytest.mark.parametrize(
    ("listed", "device", "state", "seen"),
    [
        ("kernel/net/sched/sch_netem.ko.xz:\n", False, DoctorState.GOOD, "by the kernel's netem"),
        ("kernel/net/sched/sch_tbf.ko:\n", True, DoctorState.GOOD, "by a relay in user space"),
        (None, True, DoctorState.GOOD, "by a relay in user space"),
        ("kernel/net/sched/sch_tbf.ko:\n", False, DoctorState.POOR, "is skipped"),
    ],
)
def test_what_impairs_packets(tmp_path: Path, listed: str | None, device: bool, state: DoctorState, seen: str) -> None:
    tun = tmp_path / "tun"
    if listed is not None:
        (tmp_path / "modules.dep").write_text(listed)
    if device:
        tun.touch()
    check = _network(tmp_path, tun)
    assert check.state is state and seen in check.seen
    assert bool(check.remedy) == (state is DoctorState.POOR)
