# SPDX-License-Identifier: Apache-2.0
"""P7, errors: each refusal has its documented errno, in the documented order of checks.

Every move, mirror, INIT, launch command and GUEST_STATUS that a kernel has answered is held against the oracle. What
GUEST_STATUS says where a context was moved to is left to P5, which has something to compare it with. The promise is
about refusals, so a run in which nothing was refused shows nothing. An EBUSY that the oracle allows because another
move or mirror may have been in the way must have had one there (`migration_flag`). What the contract leaves open is
counted apart: it is not wrong, and documented it is not either. An errno that a fault may have chosen is nobody's
while the evidence of that fault is not on record.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EBUSY

from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep, walk
from chaos.history.reading import argument, errname
from chaos.history.records import Fault, History
from chaos.judge.against_oracle import Contract, Judged, events_of
from chaos.judge.checkers.p10_limits import CHARGING, EventCounter, due
from chaos.judge.evidence import RunEvidence
from chaos.judge.migration_flag import MigrationFlags
from chaos.judge.oracle import OracleAnswer
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P7"
RETURNS = "kernel-return"  # the fault that lets a function of the kernel return what it would not


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    contract = Contract(evidence)
    if contract.gap:
        return unknown(PROMISE, contract.gap)
    every = list(contract.judged())
    forced = _forced(experiment, history)
    judged = [each for each in every if not _is_left_to_p5(evidence, each) and not _by_fault(each, forced)]
    doubtful = [each for each in every if _by_fault(each, [f for f in forced if not f.sure])]
    wrong = [each for each in judged if not each.fits or (each.gap and each.answer.errno)]
    parts = [_judged(contract, every, each) for each in wrong]
    for each in doubtful:
        text = f"{_named(each)} answered {_said(each.answer)}, and whether {RETURNS} has chosen that is not on record"
        parts.append(unknown(PROMISE, text, (each.invoke, each.done)))
    flags = MigrationFlags(evidence, contract)
    unheld = [(each, part) for each in judged if each not in wrong if (part := _unheld(evidence, flags, each))]
    parts += [part for _, part in unheld]
    wrong += [each for each, _ in unheld]
    left_open = [each for each in judged if each.left_open and each not in wrong]
    refused = [each for each in judged if each.answer.errno and each not in (*wrong, *left_open)]
    beside = f"; {len(left_open)} answers are not in the contract: {_listed(left_open)}" if left_open else ""
    if refused:
        text = f"refusals as documented: {_listed(refused)}{beside}"
        parts.append(kept(PROMISE, text, [each.done for each in refused]))
    elif not parts:
        text = f"none of {len(judged)} operations was refused as the contract says, so no errno was seen{beside}"
        parts.append(unknown(PROMISE, text))
    return combine(PROMISE, parts)


def _listed(answered: Sequence[Judged]) -> str:
    told = ", ".join(f"{_named(each)}: {errname(each.answer.errno)}" for each in answered[:3])
    return told + (f", and {len(answered) - 3} more" if len(answered) > 3 else "")


@dataclass(frozen=True, slots=True)
class Forced:
    """An errno that a fault made a function of the kernel return, between two records; `sure` if that is on record."""

    code: int
    begun: int
    over: int
    sure: bool


def _forced(experiment: Experiment, history: History) -> list[Forced]:
    """What faults have chosen, or may have in a run that was carried out and does not say what became of them. What is
    `planted` is a defect and no fault: it is to be found."""
    whole = history.end is not None and history.end.complete
    faults = [r for r in history.records if isinstance(r, Fault) and r.fault == RETURNS]
    forced = []
    for number, step in walk(experiment.script):
        if not isinstance(step, FaultStep) or step.fault != RETURNS or step.options.get("planted"):
            continue
        value = str(step.options.get("value"))
        code = getattr(errno, value.removeprefix("-"), None) if value.startswith("-E") else -int(value)
        mine = [r for r in faults if r.step == number and r.target == step.target]
        begun = [r.seq for r in mine if r.event == "apply"]
        undone = [r.seq for r in mine if r.event == "undo"]
        told = [r.struck for r in mine if r.event == "evidence" and r.struck is not None]
        known = bool(told and begun) or any(r.event == "withheld" for r in mine)
        if isinstance(code, int) and ((begun and any(told)) or (whole and not known)):
            over = undone[0] if undone else len(history.records)
            forced.append(Forced(code, begun[0] if begun else -1, over, sure=known))
    return forced


def _by_fault(each: Judged, forced: Sequence[Forced]) -> bool:
    """Whether a fault, and no check of the kernel's, may have chosen the errno."""
    seen, at = each.answer.errno, each.done.seq
    return not each.fits and any(f.code == seen and f.begun < each.invoke.seq and at < f.over for f in forced)


def _is_left_to_p5(evidence: RunEvidence, each: Judged) -> bool:
    vm, given = argument(each.invoke, "vm"), (move for move in evidence.moves if move.happened is not False)
    moved_to = (move.destination == vm and move.invoke.seq < each.invoke.seq for move in given)
    return each.invoke.f == "guest_status" and any(moved_to)


def _judged(contract: Contract, every: Sequence[Judged], each: Judged) -> Verdict:
    evidence = contract.evidence
    records = (each.invoke, each.done)
    if each.gap:
        return unknown(PROMISE, f"{_named(each)} answered {errname(each.answer.errno)}: {each.gap}", records)
    seen, due = _said(each.answer), sorted({_said(answer) for answer in each.allowed})
    # What the firmware may refuse for reasons of its own differs by host, and is no part of what is wrong.
    own = sorted({_said(answer) for answer in each.allowed if not answer.firmware}) or due
    return broken(
        PROMISE,
        f"{_named(each)}: {seen}, expected {' or '.join(due)}{_though(evidence, each)}",
        records,
        signature=f"{_kind(contract, every, each)}:{seen}-for-{'-or-'.join(own)}".replace(" ", "-"),
        expected=" or ".join(due),
        seen=seen,
    )


def _unheld(evidence: RunEvidence, flags: MigrationFlags, each: Judged) -> Verdict | None:
    """That it was told EBUSY for a migration flag, which another must hold, and nobody did."""
    number, records = flags.of(each), (each.invoke, each.done)
    text = f"{_named(each)} answered EBUSY, and no other move or mirror held the migration flag of either VM"
    if number in flags.doubtful:
        return unknown(PROMISE, f"{text} in the end; nobody can say whether it was asked once more then", records)
    if number not in flags.stuck:
        return None
    due = sorted({_said(answer) for answer in each.allowed} - {"EBUSY"})
    return broken(
        PROMISE,
        text,
        records,
        signature=f"{evidence.kind(each.invoke)}:EBUSY-of-nobody",
        expected=" or ".join(due),
        seen="EBUSY",
    )


def _kind(contract: Contract, every: Sequence[Judged], each: Judged) -> str:
    """The operation, for a signature. A move that went by the wrong key, or into a VM that died while it was under way,
    is one that a finding is about, as is an INIT after one whose state could not be written, and none other is."""
    evidence = contract.evidence
    if each.invoke.f == "init" and contract.unwritten(each.invoke):
        return "init-after-unwritten-state"
    if each.as_sev is not None and each.as_sev.errno == each.answer.errno and _accounted(contract, every, each):
        return "move-of-sev_es-as-sev"
    mine = (move for move in evidence.moves if move.invoke.op == each.invoke.op)
    return "move-into-the-dying" if any(map(evidence.died_meanwhile, mine)) else evidence.kind(each.invoke)


def _accounted(contract: Contract, every: Sequence[Judged], each: Judged) -> bool:
    """Whether the cgroup that would have refused a charge of `sev` has counted that it did. There are other reasons for
    EBUSY, a move that is still under way among them, and they count no event."""
    if not each.answer.errno or each.as_sev is None:
        return True
    before = next((o for o in reversed(contract.observations) if o.seq < each.invoke.seq), None)
    after = next((o for o in contract.observations if o.seq > each.done.seq), None)
    at = each.as_sev.at
    if before is None or after is None or not at:
        return False
    first, last = events_of(before, at, "sev"), events_of(after, at, "sev")
    charging = [other for other in every if other.invoke.f in CHARGING]
    low, high = due(contract.evidence, charging, before, after, EventCounter(at, "sev", "events"), as_sev=True)
    return first is not None and last is not None and low <= last - first <= high


def _though(evidence: RunEvidence, each: Judged) -> str:
    """Of an EBUSY where a charge would have been in order: that there was room for it."""
    if each.answer.errno != EBUSY or each.invoke.f not in ("init", "move"):
        return ""
    worlds = evidence.ledger.during.get(each.invoke.op, frozenset())
    payers = sorted({world.home(each.invoke.agent) or "" for world in worlds})
    key = argument(each.invoke, "key") or evidence.key(argument(each.invoke, "source"))
    return f", and cgroup {' or '.join(map(repr, payers))} had room for a charge of {key}"


def _said(answer: OracleAnswer) -> str:
    status = f" (status {answer.status})" if answer.status else ""
    return f"{errname(answer.errno)} of the firmware{status}" if answer.firmware else errname(answer.errno)


def _named(each: Judged) -> str:
    vm, source = argument(each.invoke, "vm"), argument(each.invoke, "source")
    if each.invoke.f == "platform":
        return f"{argument(each.invoke, 'command')} of /dev/sev"
    return f"{each.invoke.f} of {vm}" + (f" from {source}" if source else "")
