# SPDX-License-Identifier: Apache-2.0
"""Many runs on this host with --host local, some of them killed in their middle, and what is left after each.

The controller is `sevchaos run`; its child is the runner, and the runner's first child the warden. `CASTS` says who is
killed. Where all three are, nobody can clean up, so `sevchaos clean` is called, which is for that.

A run counts as killed if its directory has no verdict. A kill that came too early or too late is made up for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import experiments  # noqa: F401 - what `sevchaos run` needs, imported once
from chaos import cli
from chaos.cli import run_verb  # noqa: F401
from reports import text  # noqa: F401
from tests.lab.programs.leaks.audit import CGROUPS, Things, contexts, leaked, look

# Who is killed, and of ten how often.
CASTS = {"the controller": 6, "the controller and the runner": 3, "the controller, the runner and the warden": 1}
# What these change of the whole machine the warden alone remembers, so it is spared: `sevchaos clean` does not know.
OF_THE_MACHINE = ("cpu-offline-before-move", "oom-destination-in-move")
# What a run leaves on purpose: the cgroup that all runs make theirs in.
KEPT = {
    "cgroup": {f"{CGROUPS}/sevchaos"},
    "setting": {f"controllers below {CGROUPS}/sevchaos: misc"},
}
WORK = Path("/tmp/campaign/runs")
A_RUN = 2.0  # seconds that the first run of an experiment is thought to take


@dataclass(slots=True)
class Campaign:
    """`took` is how many seconds each experiment took last; `lost` are kills that hit no run."""

    names: Sequence[str]
    chance: random.Random
    work: Path
    before: Things
    runs: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    leaks: list[dict[str, object]] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)

    def batch(self, chosen: Sequence[str], kill: bool) -> None:
        """One controller with a run of each, killed in the last of them if it is to be."""
        argv = ["run", "--host", "local", "--runs", str(self.work), "--seed", str(self.chance.randrange(1 << 32))]
        reader, writer = os.pipe()
        controller = _fork([*argv, "--accept-known", *chosen], writer)
        os.close(writer)
        with os.fdopen(reader) as said:
            self._follow(said, len(chosen) if kill else None)
            cast = ""
            if kill:
                time.sleep(self.chance.random() * self.took.get(chosen[-1], A_RUN))
                casts = list(CASTS)[:2] if chosen[-1] in OF_THE_MACHINE else list(CASTS)
                cast = self.chance.choices(casts, [CASTS[cast] for cast in casts])[0]
                _kill(controller, cast)
        code = os.waitstatus_to_exitcode(os.waitpid(controller, 0)[1])
        if not kill:
            self.codes[code] += 1
        self._account(chosen, cast)

    def _follow(self, said: IO[str], last: int | None) -> None:
        """Read on until the run of this number is announced, or without one until the controller ends."""
        began, number, running = 0.0, 0, ""
        for line in said:
            if " on this machine" not in line:
                continue
            if running:
                self.took[running] = time.monotonic() - began
            began, number, running = time.monotonic(), number + 1, line.split()[1]
            if number == last:
                return

    def _account(self, chosen: Sequence[str], cast: str) -> None:
        directories = [path for path in self.work.glob("*/*") if not path.is_symlink()]
        cut = 0
        for path in directories:
            try:
                self.outcomes[json.loads((path / "verdict.json").read_text())["outcome"]] += 1
            except FileNotFoundError:
                cut += 1
        self.runs += len(directories)
        if cast:
            self.killed[cast] += cut
            self.lost += not cut
        if cast.endswith("warden"):
            cleaned()
        shutil.rmtree(self.work)
        self.work.mkdir()
        found = leaked(self.before, self.work)
        if found or (cut and not cast):
            self.leaks.append({"runs": list(chosen), "killed": cast, "cut short": cut, "left": found})
        for kind, words in found.items():  # told once
            self.before[kind] |= set(words)


def cleaned() -> None:
    time.sleep(0.2)  # what the kernel kills with them dies
    subprocess.run(["sevchaos", "clean"], check=True, stdout=subprocess.DEVNULL)


def _fork(argv: list[str], stderr: int) -> int:
    """`sevchaos ARGV` in a process of its own that need not import it anew: in the lab that takes longer than a run."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(stderr, 2)
        sys.argv = ["sevchaos", *argv]
        try:
            cli.main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:
            os._exit(70)
    return pid


def _kill(controller: int, cast: str) -> None:
    """SIGKILL, first to who would see another one die."""
    victims = [controller]
    for _ in range(cast.count(",") + cast.count(" and ")):
        with suppress(OSError, IndexError):
            pid = victims[0]
            victims.insert(0, int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]))
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable"))


def campaign(names: Sequence[str], runs: int, kills: int, seed: int, minutes: float, tell: IO[str]) -> Campaign:
    """So many runs of these experiments in a random order, and in the middle of so many of them somebody is killed; or
    as many as are done in so many minutes."""
    until = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    work = WORK
    work.mkdir(parents=True)
    before = look(work) | contexts()
    for kind, words in KEPT.items():
        before[kind] |= words
    done = Campaign(names, chance, work, before)
    done.batch(names, False)  # to see how long each takes, and what is there for good once there was a run
    told = 0
    while (done.runs < runs or done.killed.total() < kills) and time.monotonic() < until:
        left = kills - done.killed.total()
        gap = max(1, round(2 * chance.random() * (runs - done.runs) / max(1, left)))
        done.batch(chance.sample(names, min(gap, len(names))), left > 0)
        so_far = f"{done.runs} runs, {done.killed.total()} killed, {len(done.leaks)} leaks, {_available()} MiB free"
        print(so_far, file=tell, flush=True)
        for leak in done.leaks[told:]:
            print(f"  {leak}", file=tell, flush=True)
        told = len(done.leaks)
    return done
