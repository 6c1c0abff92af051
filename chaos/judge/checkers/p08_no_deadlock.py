# SPDX-License-Identifier: Apache-2.0
"""P8, no deadlock: moves among any VMs end, a fatal signal always ends a waiting one, and one that was held goes on.

Every operation that was begun must have been answered, or its process must be gone. A process that nothing in the
experiment meant to end, and that was killed with an operation under way, was killed because that did not end.

Where the script did not come to its end, nobody can say so of all that was left under way. But what it had waited for
as long as it was to wait, and found asleep inside a system call with nothing in its way, is a deadlock all the same.
"""

from __future__ import annotations

from chaos.experiment.model import Experiment
from chaos.history.records import Done, Exited, Fault, Held, History, Invoke, Overdue, Record, Traced
from chaos.judge.evidence import RunEvidence
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.timeline import named, told
from chaos.judge.verdict import Verdict

PROMISE = "P8"
ASLEEP = "D"  # where no signal but a fatal one reaches it
MOVES = ("move", "mirror", "moves")


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    whole = not history.damage and history.end is not None and history.end.complete
    parts = [
        _left(evidence, invoke, done, whole=whole)
        for invoke, done in evidence.operations
        if done is None or done.outcome == "info"
    ]
    moves = [
        (invoke, done)
        for invoke, done in evidence.operations
        if invoke.f in MOVES and done is not None and done.outcome != "info"
    ]
    if moves:
        held_ops = {r.op for r in history.records if isinstance(r, Held) and r.reached}
        waited = sum(invoke.op in held_ops for invoke, _ in moves)
        told = f"{len(moves)} moves and mirrors ended" + (f", {waited} of them after a hold" if waited else "")
        parts.append(kept(PROMISE, told, [done for _, done in moves]))
        for invoke, done in moves:
            if (late := _overdue(evidence, invoke)) is not None:
                text = f"{named(invoke)} was waited for in vain; it ended only when what it waited for was gone"
                parts.append(unknown(PROMISE, text, (invoke, late, done)))
    elif not any(invoke.f in MOVES for invoke, _ in evidence.operations):
        parts.append(unknown(PROMISE, "no move and no mirror was tried, so none could wait for another"))
    return combine(PROMISE, parts)


def _left(evidence: RunEvidence, invoke: Invoke, done: Done | None, *, whole: bool) -> Verdict:
    """An operation that gave no answer: whether its process had a reason to go, and went."""
    exited = evidence.exited(invoke.agent, after=invoke.seq)
    struck = _struck(evidence, invoke)
    last = evidence.during.events.get(invoke.op, (None,))[-1]
    late = _overdue(evidence, invoke)
    records: tuple[Record, ...] = tuple(r for r in (invoke, late, done, struck, exited, last) if r is not None)
    if exited is None and struck is not None:
        reason, how = f"{struck.fault} struck {invoke.agent}, and did not end {named(invoke)}", "signal-did-not-end"
    elif exited is None or (struck is None and _ended_by_us(exited)):
        reason, how = f"{named(invoke)} never ended", "never-ended"
    elif late is not None:
        reason, how = f"{named(invoke)} did not end before its process did", "never-ended"
    else:
        by = struck.fault if struck is not None else f"its process ended by itself, status {exited.status}"
        return kept(PROMISE, f"{named(invoke)} ended with its process: {by}", records)
    if not whole and late is None:
        return unknown(PROMISE, f"{reason}, but the run was cut short", records)
    return broken(
        PROMISE, reason, records, signature=f"{how}:{invoke.f}", expected="an answer, or the end of its process",
        seen=_seen(late, last),
    )  # fmt: skip


def _overdue(evidence: RunEvidence, invoke: Invoke) -> Overdue | None:
    """That the operation was waited for in vain, and slept in the kernel although nothing of ours stopped it."""
    late = (r for r in evidence.history.records if isinstance(r, Overdue) and r.op == invoke.op)
    return next((record for record in late if record.free and record.state == ASLEEP and record.call), None)


def _seen(late: Overdue | None, last: Traced | None) -> str:
    if last is not None:
        return f"its thread last {told(last)}"
    return f"it slept in {late.sleeping or late.call}" if late is not None else ""


def _struck(evidence: RunEvidence, invoke: Invoke) -> Fault | None:
    """The fault that was applied after the operation had begun, and may be its process's end."""
    return next(
        (
            record
            for record in evidence.history.records
            if isinstance(record, Fault) and record.event == "apply"
            if record.seq > invoke.seq and invoke.agent in record.ends
        ),
        None,
    )


def _ended_by_us(exited: Exited) -> bool:
    """Killed, and by no fault: whoever carries out the run clears away what does not end by itself."""
    return exited.status < 0
