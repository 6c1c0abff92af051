# SPDX-License-Identifier: Apache-2.0
"""How long a guest stands still while it is handed over, and where the time goes, from the histories of runs.

    sevchaos run move-four-vcpus --repeat 200 --runs RUNS
    python bench/downtime.py RUNS

A hand-over's downtime is that of the vCPU which stood still longest: from its last tick at the source to its first at
the destination. It is cut where the phases begin (when the first operation of each is handed to its VMM), so the parts
add up to it. `in the VMMs` is from when the first operation of a phase began there to when the last one ended; the
rest of it is the runner and the VMMs talking, and waiting for a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from chaos.errors import ExitCode
from chaos.history import file
from chaos.history.records import Done, Handover, History, Invoke

MS = 1_000_000
BEFORE = "before pause"
PHASES = (BEFORE, "pause", "send-state", "send-fd", "move", "load-state", "resume")


@dataclass(frozen=True, slots=True)
class Stood:
    """ns of one hand-over: in all, in each phase, and of each phase inside the VMMs."""

    downtime: int
    parts: dict[str, int]
    inside: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="a directory with histories in it, at any depth")
    options = parser.parse_args()
    paths = sorted(path for path in options.runs.rglob("history.jsonl") if "latest" not in path.parts)
    told = [file.read(path) for path in paths]
    measured = [stood for each in told for stood in handed_over(each)]
    ended = [record.outcome for each in told for record in each.records if isinstance(record, Handover)]
    print(f"{len(paths)} runs, {len(ended)} hand-overs, {ended.count('committed')} committed, {len(measured)} measured")
    if not measured:
        raise SystemExit(ExitCode.UNKNOWN)
    show(measured)


def handed_over(told: History) -> Iterator[Stood]:
    """Each hand-over of the run that was committed and whose vCPUs were seen to tick on both sides."""
    begun = 0
    for number, record in enumerate(told.records):
        if isinstance(record, Handover):
            if record.outcome == "committed" and record.stood:
                yield stood(told, record, begun, number)
            begun = number


def stood(told: History, ended: Handover, begun: int, over: int) -> Stood:
    answers = {record.op: record for record in told.records if isinstance(record, Done)}
    invokes = [r for r in told.records[begun:over] if isinstance(r, Invoke) and r.step == ended.step and r.phase]
    pauses = [invoke for invoke in invokes if invoke.f == "pause"]
    last_ticks = answers[pauses[-1].op].value["last_ticks"]
    assert isinstance(last_ticks, list)
    downtime = max(ended.stood)
    left = int(last_ticks[ended.stood.index(downtime)])
    starts = {phase: min(i.t for i in invokes if i.phase == phase) for phase in PHASES[1:]}
    # A tick may have been the last before the pause was asked for; the first may come after `resume` has answered.
    cuts = [left, *(min(max(start, left), left + downtime) for start in starts.values()), left + downtime]
    inside = {phase: _took([answers[i.op] for i in invokes if i.phase == phase]) for phase in starts}
    parts = {phase: end - start for phase, (start, end) in zip(PHASES, pairwise(cuts), strict=True)}
    return Stood(downtime, parts, {BEFORE: 0} | inside)


def _took(answers: Sequence[Done]) -> int:
    return max(done.ended for done in answers) - min(done.began for done in answers)


def show(measured: Sequence[Stood]) -> None:
    print(f"{'ms':<14}{'min':>9}{'median':>9}{'p90':>9}{'p99':>9}{'max':>9}{'mean':>9}{'share':>8}{'in the VMMs':>14}")
    whole = sum(stood.downtime for stood in measured)
    row("downtime", [stood.downtime for stood in measured], whole, None)
    for phase in PHASES:
        parts = [stood.parts[phase] for stood in measured]
        row(phase, parts, whole, [stood.inside[phase] for stood in measured])


def row(name: str, values: Iterable[int], whole: int, inside: Sequence[int] | None) -> None:
    ordered = sorted(values)
    figures = [at(ordered, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] + [sum(ordered) / len(ordered)]
    cells = "".join(f"{figure / MS:>9.1f}" for figure in figures)
    told = "" if inside is None else f"{at(sorted(inside), 0.5) / MS:>14.1f}"
    print(f"{name:<14}{cells}{sum(ordered) / whole:>8.0%}{told}")


def at(ordered: Sequence[int], share: float) -> int:
    """The value that so much of the others are not above: nearest rank."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


if __name__ == "__main__":
    main()
