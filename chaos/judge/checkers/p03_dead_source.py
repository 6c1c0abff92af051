# SPDX-License-Identifier: Apache-2.0
"""P3, dead source: after a successful move every ioctl on the source's descriptors fails with EIO; after a failed one
none does.

EIO is also what KVM answers to a process with another address space. So the source is asked in the process that
created it, every question (`chaos.history.questions`) on every descriptor of it, and a live VM beside it must not
answer EIO. A dead process cannot be asked. Whatever is done to the dead source, it is asked again after that.

A storm asks all the time, and shows more: that there is one instant before which everything is answered and after
which nothing is, and that it lies inside the move. One whose answers are not on record leaves that open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from errno import EBADF, EIO, ENODEV

import msgspec

from chaos.experiment.model import Experiment
from chaos.history.questions import ANYBODY, DEVICE, THE_DEAD, kind_of
from chaos.history.reading import answers_of_open, argument, errname, ioctl_answered, refused_as_dead, says_dead
from chaos.history.records import Answer, Asked, Done, History, Invoke, Stormed
from chaos.judge.evidence import IOCTLS, RunEvidence, TriedMove
from chaos.judge.instant_of_death import ContradictionKind, Death, TimedCall, instant_of_death
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Outcome, Verdict

PROMISE = "P3"
ENDS = frozenset({"close", "exit", "pause", "calm", "disconnect"})
"""What is done to a VM on its way out, and has no answer of its own to give."""


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    parts = [part for move in evidence.moves for part in _move(experiment, evidence, move)]
    if not evidence.moves:
        parts.append(unknown(PROMISE, f"{evidence.untried}, so no source could die"))
    parts += [part for stormed in evidence.stormed for part in _storm(evidence, stormed)]
    parts += _silent_storms(evidence)
    return combine(PROMISE, parts)


def _move(experiment: Experiment, evidence: RunEvidence, move: TriedMove) -> Iterator[Verdict]:
    """The questions put to the source of one move: for ever if it happened, else until another takes effect on it."""
    if move.happened is None or move.over is None:
        yield unknown(PROMISE, f"{move}, and nobody can say whether it took effect", move.records)
        return
    taken = evidence.taken(move)
    if taken is not None:
        yield kept(PROMISE, f"{move}; {move.source} was not to live: {taken}", (*move.records, *taken.records))
        return
    later, end = None, evidence.remade(move.source, move.over)
    if not move.happened:
        later, end = evidence.changed(move.source, move)
    asked = [record for record in evidence.asked if record.vm == move.source and move.over < record.seq < end]
    for record in asked:
        yield _answers(experiment, evidence, move, record)
    if move.happened and asked:
        yield from _asked_last(evidence, move, asked[-1], end)
    if not asked and later is None:
        yield _not_asked(evidence, move)
    yield from _instant(evidence, move, end)
    ended = 0 if move.done is None else move.done.ended  # moves of a loop are written down after what they came before
    done = [(i, d) for i, d in evidence.done(move.source) if i.f in IOCTLS and move.over < i.seq < end and i.t > ended]
    yield from _operations(evidence, move, done)


def _not_asked(evidence: RunEvidence, move: TriedMove) -> Verdict:
    exited = evidence.died(move.source, at=move.invoke.seq)
    if exited is not None:
        reason = "the source process is dead, and only it could ask its file descriptors"
        return unknown(PROMISE, reason, (*move.records, exited), signature="source-process-dead")
    return unknown(PROMISE, f"{move}, and {move.source} was not asked afterwards", move.records)


def _answers(experiment: Experiment, evidence: RunEvidence, move: TriedMove, asked: Asked) -> Verdict:
    """What the answers of the source say after the move, if every question was put to every descriptor."""
    verdict = judge_asked(experiment, evidence, move, asked)
    left_out = "; ".join(_left_out(asked, dead=bool(move.happened)))
    if left_out and verdict.outcome is Outcome.KEPT:
        return unknown(PROMISE, f"{move}, and of {asked.vm} not everything was asked: {left_out}", (asked,))
    return verdict


def _left_out(asked: Asked, *, dead: bool) -> Iterator[str]:
    """What was not asked of the descriptors that were; the dead are asked more than the living."""
    answers = answers_of_open(asked)
    if asked.device is None:
        yield "device descriptors were not asked"
    elif asked.device == 0 and not any(answer.fd == DEVICE for answer in asked.answers):
        yield "its device descriptor was not asked"
    elif asked.device not in (0, ENODEV):
        yield f"it has no device descriptor, since KVM_CREATE_DEVICE failed with {errname(asked.device)}"
    for fd in dict.fromkeys(answer.fd for answer in answers):
        due = ANYBODY.get(kind_of(fd), ()) + (THE_DEAD.get(kind_of(fd), ()) if dead else ())
        put = {answer.ioctl for answer in answers if answer.fd == fd}
        missing = [name for name in due if name not in put]
        if missing:
            yield f"{fd} not {missing[0]}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")


def _asked_last(evidence: RunEvidence, move: TriedMove, asked: Asked, end: int) -> Iterator[Verdict]:
    """The dead stay dead whatever is done to them: whoever was asked last before that may have risen since."""
    for invoke, _ in evidence.operations:
        to = (argument(invoke, "vm"), argument(invoke, "source"))
        if asked.seq < invoke.seq < end and asked.vm in to and invoke.f not in ENDS:
            text = f"{move}, and {asked.vm} was not asked again after {invoke.f}"
            yield unknown(PROMISE, text, (asked, invoke))
            return


def judge_asked(
    experiment: Experiment, evidence: RunEvidence, move: TriedMove, asked: Asked, promise: str = PROMISE
) -> Verdict:
    """What the answers of the source say after the move, as a verdict on `promise`."""
    every, asked = asked, msgspec.structs.replace(asked, answers=answers_of_open(asked))
    closed = {answer.fd for answer in every.answers} - {answer.fd for answer in asked.answers}
    if move.happened:
        wrong = [answer for answer in asked.answers if not refused_as_dead(answer)]
        if wrong:
            reason = f"{move}, and {_several(wrong)} of {asked.vm} still answered: {_compact(wrong)}"
            return _deviated(promise, move, asked, reason, "answered", expected="EIO", seen=_compact(wrong))
    problem = _worthless(experiment, evidence, asked, closed)
    if problem:
        return unknown(promise, problem, (asked,))
    wrong = [answer for answer in asked.answers if refused_as_dead(answer)]
    if wrong and not move.happened:
        reason = f"{move}, yet {_several(wrong)} of {asked.vm} failed with EIO"
        return _deviated(promise, move, asked, reason, "dead", expected="no EIO", seen=_compact(asked.answers))
    count = len(asked.answers)
    said = f"{count} of {count} ioctls on {asked.vm} {'failed with EIO' if move.happened else 'did not answer EIO'}"
    return kept(promise, f"{move}; {said}, asked in {asked.agent} beside a live VM", (*move.records, asked))


def _worthless(experiment: Experiment, evidence: RunEvidence, asked: Asked, closed: AbstractSet[str]) -> str:
    """Why the answers prove nothing, "" if they do. Of the `closed` descriptors there is nothing to ask any more."""
    if not asked.answers:
        return f"{asked.vm} was asked nothing"
    if asked.agent != evidence.agent(asked.vm):
        return f"{asked.vm} was asked in {asked.agent}, which did not create it: EIO means nothing there"
    if any(answer.control == EIO for answer in asked.answers):
        return f"the live VM beside {asked.vm} answered EIO as well, so its EIO means nothing"
    if any(answer.control == EBADF for answer in asked.answers):
        return f"the VM beside {asked.vm} had no descriptor, so it shows nothing"
    gone = closed - evidence.lost_fds(asked.vm, asked.seq)
    if gone:
        return f"{', '.join(sorted(gone))} of {asked.vm} answered EBADF only, and nothing says that it was closed"
    vcpus = experiment.vms[asked.vm].vcpus if asked.vm in experiment.vms else 0
    missing = {"vm", *(f"vcpu {number}" for number in range(vcpus))} - {answer.fd for answer in asked.answers} - closed
    return f"of {asked.vm} only some descriptors were asked, not {', '.join(sorted(missing))}" if missing else ""


def _instant(evidence: RunEvidence, move: TriedMove, end: int) -> Iterator[Verdict]:
    """Before, during and after the move, the source's own ioctls leave room for one instant of its death."""
    if not move.happened or move.done is None or move.done.began == 0 or not move.other:
        return
    agent, records = evidence.agent(move.source), {}
    for invoke, done in evidence.done(move.source):
        if invoke.f in IOCTLS and invoke.agent == agent and invoke.seq < end and done.began and ioctl_answered(done):
            records[TimedCall(done.began, done.ended, EIO if says_dead(done) else 0)] = done
    for found in instant_of_death(records, TimedCall(move.done.began, move.done.ended, 0)).contradictions:
        if found.second is not None and found.second.began > move.done.ended:
            continue  # answered after the move: told below, with its operation
        calls = [records[call] for call in (found.first, found.second) if call is not None]
        yield broken(
            PROMISE,
            f"{move}, and {move.source} did not die at one instant: {found.kind.replace('-', ' ')}",
            (*move.records, *calls),
            signature=f"source-in-move:{found.kind}",
            expected="one instant of death",
            seen=found.kind.replace("-", " "),
        )


def _storm(evidence: RunEvidence, stormed: Stormed) -> Iterator[Verdict]:
    """Whether the VM on which the storm was died at one instant, if a move killed it, and else did not die."""
    moves = [move for move in evidence.moves if move.source == stormed.vm]
    unsure = next((move for move in moves if move.happened is None or (move.happened and move.over is None)), None)
    if unsure is not None:
        yield unknown(PROMISE, f"{unsure}, and nobody can say whether it took effect", (*unsure.records, stormed))
        return
    death = next((move for move in moves if move.happened), None)
    found = list(_impossible(evidence, stormed, death, failed=bool(moves)))
    problem = _unsaid(stormed, death)
    if problem and not found:
        yield unknown(PROMISE, f"the storm on {stormed.vm}: {problem}", (stormed,))
    elif not found:
        yield kept(PROMISE, _lived_or_died(evidence, stormed, death), (*(death.records if death else ()), stormed))
    yield from found


def _silent_storms(evidence: RunEvidence) -> Iterator[Verdict]:
    """Storms of which nobody has written down what they were answered."""
    told = Counter(stormed.vm for stormed in evidence.stormed)
    for invoke, done in evidence.operations:
        vm = argument(invoke, "vm")
        if invoke.f == "storm" and done is not None and done.outcome == "ok":
            told[vm] -= 1
            if told[vm] < 0:
                yield unknown(PROMISE, f"what the storm on {vm} was answered is not on record", (invoke, done))


def _impossible(evidence: RunEvidence, stormed: Stormed, death: TriedMove | None, *, failed: bool) -> Iterator[Verdict]:
    """What in the storm cannot be: a deviation for each contradiction."""
    kinds: list[ContradictionKind] = []
    if death is not None:
        kinds = [found.kind for found in _instant_in(evidence, stormed, death).contradictions]
    elif any(thread.refused for thread in stormed.threads):
        kinds = ["eio-after-failed-move" if failed else "eio-without-move"]
    for kind in kinds:
        said = kind.replace("-", " ")
        yield broken(
            PROMISE,
            f"{f'{death}, and ' if death else ''}in the storm on {stormed.vm} a call was {said}",
            (*(death.records if death else ()), stormed),
            signature=f"source-in-storm:{kind}",
            expected="one instant of death" if death else "no EIO",
            seen=said,
        )


def _instant_in(evidence: RunEvidence, stormed: Stormed, death: TriedMove) -> Death:
    """The calls of the storm that say most of the instant, against the move. Their times may be off a little."""
    calls = [
        TimedCall(call.began - thread.clock_error, call.ended + thread.clock_error, call.errno)
        for thread in stormed.threads
        for call in (thread.answered, thread.refused)
        if call is not None
    ]
    done, over = death.done, evidence.history.records[death.over or 0]
    began, ended = (done.began, done.ended) if done is not None and done.ended else (death.invoke.t, over.t)
    return instant_of_death(calls, TimedCall(began, ended, 0))


def _unsaid(stormed: Stormed, death: TriedMove | None) -> str:
    """Why the storm does not say when the VM died, "" if it does, or was over before that."""
    if not any(thread.calls for thread in stormed.threads):
        return "it made no call"
    if any(thread.lost for thread in stormed.threads):
        return "the call answered last, or the first to fail with EIO, is not on record any more"
    if any(bool(thread.errnos.get("EIO")) != (thread.refused is not None) for thread in stormed.threads):
        return "its counts and its calls do not agree"
    if death is not None and death.invoke.seq < stormed.seq and not any(thread.refused for thread in stormed.threads):
        return f"{death} while it lasted, and none of its calls was made after that"
    return ""


def _lived_or_died(evidence: RunEvidence, stormed: Stormed, death: TriedMove | None) -> str:
    calls = sum(thread.calls for thread in stormed.threads)
    refused = sum(thread.errnos.get("EIO", 0) for thread in stormed.threads)
    told = f"in a storm of {calls} calls by {len(stormed.threads)} threads on {stormed.vm}"
    if death is None:
        return f"{told} none failed with EIO"
    if not refused:
        return f"{death}; {told}, which was over before that, none failed with EIO"
    instant = _instant_in(evidence, stormed, death)
    within = f"one instant within {(instant.before - instant.after) / 1000:.0f} us"
    return f"{death}; {told} {calls - refused} were answered before and {refused} failed with EIO after {within}"


def _operations(evidence: RunEvidence, move: TriedMove, done: Iterable[tuple[Invoke, Done]]) -> Iterator[Verdict]:
    """Ordinary operations on the source afterwards are witnesses too, though nobody meant to ask."""
    for invoke, answer in done:
        if says_dead(answer) == move.happened or not ioctl_answered(answer) or evidence.lost(invoke):
            continue
        said = errname(answer.errno)
        yield broken(
            PROMISE,
            f"{move}, and {invoke.f} of {move.source} answered {said} afterwards",
            (*move.records, invoke, answer),
            signature=f"{_which(move)}:{'dead' if says_dead(answer) else 'answered'}:{invoke.f}",
            expected="EIO" if move.happened else "no EIO",
            seen=said,
        )


def _deviated(
    promise: str, move: TriedMove, asked: Asked, reason: str, how: str, *, expected: str, seen: str
) -> Verdict:
    signature = f"{_which(move)}:{how}"
    return broken(promise, reason, (*move.records, asked), signature=signature, expected=expected, seen=seen)


def _which(move: TriedMove) -> str:
    return "source-after-move" if move.happened else "source-after-failed-move"


def _several(answers: list[Answer]) -> str:
    return f"{len(answers)} ioctl{'s' if len(answers) > 1 else ''}"


def _compact(answers: Iterable[Answer]) -> str:
    """How often each errno came: "5 EIO, 2 ok"."""
    counts = Counter(errname(answer.errno) for answer in answers)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
