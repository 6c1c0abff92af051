# SPDX-License-Identifier: Apache-2.0
"""From an experiment and its history to a verdict on the run.

The checkers judge what they see. What they cannot see is judged here: whether the history is whole, whether the
script was carried out, whether every planned fault struck, every hold was reached and what was to happen together did.
If not, nothing that looks kept was put to the test, so it becomes unknown, with that reason. A run that did nothing,
because this kernel does not know what the experiment is about, is skipped as a whole. A deviation that was seen stays
one: evidence against a promise does not need the rest of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep, HoldStep, SweepStep, TogetherStep, walk
from chaos.history.reading import fatal
from chaos.history.records import Done, Exited, Fault, Held, History, Invoke, Note
from chaos.history.sweeps import swept
from chaos.judge import findings
from chaos.judge.checkers import CHECKERS
from chaos.judge.findings import Finding
from chaos.judge.parts import skipped
from chaos.judge.survivors import survivors
from chaos.judge.verdict import Outcome, RunVerdict, Verdict, worst
from chaos.promises import PROMISES

TOGETHER = frozenset({"move", "mirror", "moves"})


def judge(experiment: Experiment, history: History, *, known: Sequence[Finding] = ()) -> RunVerdict:
    """Judge every promise, those that the experiment lists first. The others need not be kept, and count if broken.

    `known` are the written findings to accept (`sevchaos run --accept-known`). With them a deviation that is one of
    them, and an unknown that the experiment says it cannot avoid, for the reason that it states, carry `accepted`; with
    none, nothing is accepted, and nothing is noted of findings that were not seen.
    """
    header = history.header
    void = tuple(shortcomings(experiment, history))
    skip = skipped_whole(history)
    kernel = header.kernel if header is not None else ""
    others = [promise for promise in PROMISES if promise not in experiment.promises]
    judged = [_judge(experiment, history, promise, void, skip) for promise in experiment.promises]
    for promise in others:
        judged.append(msgspec.structs.replace(_judge(experiment, history, promise, void, skip), listed=False))
    if known:
        judged = [_accepted(experiment, verdict, kernel, known, void=bool(void)) for verdict in judged]
    unseen = findings.unseen(experiment.name, judged, kernel, known) if not void else []
    return RunVerdict(
        experiment=experiment.name,
        kernel=kernel,
        host=header.host if header is not None else "",
        seed=header.seed if header is not None else 0,
        outcome=worst(verdict.outcome for verdict in judged if verdict.counts),
        verdicts=tuple(judged),
        left="; ".join(r.text for r in history.records if isinstance(r, Note) and r.topic == "left"),
        notes=tuple(findings.told_unseen(finding, experiment.name, kernel) for finding in unseen),
    )


def skipped_whole(history: History) -> str:
    """Why the run was skipped before anything was done, "" if it was not."""
    end = history.end
    if history.damage or end is None or end.complete or any(isinstance(r, Invoke) for r in history.records):
        return ""
    said = {r.text for r in history.records if isinstance(r, Note) and r.topic == "skipped" and r.step < 0}
    return end.reason if end.reason in said else ""  # another reason beside it is a failure, and counts as one


def shortcomings(experiment: Experiment, history: History) -> Iterator[str]:
    """Why nothing in the history can be taken as kept; nothing if it can."""
    if history.damage:
        yield f"the history is damaged: {history.damage}"
    elif history.end is None:
        yield "the history breaks off"
    elif not history.end.complete:
        yield f"the run is incomplete: {history.end.reason or 'no reason was given'}"
    if history.header is not None and history.header.experiment != experiment.name:
        yield f"the history is of another experiment, {history.header.experiment}"
    # As often as there are such steps: those inside a migration all have its number.
    struck = Counter((fault.step, fault.fault, fault.target) for fault in _struck(history))
    reached = Counter((r.step, r.hold) for r in history.records if isinstance(r, Held) and r.reached)
    for number, step in walk(experiment.script):
        if isinstance(step, FaultStep):
            struck[number, step.fault, step.target] -= 1
            if struck[number, step.fault, step.target] < 0:
                what = step.target or "the host"
                yield f"the run is void: nothing shows that the fault {step.fault!r} of step {number} struck {what}"
        elif isinstance(step, HoldStep):
            reached[number, step.at] -= 1
            if reached[number, step.at] < 0:
                yield f"the run is void: the hold {step.at!r} of step {number} was not reached"
        elif isinstance(step, SweepStep) and (short := _swept(history, number, step)):
            yield f"the run is void: step {number}: {short}"
        elif isinstance(step, TogetherStep) and not _overlapped(history, number):
            yield f"the run is void: nothing shows that any two operations of step {number} overlapped"


def _struck(history: History) -> Iterator[Fault]:
    """The evidence of faults that struck. A fatal signal that did not end a process with a move under way, or one that
    is seen to live on, struck as well: that it ends nobody is what P8 judges, and no failure of ours."""
    outlived = {(survivor.fault.seq, survivor.agent) for survivor in survivors(history)}
    moving: dict[int, str] = {}
    sent: dict[tuple[int, str, str], set[str]] = {}
    for record in history.records:
        if isinstance(record, Invoke) and record.f in TOGETHER:
            moving[record.op] = record.agent
        elif isinstance(record, Done):
            moving.pop(record.op, None)
        elif isinstance(record, Exited):
            moving = {op: agent for op, agent in moving.items() if agent != record.agent}
            sent = {key: ends - {record.agent} for key, ends in sent.items()}
        elif isinstance(record, Fault) and record.event == "apply" and fatal(record):
            lives = {agent for agent in record.ends if (record.seq, agent) in outlived}
            sent[record.step, record.fault, record.target] = set(record.ends) & {*moving.values(), *lives}
        if isinstance(record, Fault) and record.event == "evidence":
            hit = record.struck or sent.get((record.step, record.fault, record.target))
            if hit:
                yield record


def _swept(history: History, number: int, step: SweepStep) -> str:
    """What the sweep lacks: that the points were counted, and that each that was always there failed; "" if nothing. Of
    those that were there at one time and not at another nobody can say it."""
    found, what = swept(history, number, *step.operation), step.swept
    if found.refused_counts:
        return f"{what} was refused although no fault point of it was to fail"
    if len(found.counts) < 2:
        return f"the fault points of {what} were not counted, and counted again"
    if not max(found.counts):
        return f"there is no fault point in {what}"
    if not found.failed or not {*range(1, min(found.counts) + 1)} <= found.failed:
        return f"not every fault point of {what} failed"
    return ""


def _overlapped(history: History, number: int) -> bool:
    """Whether two of the operations that were to begin together were under way at the same time, by their own times.
    The moves that a loop was made of are no operations beside it."""
    calls = sorted(
        (done.began, done.ended)
        for invoke, done in history.operations()
        if invoke.step == number and invoke.f in TOGETHER and "of" not in invoke.args
        if done is not None and done.began
    )
    return any(later < ended for (_, ended), (later, _) in pairwise(calls))


def _judge(experiment: Experiment, history: History, promise: str, void: Sequence[str], skip: str) -> Verdict:
    checker = CHECKERS.get(promise)
    if checker is None:
        return Verdict(promise=promise, outcome=Outcome.UNKNOWN, reason="no checker judges this promise yet")
    verdict = checker(experiment, history)
    if skip and verdict.outcome is not Outcome.BROKEN:
        return skipped(promise, skip, what="the-run")
    if not void or verdict.outcome is Outcome.BROKEN:
        return verdict
    # A skip says that the rest was kept, so it falls with it.
    reason = f"{'; '.join(void)} (otherwise {verdict.outcome.value}: {verdict.reason})"
    return msgspec.structs.replace(verdict, outcome=Outcome.UNKNOWN, reason=reason)


def _accepted(
    experiment: Experiment, verdict: Verdict, kernel: str, known: Sequence[Finding], *, void: bool
) -> Verdict:
    finding = findings.matching(verdict, kernel, known)
    if finding is not None:
        return msgspec.structs.replace(verdict, accepted=str(finding))
    another = findings.elsewhere(verdict, kernel, known)
    if another is not None:
        return msgspec.structs.replace(verdict, elsewhere=f"{another}, known, but not on this version")
    stated = experiment.unaskable.get(verdict.promise) if verdict.listed else None
    if stated is not None and not void and (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, stated.signature):
        return msgspec.structs.replace(verdict, accepted=f"not askable here: {stated.why}")
    return verdict
