# SPDX-License-Identifier: Apache-2.0
"""Side by side or not at all: these machines are noisy, so contenders take turns, and ratios are printed."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

DEADLINE = 300.0


def until_output(command: Sequence[str], word: bytes, environment: Mapping[str, str] | None = None) -> float:
    """Seconds from start until `word` comes out on stdout. The command is then left to end by itself."""
    began = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            for line in process.stdout:
                if word in line:
                    elapsed = time.monotonic() - began
                    process.communicate(timeout=DEADLINE)
                    return elapsed
            errors = process.stderr.read().decode(errors="replace")
        finally:
            process.kill()
    raise SystemExit(f"{command[0]} never said {word.decode()}; it said:\n{errors[-2000:]}")


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each once a round, in turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, measure in contenders.items():
            value = measure()
            if number:
                times[name].append(value)
    return times


def told(name: str, values: Sequence[float], unit: str = "s", scale: float = 1.0) -> str:
    ordered = sorted(value * scale for value in values)
    middle = statistics.median(ordered)
    return f"{name:44} {middle:9.2f} {unit}  ({ordered[0]:.2f} to {ordered[-1]:.2f}, {len(ordered)} times)"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of medians, with the spread of the ratios of each round."""
    each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ours) / statistics.median(theirs):.2f} ({each[0]:.2f} to {each[-1]:.2f})"
