# SPDX-License-Identifier: Apache-2.0
"""Mutants of the judge: how many of each module the tests of the core kill, and whether a new one survives.

A module's result is kept with a digest of what it rests on, so a night that was interrupted goes on with the next
module. Survivors that are known are in `survivors.txt`, each with its reason; one that is not there fails the night.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.errors import InternalError

ROOT = Path(__file__).parent.parent.parent
JUDGE = ROOT / "chaos" / "judge"
KNOWN = Path(__file__).parent / "survivors.txt"
STATE = ROOT / "build" / "mutation"
SAMPLE = 30
"""Mutants of a module and night. All 12,000 would take more than a night of two CPUs; see docs/mutation.md."""
_RESTS_ON = ("chaos", "experiments", "tests/unit/core", "tests/nightly/mutants.py", "pyproject.toml")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, order=True)
class Mutant:
    """Which one it is, in the words of the source, for numbers change with every edit."""

    module: str
    function: str
    before: str
    after: str

    def __str__(self) -> str:
        lines = [f"{self.module} {self.function}"]
        lines += [f"- {line}" for line in self.before.split("\n") if line]
        lines += [f"+ {line}" for line in self.after.split("\n") if line]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ModuleScore:
    """`mutants` without those of wording; `tried` is fewer if it is a sample."""

    module: str
    mutants: int
    wording: int
    tried: int
    killed: int
    timeout: int
    survivors: tuple[Mutant, ...]
    seconds: int

    @property
    def score(self) -> float:
        """Killed of those tried; one that never ends is noticed as well."""
        return (self.killed + self.timeout) / self.tried if self.tried else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Where the score of all its mutants is with 95 % confidence (Wilson); the score itself if all were tried."""
        return (self.score, self.score) if self.tried == self.mutants else wilson(self.score, self.tried)


def wilson(share: float, of: int, z: float = 1.96) -> tuple[float, float]:
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def modules() -> list[Path]:
    """Those of the judge, as paths from the root. What has no function has no mutants."""
    return [path.relative_to(ROOT) for path in sorted(JUDGE.rglob("*.py")) if "def " in path.read_text()]


def carry_out(chosen: Sequence[Path], say: Say, *, sample: int = SAMPLE, seed: int = 0, again: bool = False) -> bool:
    """Try the mutants of each module, unless that is done; tell the table and every survivor that is not known, and
    whether there is none."""
    known = read_known(KNOWN.read_text())
    scores = []
    for module in chosen:
        scores.append(_score_of(module, sample=sample, seed=seed, again=again))
        say(f"{module}: {100 * scores[-1].score:.0f} % killed, {scores[-1].seconds} s")
    for line in table(scores):
        say(line)
    found = {mutant for score in scores for mutant in score.survivors}
    new = sorted(found - known.keys())
    for mutant in new:
        say(f"survived, and is not in {KNOWN.relative_to(ROOT)}:\n{mutant}")
    whole = {score.module for score in scores if score.tried == score.mutants}
    for mutant in sorted(mutant for mutant in known.keys() - found if mutant.module in whole):
        say(f"no longer survives, so take it out of {KNOWN.relative_to(ROOT)}:\n{mutant}")
    say(f"{len(found)} survivors, {len(new)} of them are new")
    return not new


def table(scores: Sequence[ModuleScore]) -> Iterator[str]:
    yield f"{'module':<46} {'mutants':>7} {'tried':>6} {'killed':>6} {'survived':>8} {'timeout':>7} {'score':>6}"
    for s in scores:
        counts = f"{s.mutants:>7} {s.tried:>6} {s.killed:>6} {len(s.survivors):>8} {s.timeout:>7}"
        yield f"{s.module:<46} {counts} {_percent(s.score, s.interval)}"
    score, interval = overall(scores)
    yield f"all, each module by its mutants: {_percent(score, interval)}"


def _percent(score: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * score:>5.1f}%" + (f"  ({100 * low:.0f} to {100 * high:.0f})" if low != high else "")


def overall(scores: Sequence[ModuleScore]) -> tuple[float, tuple[float, float]]:
    """The score of all mutants together, as the modules' samples tell it, and its interval with 95 % confidence."""
    every = sum(s.mutants for s in scores) or 1
    score = sum(s.score * s.mutants for s in scores) / every
    # A module of which all or none were killed is not certain: Agresti and Coull's two more of each.
    shares = [(s, (s.killed + s.timeout + 2) / (s.tried + 4)) for s in scores if s.tried < s.mutants]
    variance = sum((s.mutants / every) ** 2 * share * (1 - share) / (s.tried + 4) for s, share in shares)
    half = 1.96 * math.sqrt(variance)
    return score, (max(0.0, score - half), min(1.0, score + half))


def read_known(text: str) -> dict[Mutant, str]:
    """The survivors in a list as survivors.txt is, and the reason of each."""
    found = {}
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith("#")]
        if not lines:
            continue
        module, _, function = lines[0].partition(" ")
        before, after = ("\n".join(line[2:] for line in lines[1:] if line[0] == sign) for sign in "-+")
        reason = " ".join(line.strip() for line in lines[1:] if line.startswith("  "))
        if not reason:
            raise ValueError(f"{KNOWN}: no reason is given for\n{block}")
        found[Mutant(module, function, before, after)] = reason
    return found


def _score_of(module: Path, *, sample: int, seed: int, again: bool) -> ModuleScore:
    name = ".".join(module.with_suffix("").parts)
    written, done = STATE / f"{name}.json", STATE / f"{name}.done"
    passed_with = f"{_digest()} {sample} {seed}"
    if again or not done.is_file() or done.read_text() != passed_with:
        done.unlink(missing_ok=True)
        STATE.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "tests.nightly.mutants", str(module), str(written)]
        argv += ["--sample", str(sample), "--seed", str(seed)]
        with (STATE / f"{name}.log").open("wb") as log:
            ended = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        if ended.returncode:
            raise InternalError(f"the mutants of {module} could not be tried: see {STATE / f'{name}.log'}")
        done.write_text(passed_with)
    return read_score(json.loads(written.read_text()))


def read_score(result: dict[str, object]) -> ModuleScore:
    """What `tests.nightly.mutants` wrote."""
    module, survived = str(result["module"]), result["survived"]
    assert isinstance(survived, list)
    numbers = {name: int(str(result[name])) for name in ("wording", "tried", "killed", "timeout", "seconds")}
    survivors = tuple(Mutant(module, *map(str, each)) for each in survived)
    return ModuleScore(module, int(str(result["mutants"])) - numbers["wording"], **numbers, survivors=survivors)


def _digest() -> str:
    digest = hashlib.sha256()
    for name in _RESTS_ON:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
