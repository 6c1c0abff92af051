# SPDX-License-Identifier: Apache-2.0
"""Who lives in a cgroup with a VMM."""

from __future__ import annotations

from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.runner.cgroups import attendants


def lives(proc: Path, pid: int, comm: str, *tids: int) -> None:
    for tid in (pid, *tids):
        task = proc / str(pid) / "task" / str(tid)
        task.mkdir(parents=True)
        (task / "stat").write_text(f"{tid} ({comm[:15]}) S 1 1\n")
    (proc / str(pid) / "comm").write_text(f"{comm}\n")


def test_the_kernels_threads_of_a_vmm_go_with_it_and_those_of_others_do_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "cgroup.procs").write_text("100\n200\n300\n301\n302\n303\n")
    lives(tmp_path, 100, "python3", 104)
    lives(tmp_path, 200, "python3")
    lives(tmp_path, 300, "kvm-nx-lpage-recovery-100")
    lives(tmp_path, 301, "kvm-nx-lpage-recovery-104")
    lives(tmp_path, 302, "kvm-nx-lpage-recovery-200")  # 303 has ended meanwhile
    assert list(attendants(100, Cgroup.at(home), tmp_path)) == [300, 301]
    assert list(attendants(200, Cgroup.at(home), tmp_path)) == [302]
