# SPDX-License-Identifier: Apache-2.0
"""P3, dead source: after a successful move every ioctl on the source's descriptors fails with EIO; after a failed one
none does.

EIO is also what KVM answers to a process with another address space. So the source is asked in the process that
created it, every descriptor of it, and a live VM beside it must not answer EIO. A dead process cannot be asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from errno import EIO

from chaos.checkers.evidence import (
    IOCTLS,
    Evidence,
    Move,
    combine,
    deviated,
    errname,
    held,
    ioctl_answered,
    says_dead,
    unknown,
)
from chaos.checkers.storm import Call, instant_of_death
from chaos.experiment import Experiment
from chaos.history import Answer, Asked, Done, History, Invoke
from chaos.verdict import Verdict

PROMISE = "P3"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = Evidence(history)
    if not evidence.moves:
        return unknown(PROMISE, "no move was tried, so no source could die")
    return combine(PROMISE, [part for move in evidence.moves for part in _move(experiment, evidence, move)])


def _move(experiment: Experiment, evidence: Evidence, move: Move) -> Iterator[Verdict]:
    """The questions put to the source of one move, until it is the source of the next."""
    if move.happened is None or move.over is None:
        yield unknown(PROMISE, f"{move}, and nobody can say whether it took effect", move.records)
        return
    later = evidence.next_move(move.source, move.over)
    end = later.invoke.seq if later is not None else len(evidence.history.records)
    asked = [record for record in evidence.asked if record.vm == move.source and move.over < record.seq < end]
    for record in asked:
        yield judge_asked(experiment, evidence, move, record)
    if not asked and later is None:
        yield _not_asked(evidence, move)
    yield from _instant(evidence, move, end)
    done = [(i, d) for i, d in evidence.done(move.source) if i.f in IOCTLS and move.over < i.seq < end]
    yield from _operations(move, done)


def _not_asked(evidence: Evidence, move: Move) -> Verdict:
    agent = evidence.agent(move.source)
    exited = evidence.exited(agent)
    told = any(invoke.f == "exit" and invoke.agent == agent for invoke, _ in evidence.operations)
    if exited is not None and not told:
        reason = "the source process is dead, and only it could ask its file descriptors"
        return unknown(PROMISE, reason, (*move.records, exited))
    return unknown(PROMISE, f"{move}, and {move.source} was not asked afterwards", move.records)


def judge_asked(
    experiment: Experiment, evidence: Evidence, move: Move, asked: Asked, promise: str = PROMISE
) -> Verdict:
    """What the answers of the source say after the move, as a verdict on `promise`."""
    if move.happened:
        wrong = [answer for answer in asked.answers if answer.errno != EIO]
        if wrong:
            reason = f"{move}, and {_several(wrong)} of {asked.vm} still answered: {_compact(wrong)}"
            return _deviated(promise, move, asked, reason, "answered", expected="EIO", seen=_compact(wrong))
    problem = _worthless(experiment, evidence, asked)
    if problem:
        return unknown(promise, problem, (asked,))
    wrong = [answer for answer in asked.answers if answer.errno == EIO]
    if wrong and not move.happened:
        reason = f"{move}, yet {_several(wrong)} of {asked.vm} failed with EIO"
        return _deviated(promise, move, asked, reason, "dead", expected="no EIO", seen=_compact(asked.answers))
    count = len(asked.answers)
    said = f"{count} of {count} ioctls on {asked.vm} {'failed with EIO' if move.happened else 'did not answer EIO'}"
    return held(promise, f"{move}; {said}, asked in {asked.agent} beside a live VM", (*move.records, asked))


def _worthless(experiment: Experiment, evidence: Evidence, asked: Asked) -> str:
    """Why the answers prove nothing, "" if they do."""
    if not asked.answers:
        return f"{asked.vm} was asked nothing"
    if asked.agent != evidence.agent(asked.vm):
        return f"{asked.vm} was asked in {asked.agent}, which did not create it: EIO means nothing there"
    if any(answer.control == EIO for answer in asked.answers):
        return f"the live VM beside {asked.vm} answered EIO as well, so its EIO means nothing"
    vcpus = experiment.vms[asked.vm].vcpus if asked.vm in experiment.vms else 0
    missing = {"vm", *(f"vcpu {number}" for number in range(vcpus))} - {answer.fd for answer in asked.answers}
    return f"of {asked.vm} only some descriptors were asked, not {', '.join(sorted(missing))}" if missing else ""


def _instant(evidence: Evidence, move: Move, end: int) -> Iterator[Verdict]:
    """Before, during and after the move, the source's own ioctls leave room for one instant of its death."""
    if not move.happened or move.done is None or move.done.began == 0 or not move.other:
        return
    agent, records = evidence.agent(move.source), {}
    for invoke, done in evidence.done(move.source):
        if invoke.f in IOCTLS and invoke.agent == agent and invoke.seq < end and done.began and ioctl_answered(done):
            records[Call(done.began, done.ended, EIO if says_dead(done) else 0)] = done
    for found in instant_of_death(records, Call(move.done.began, move.done.ended, 0)).contradictions:
        if found.second is not None and found.second.began > move.done.ended:
            continue  # answered after the move: told below, with its operation
        calls = [records[call] for call in (found.first, found.second) if call is not None]
        yield deviated(
            PROMISE,
            f"{move}, and {move.source} did not die at one instant: {found.kind.replace('-', ' ')}",
            (*move.records, *calls),
            signature=f"source-in-move:{found.kind}",
            expected="one instant of death",
            seen=found.kind.replace("-", " "),
        )


def _operations(move: Move, done: Iterable[tuple[Invoke, Done]]) -> Iterator[Verdict]:
    """Ordinary operations on the source afterwards are witnesses too, though nobody meant to ask."""
    for invoke, answer in done:
        if says_dead(answer) == move.happened or not ioctl_answered(answer):
            continue
        said = "ok" if answer.outcome == "ok" else errname(answer.errno)
        yield deviated(
            PROMISE,
            f"{move}, and {invoke.f} of {move.source} answered {said} afterwards",
            (*move.records, invoke, answer),
            signature=f"{_which(move)}:{'dead' if says_dead(answer) else 'answered'}:{invoke.f}",
            expected="EIO" if move.happened else "no EIO",
            seen=said,
        )


def _deviated(promise: str, move: Move, asked: Asked, reason: str, how: str, *, expected: str, seen: str) -> Verdict:
    signature = f"{_which(move)}:{how}"
    return deviated(promise, reason, (*move.records, asked), signature=signature, expected=expected, seen=seen)


def _which(move: Move) -> str:
    return "source-after-move" if move.happened else "source-after-failed-move"


def _several(answers: list[Answer]) -> str:
    return f"{len(answers)} ioctl{'s' if len(answers) > 1 else ''}"


def _compact(answers: Iterable[Answer]) -> str:
    """How often each errno came: "5 EIO, 2 ok"."""
    counts = Counter(errname(answer.errno) for answer in answers)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
