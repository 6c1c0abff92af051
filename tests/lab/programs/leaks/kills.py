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
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.lab.programs.leaks.audit import Things, contexts, leaked, look

# Who is killed, and of ten how often.
CASTS = {"the controller": 6, "the controller and the runner": 3, "the controller, the runner and the warden": 1}
ENDS_WITHIN = 300.0
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

    def batch(self, chosen: Sequence[str], repeat: int, kill: bool) -> None:
        """One controller with so many runs of each, killed in the last of them if it is to be."""
        argv = ["run", "--host", "local", "--runs", str(self.work), "--seed", str(self.chance.randrange(1 << 32))]
        with (self.work.parent / "said").open("w") as said:
            controller = subprocess.Popen(
                ["sevchaos", *argv, "--accept-known", "--repeat", str(repeat), *chosen],
                stdout=said, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert controller.stderr is not None
        self._follow(controller.stderr, len(chosen) * repeat if kill else None)
        cast = ""
        if kill:
            time.sleep(self.chance.random() * self.took.get(chosen[-1], A_RUN))
            cast = self.chance.choices(list(CASTS), list(CASTS.values()))[0]
            _kill(controller.pid, cast)
        controller.stderr.close()
        code = controller.wait(ENDS_WITHIN)
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
        self.killed[cast] += cut if cast else 0
        self.lost += bool(cast) and not cut
        if cast.endswith("warden"):
            time.sleep(0.2)  # what the kernel kills with them dies
            subprocess.run(["sevchaos", "clean"], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(self.work)
        self.work.mkdir()
        found = leaked(self.before, self.work)
        if found or (cut and not cast):
            self.leaks.append({"runs": list(chosen), "killed": cast, "cut short": cut, "left": found})
            for kind, words in found.items():  # told once
                self.before[kind] |= set(words)


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


def campaign(names: Sequence[str], runs: int, kills: int, seed: int, tell: IO[str]) -> Campaign:
    """So many runs of these experiments in a random order, and in the middle of so many of them somebody is killed."""
    chance = random.Random(seed)
    work = Path("/tmp/campaign/runs")
    work.mkdir(parents=True)
    done = Campaign(names, chance, work, look(work) | contexts())
    done.batch(names, 1, False)  # to see how long each takes, and what is there for good once there was a run
    deck: list[str] = []
    while done.runs < runs or done.killed.total() < kills:
        left = kills - done.killed.total()
        repeat = max(1, round(2 * chance.random() * (runs - done.runs) / max(1, left)))
        deck = deck or chance.sample(names, len(names))
        done.batch([deck.pop()], repeat, left > 0)
        print(f"{done.runs} runs, {done.killed.total()} killed, {len(done.leaks)} leaks", file=tell, flush=True)
    return done
