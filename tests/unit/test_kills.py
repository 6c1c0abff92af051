# SPDX-License-Identifier: Apache-2.0
"""The campaign of killed controllers, with a controller that only pretends: who is killed, and what is counted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import cli
from tests.lab.programs.leaks import kills

NAMES = [f"e{number}" for number in range(6)]
A_RUN = 0.05
RUNNER = "import subprocess, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"


def pretend(pids: Path) -> None:
    """As `sevchaos run` looks from outside: it has a runner, announces runs, and writes a verdict for each."""
    argv = sys.argv
    work = Path(argv[argv.index("--runs") + 1])
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        runner.stdout.readline()
        children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
        (pids / str(os.getpid())).write_text(" ".join([str(os.getpid()), str(runner.pid), *children]))
        for name in (word for word in argv if word in NAMES):
            directory = work / name / str(time.monotonic_ns())
            directory.mkdir(parents=True)
            os.write(2, f"· {name} on this machine\n".encode())
            time.sleep(A_RUN)
            (directory / "half").write_text(json.dumps({"outcome": "kept"}))
            (directory / "half").rename(directory / "verdict.json")  # whole or not at all, as the real one writes it
        for pid in (int(children[0]), runner.pid):
            os.kill(pid, 9)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("cast", kills.CASTS)
def test_who_is_killed_and_what_is_counted(cast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    cleaned: list[list[str]] = []
    monkeypatch.setattr(kills, "WORK", tmp_path / "campaign" / "runs")
    monkeypatch.setattr(kills, "CASTS", {cast: 1})
    monkeypatch.setattr(kills, "A_RUN", A_RUN)
    monkeypatch.setattr(kills, "look", lambda spared: {kind: frozenset() for kind in kills.KEPT})
    monkeypatch.setattr(kills, "contexts", dict)
    monkeypatch.setattr(kills, "leaked", lambda before, spared: {})
    monkeypatch.setattr(kills, "cleaned", lambda: cleaned.append([]))
    monkeypatch.setattr(cli, "main", lambda: pretend(pids))
    done = kills.campaign(NAMES, runs=30, kills=3, seed=1, minutes=1, tell=io.StringIO())
    assert done.runs >= 30 and sum(done.killed.values()) >= 3 and set(done.killed) == {cast}
    assert done.outcomes["kept"] == done.runs - sum(done.killed.values())
    assert set(done.codes) <= {0, 70} and done.leaks == []
    dead = len(cast.split(",")) + cast.count(" and ")
    left = [[alive(pid) for pid in path.read_text().split()] for path in pids.iterdir()]
    assert [False] * dead + [True] * (3 - dead) in left
    assert bool(cleaned) == cast.endswith("warden")
    for path in pids.iterdir():
        for pid in filter(alive, path.read_text().split()):
            os.kill(int(pid), 9)
