# SPDX-License-Identifier: Apache-2.0
"""Every hold, over and over: is it reached each time, where does the task sleep, what do both cgroups read meanwhile?

    make bench, or: python bench/holds.py [--times N] [--kernel K]

The experiment is move-through-every-hold: one move that is stopped at each place there is and let go from each, so many
times in one lab. What is printed is read from the histories, and from them alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import experiments
from chaos.controller.lab_host import LabHost
from chaos.errors import ExitCode
from chaos.experiment.steps import HoldStep, ObserveStep
from chaos.history.records import Done, End, Held, Observation, Record
from chaos.lab.kernel.find import default_kernels
from chaos.lab.session import Wish
from chaos.runner.order import Order

NAME = "move-through-every-hold"
TIMEOUT = 300.0
EVERY = 10  # runs between two words of progress
SIDES = ("source", "destination")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    options = parser.parse_args()
    missed = sum(show(kernel, options.times) for kernel in options.kernel or default_kernels())
    raise SystemExit(ExitCode.BROKEN if missed else ExitCode.KEPT)


async def histories(kernel: str, times: int) -> list[list[Record]]:
    """The records of each run, all in one lab."""
    runs: list[list[Record]] = []
    experiment = experiments.find(NAME)
    async with LabHost(Wish(kernel=kernel), say=print).open(lambda line: None) as session:
        for seed in range(times):
            runs.append([])
            order = Order(experiment=experiment, seed=seed, host="lab", timeout=TIMEOUT)
            await session.carry_out(order, record=runs[-1].append)
            if (seed + 1) % EVERY == 0:
                print(f"{kernel}: {seed + 1} of {times} runs", file=sys.stderr)
    return runs


def show(kernel: str, times: int) -> int:
    """Print what was seen; how many holds were not reached, or not let go."""
    runs = asyncio.run(histories(kernel, times))
    whole = sum(isinstance(run[-1], End) and run[-1].complete for run in runs)
    print(f"\n{kernel}: {whole} of {times} runs went to their end")
    missed = times - whole
    script = experiments.find(NAME).script
    for number, step in enumerate(script):
        if not isinstance(step, HoldStep):
            continue
        after = script[number + 1]
        label = after.label if isinstance(after, ObserveStep) else ""
        missed += _hold([_at(run, number) for run in runs], times, f"{step.at} of {step.vm}")
        if label:
            read = Counter(_charges(run, label) for run in runs)
            print(f"    read meanwhile: {_counted(read)}")
    return missed


def _at(run: Sequence[Record], step: int) -> tuple[Held, bool] | None:
    """The hold of this step, and whether its operation was answered later; None if it was not reached."""
    held = next((r for r in run if isinstance(r, Held) and r.step == step and r.reached), None)
    if held is None:
        return None
    return held, any(isinstance(r, Done) and r.op == held.op and r.outcome != "info" for r in run)


def _hold(found: Sequence[tuple[Held, bool] | None], times: int, name: str) -> int:
    """Print one hold; how often it was not reached, or its operation never answered."""
    reached = [each[0] for each in found if each is not None]
    released = sum(each[1] for each in found if each is not None)
    print(f"  {name}: {len(reached)} of {times} reached, {released} let go")
    for (place, state, sleeping, call, stack), count in Counter(map(_where, reached)).items():
        print(f"    {count} x {place}: state {state} in {sleeping}, {call}; {' < '.join(stack[:5])}")
    return times - released


def _where(held: Held) -> tuple[str, str, str, str, tuple[str, ...]]:
    place = " ".join(word for word in (held.place, held.side, held.function, held.command) if word)
    return place, held.state, held.sleeping, held.call, held.stack


def _charges(run: Sequence[Record], label: str) -> str:
    seen = next((r for r in run if isinstance(r, Observation) and r.label == label), None)
    if seen is None:
        return "nothing"
    return ", ".join(f"{side} sev {seen.misc[side]['current'].get('sev', 0)}" for side in SIDES)


def _counted(words: Iterable[str] | Counter[str]) -> str:
    return "; ".join(f"{count} x {word}" for word, count in Counter(words).items())


if __name__ == "__main__":
    main()
