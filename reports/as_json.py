# SPDX-License-Identifier: Apache-2.0
"""The report for programs: a JSON object.

format                            2; another number is another format. 1 was a list of what are now `runs`, and said
                                  held and deviated for kept and broken
exit_code                         of all runs together
counts                            of all runs together: how many promises are kept, broken, unknown, skipped,
                                  accepted_broken (as a written finding says) and accepted_unknown (as the experiment
                                  states); partly_skipped are those of the broken and unknown, accepted or not, of
                                  which a part was skipped. A promise that is not listed counts if it is broken
exceeded                          what there is more of than --max-skipped and --max-unknown allow, in sentences
runs                              an object a run:

experiment, kernel, host, seed    what was run and where; kernel is the full x.y.z
earlier                           how many runs the same opened lab, or the same runner, had carried out before
outcome                           kept, broken, unknown or skipped: the worst of the verdicts
exit_code                         of this run alone, with what was accepted left out
counts                            the same of this run
notes                             written findings that this run shows, and did not show: in sentences
directory                         the run directory, as it was given
damage                            what is wrong with the history, "" if nothing
sweeps                            an object a sweep: `step`, `vm`, `operation`, how many fault `points` there were at
                                  most, how many of these were `tried` and `failed`, and for how many it was `refused`
verdicts                          an object a promise, as `chaos.judge.verdict.Verdict` has it: all promises, those
                                  that the experiment lists (`listed`) first
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from chaos.experiment.steps import SweepStep, walk
from chaos.history.sweeps import swept
from chaos.judge.verdict import UNBOUNDED, Bounds, exceeded, exit_code, tally
from reports.run import Run

FORMAT = 2


def render(runs: Sequence[Run], bounds: Bounds = UNBOUNDED) -> str:
    """The runs as JSON, indented, without a line end."""
    verdicts = [run.verdict for run in runs]
    told = {
        "format": FORMAT,
        "exit_code": int(exit_code(verdicts, bounds)),
        "counts": tally(verdicts),
        "exceeded": exceeded(verdicts, bounds),
        "runs": [_object(run) for run in runs],
    }
    return msgspec.json.format(msgspec.json.encode(told)).decode()


def _object(run: Run) -> dict[str, object]:
    verdict = run.verdict
    return {
        "experiment": verdict.experiment,
        "kernel": verdict.kernel,
        "host": verdict.host,
        "seed": verdict.seed,
        "earlier": run.history.header.earlier if run.history.header is not None else 0,
        "outcome": verdict.outcome,
        "exit_code": int(verdict.exit_code),
        "counts": verdict.tally,
        "notes": verdict.notes,
        "directory": str(run.directory),
        "damage": run.history.damage,
        "sweeps": [
            _sweep(run, number, step) for number, step in walk(run.experiment.script) if isinstance(step, SweepStep)
        ],
        "verdicts": verdict.verdicts,
    }


def _sweep(run: Run, number: int, step: SweepStep) -> dict[str, object]:
    found = swept(run.history, number, *step.operation)
    return {
        "step": number, "vm": found.vm, "operation": found.operation, "points": max(found.counts, default=0),
        "tried": len(found.tried), "failed": len(found.failed), "refused": len(found.refused),
    }  # fmt: skip
