# SPDX-License-Identifier: Apache-2.0
"""P8, no deadlock: moves among any VMs end, a fatal signal always ends a waiting one, and one that was held goes on.

Every operation that was begun must have been answered, or its process must be gone. A process that nothing in the
experiment meant to end, and that was killed with an operation under way, was killed because that did not end.

Where the script did not come to its end, nobody can say so of all that was left under way. But what it had waited for
as long as it was to wait, and found asleep inside a system call with nothing in its way, is a deadlock all the same.

That a process is gone in the end does not show that the signal ended its move: the runner takes vCPUs out and opens
holds when a kill does not work, and then the old signal is delivered. So a killed move must be gone within a stated
time, and before anything was let go that it may have waited for. Where the end of a process is not on record, or what
the script did to it, nobody can say what ended the move.

Whatever it does, a process that was sent a fatal signal dies: one that is seen to go on breaks the promise, with a move
or without. Among those signals is cgroup.kill, which the kernel documents to kill all processes of the cgroups that it
is for.
"""

from __future__ import annotations

from collections.abc import Iterator

from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep, walk
from chaos.history.reading import argument, fatal, names
from chaos.history.records import (
    Done,
    Exited,
    Fault,
    Firmware,
    Held,
    History,
    Invoke,
    Overdue,
    Record,
    Released,
    Traced,
)
from chaos.judge.evidence import RunEvidence
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.survivors import ENDS_WITHIN, NS, Survivor, survivors
from chaos.judge.timeline import named, told
from chaos.judge.verdict import Verdict

PROMISE = "P8"
ASLEEP = "D"  # where no signal but a fatal one reaches it
MOVES = ("move", "mirror", "moves")
# Four times as long as the slowest of 300 (see `survivors`); whatever is let go later, the signal had had its time.
LONGEST = 1.0


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    whole = not history.damage and history.end is not None and history.end.complete
    unsaid = _unsaid(experiment, history)
    parts = [
        _left(evidence, invoke, done, unsaid, whole=whole)
        for invoke, done in evidence.operations
        if done is None or done.outcome == "info"
    ]
    parts += [_survived(experiment, evidence, survivor, whole=whole) for survivor in survivors(history)]
    moves = [
        (invoke, done)
        for invoke, done in evidence.operations
        if invoke.f in MOVES and done is not None and done.outcome != "info"
    ]
    if moves:
        held_ops = {r.op for r in history.records if isinstance(r, Held) and r.reached}
        waited = sum(invoke.op in held_ops for invoke, _ in moves)
        told = f"every move and mirror ended: {len(moves)}" + (f", {waited} of them after a hold" if waited else "")
        parts.append(kept(PROMISE, told, [done for _, done in moves]))
        for invoke, done in moves:
            if (late := _overdue(evidence, invoke)) is not None:
                text = f"{named(invoke)} timed out; it completed only when what it was blocked on was gone"
                parts.append(unknown(PROMISE, text, (invoke, late, done)))
    elif not any(invoke.f in MOVES for invoke, _ in evidence.operations):
        parts.append(unknown(PROMISE, "no move and no mirror was tried, so none could wait for another"))
    return combine(PROMISE, parts)


def _survived(experiment: Experiment, evidence: RunEvidence, survivor: Survivor, *, whole: bool) -> Verdict:
    """A process that lives although it was sent a fatal signal. Where the script went no further, the signal may not
    have been sent."""
    fault, agent = survivor.fault, survivor.agent
    headless = _first_thread_ended(experiment, evidence, agent, fault)
    text = f"{fault.fault} struck {agent}, and {survivor.after:.1f} s later it began {named(survivor.invoke)}"
    records: tuple[Record, ...] = (fault, survivor.invoke, survivor.done)
    if headless is not None:
        text, records = f"{text}; its first thread had ended before", (headless, *records)
    if not whole:
        return unknown(PROMISE, f"{text}, but the run was cut short", records)
    return broken(
        PROMISE, text, records,
        signature=f"{fault.fault}-did-not-end:process{'' if headless is None else '-without-its-first-thread'}",
        expected="the end of its process", seen="it lives",
    )  # fmt: skip


def _first_thread_ended(experiment: Experiment, evidence: RunEvidence, agent: str, before: Fault) -> Fault | None:
    """That a fault had ended the process's first thread: the kernel knows a process by it."""
    first = {
        (number, step.fault, step.target)
        for number, step in walk(experiment.script)
        if isinstance(step, FaultStep) and step.options.get("thread") == "first"
    }
    faults = (r for r in evidence.history.records[: before.seq] if isinstance(r, Fault))
    ended = (r for r in faults if r.event == "evidence" and r.struck and (r.step, r.fault, r.target) in first)
    return next((record for record in ended if evidence.agent(record.target) == agent), None)


def _unsaid(experiment: Experiment, history: History) -> str:
    """A fault of the script whose record is missing, or does not say whom it kills; "" if there is none."""
    faults = (r for r in history.records if isinstance(r, Fault) and r.event in ("apply", "withheld"))
    told = {(r.step, r.fault, r.target) for r in faults if r.ends or not fatal(r)}
    for number, step in walk(experiment.script):
        if isinstance(step, FaultStep) and (number, step.fault, step.target) not in told:
            return f"{step.fault} of step {number}"
    return ""


def _left(evidence: RunEvidence, invoke: Invoke, done: Done | None, unsaid: str, *, whole: bool) -> Verdict:
    """An operation that gave no answer: whether its process had a reason to go, and went."""
    exited = evidence.exited(invoke.agent, after=invoke.seq)
    struck = _struck(evidence, invoke)
    last = evidence.during.events.get(invoke.op, (None,))[-1]
    late = _overdue(evidence, invoke)
    records: tuple[Record, ...] = tuple(r for r in (invoke, late, done, struck, exited, last) if r is not None)
    sure = late is not None  # what was seen does not need the rest of the run
    if not sure and (missing := _missing(done, struck, exited, unsaid)):
        return unknown(PROMISE, f"{named(invoke)} ended with its process, and {missing} is not on record", records)
    if struck is not None and (found := _outlived(evidence, invoke, struck, exited)) is not None:
        sure, reason, more = found
        how, records = "signal-did-not-end", (*records, *more)
        if not sure:
            return unknown(PROMISE, reason, records)
    elif exited is None and struck is not None:
        reason, how = f"{struck.fault} struck {invoke.agent}, and did not end {named(invoke)}", "signal-did-not-end"
    elif exited is None or (struck is None and exited.status < 0):  # whoever carries out the run clears it away
        reason, how = f"{named(invoke)} never ended", "never-ended"
    elif late is not None:
        reason, how = f"{named(invoke)} did not end before its process did", "never-ended"
    elif struck is None:
        text = f"{named(invoke)} had not ended when its process did, by itself, with status {exited.status}"
        return unknown(PROMISE, text, records)
    else:
        text = f"{named(invoke)} ended with its process, {_seconds(struck, exited)} s after {struck.fault}"
        return kept(PROMISE, text, records)
    if not whole and not sure:
        return unknown(PROMISE, f"{reason}, but the run was cut short", records)
    return broken(
        PROMISE, reason, records, signature=f"{how}:{invoke.f}", expected="an answer, or the end of its process",
        seen=_seen(late, last),
    )  # fmt: skip


def _missing(done: Done | None, struck: Fault | None, exited: Exited | None, unsaid: str) -> str:
    """Which record of the end of a process is missing, in words, "" if none is."""
    if exited is None:
        return "" if done is None else "when that was"
    return f"whom {unsaid} struck" if struck is None and exited.status < 0 and unsaid else ""


def _outlived(
    evidence: RunEvidence, invoke: Invoke, struck: Fault, exited: Exited | None
) -> tuple[bool, str, tuple[Record, ...]] | None:
    """That a move or mirror outlived the fatal signal: what it waited for was let go first, or it took too long. It is
    whether that is sure, what is told of it, and the records. None if the signal ended it. Of other operations nothing
    is promised: who waits for the firmware cannot be killed."""
    if not fatal(struck) or invoke.f not in MOVES:
        return None
    end = exited if exited is not None else evidence.history.records[-1]
    took = (end.t - struck.t) / NS
    told = f"{named(invoke)} had not ended {took:.1f} s after {struck.fault} struck {invoke.agent}"
    if exited is not None:
        told = f"{named(invoke)} ended {took:.1f} s after {struck.fault} struck {invoke.agent}"
    release = next(_releases(evidence, invoke, struck, end.seq), None)
    records = (struck, end) if release is None else (struck, release, end)
    if release is not None:
        told += f", and what it waited for may have been let go before, after {(release.t - struck.t) / NS:.1f} s"
    if took <= ENDS_WITHIN and (release is None or exited is None):
        return None
    if (excuse := _held_up(evidence, invoke, struck)) is not None:
        return False, f"{told}; {excuse}", records
    if took > ENDS_WITHIN or (release is not None and (release.t - struck.t) / NS > LONGEST):
        return True, told, records
    return False, f"{told}; nobody can say which of the two ended it", records


def _releases(evidence: RunEvidence, invoke: Invoke, struck: Fault, before: int) -> Iterator[Record]:
    """What happened from the signal to record `before` that may let a waiting move go on."""
    vms = {argument(invoke, "vm"), argument(invoke, "source"), *names(invoke, "sources")}
    for record in evidence.history.records[struck.seq + 1 : before]:
        match record:
            case Released() | Exited() if getattr(record, "agent", "") not in struck.ends:
                yield record
            case Invoke(f="pause" | "close") if argument(record, "vm") in vms:
                yield record
            case Fault(event="undo", lets_go=True):
                yield record


def _held_up(evidence: RunEvidence, invoke: Invoke, struck: Fault) -> str | None:
    """What may have kept the process from ending although the move had."""
    for other, done in evidence.operations:
        left = other.f not in MOVES and (done is None or done.outcome == "info")
        if left and other.agent == invoke.agent and other.seq < struck.seq:
            return f"its process also had {named(other)} under way"
    own = {argument(i, "vm") for i, _ in evidence.operations if i.agent == invoke.agent and i.f == "create"}
    slow = any(isinstance(r, Firmware) and r.fault for r in evidence.history.records)
    if slow and evidence.given(frozenset(own)):
        return "its process also had a guest of its own to give up, and the firmware was told to fail or to be slow"
    return None


def _seconds(struck: Fault, exited: Exited) -> str:
    return f"{(exited.t - struck.t) / NS:.2f}"


def _overdue(evidence: RunEvidence, invoke: Invoke) -> Overdue | None:
    """That the operation was waited for in vain, and slept in the kernel although nothing of ours stopped it."""
    late = (r for r in evidence.history.records if isinstance(r, Overdue) and r.op == invoke.op)
    return next((record for record in late if record.free and record.state == ASLEEP and record.call), None)


def _seen(late: Overdue | None, last: Traced | None) -> str:
    if last is not None:
        return f"its thread last {told(last)}"
    return f"it slept in {late.sleeping or late.call}" if late is not None else "neither in time"


def _struck(evidence: RunEvidence, invoke: Invoke) -> Fault | None:
    """The fault that was applied after the operation had begun, and may be its process's end. One that may find nobody
    must have shown that it did, or the process be gone."""
    faults = [r for r in evidence.history.records if isinstance(r, Fault) and r.seq > invoke.seq]
    hit = {(r.fault, r.target, r.step) for r in faults if r.event == "evidence" and r.struck}
    gone = evidence.exited(invoke.agent, after=invoke.seq) is not None
    return next(
        (
            record
            for record in faults
            if record.event == "apply" and invoke.agent in record.ends
            if gone or fatal(record) or (record.fault, record.target, record.step) in hit
        ),
        None,
    )
