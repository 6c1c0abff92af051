# SPDX-License-Identifier: Apache-2.0
"""P6, failure is clean: a move that fails or is killed leaves both VMs usable, and can be tried again.

Four questions to the source (does its context answer, does the guest go on, is it charged as before, is it free of
EIO) and one to the destination (is it usable, unless its process died with the move): only an ioctl that it answered
says so. And it must have been tried again: a later move or mirror of the same source, and one of the same destination
if that still lives, got past both migration flags. EBUSY does not show that, unless nobody held them: then it shows
that a flag was left set. A move that was given no VM's descriptor has no source to ask. A later move from the same
source that succeeds answers for what it needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EBUSY

from chaos.experiment.model import Experiment
from chaos.history.reading import errname, ioctl_answered, owns, said_dead, says_dead
from chaos.history.records import History, Observation
from chaos.judge.against_oracle import Contract
from chaos.judge.checkers.p01_balance import paid, shows_charge
from chaos.judge.checkers.p03_dead_source import judge_asked
from chaos.judge.checkers.p05_guest_goes_on import goes_on, statuses
from chaos.judge.evidence import IOCTLS, RunEvidence, TriedMove
from chaos.judge.ledger.replay import Entry
from chaos.judge.migration_flag import MigrationFlags
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P6"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    unclear = [move for move in evidence.tried if move.happened is None or move.over is None]
    failed = [move for move in evidence.tried if move.happened is False and move.over is not None]
    parts = [unknown(PROMISE, f"{move}, and nobody can say whether it took effect", move.records) for move in unclear]
    flags = MigrationFlags(evidence, Contract(evidence))
    for move in failed:
        parts += _failed(experiment, evidence, move)
        parts += _tried_again(evidence, flags, move)
    if not parts:
        return unknown(PROMISE, "no move failed, so the question was not asked")
    return combine(PROMISE, parts)


def _failed(experiment: Experiment, evidence: RunEvidence, move: TriedMove) -> Iterator[Verdict]:
    assert move.over is not None
    yield _charges(evidence, move)
    yield _destination(evidence, move)
    if not move.source or evidence.taken(move) is not None:
        return  # then there is nobody else who could have been harmed
    later, end = evidence.changed(move.source, move)
    again = later if later is not None and later.happened else None
    if evidence.had_guest(move):
        yield _answers(evidence, move, again)
        yield goes_on(evidence, move, PROMISE)
    asked = [record for record in evidence.asked if record.vm == move.source and move.over < record.seq < end]
    for record in asked:
        yield judge_asked(experiment, evidence, move, record, PROMISE)
    if not asked and again is None:
        yield unknown(PROMISE, f"{move}, and {move.source} was not asked whether it lives", move.records)
    elif not asked and again is not None:
        yield kept(PROMISE, f"{move}; then {again}", (*move.records, *again.records))


def _tried_again(evidence: RunEvidence, flags: MigrationFlags, move: TriedMove) -> Iterator[Verdict]:
    """A later move or mirror of either VM got past the migration flags, as far as the VM is still there for one. Of
    moves between the same two that fail alike, the first must have been tried again; the others are how it was."""
    if not move.source:
        return  # then nobody's flag was taken
    alike = (m for m in evidence.tried if _way(m) == _way(move) and m.over is not None and m.over < move.invoke.seq)
    if next(alike, None) is not None and move.done is not None and move.done.outcome == "fail":
        return
    if evidence.taken(move) is None:
        yield _flag_of(move.source, flags, move)
    lost = "vm" in evidence.lost_fds(move.destination, move.over or 0)  # nobody can reach it any more
    if move.destination != move.source and not lost and not _destination_gone(evidence, move):
        yield _flag_of(move.destination, flags, move)


def _way(move: TriedMove) -> tuple[str, str, bool | None, int]:
    return move.source, move.destination, move.happened, move.done.errno if move.done is not None else 0


def _flag_of(vm: str, flags: MigrationFlags, move: TriedMove) -> Verdict:
    later = list(flags.after(vm, move.over or 0, move.invoke.op))
    for number, bid in later:
        if number in flags.stuck:
            return broken(
                PROMISE,
                f"{move}; then {bid}, and no other move or mirror held the migration flag of either VM",
                (*move.records, *bid.records),
                signature="refused-again-after-failed-move:EBUSY",
                expected="anything but EBUSY",
                seen="EBUSY",
            )
    for _, bid in later:
        if bid.passed and bid.errno not in (None, EBUSY):
            return kept(PROMISE, f"{move}; tried again, {bid}", (*move.records, *bid.records))
    refused = "; what was tried was refused with EBUSY for another reason" if later else ""
    text = f"{move}, and no move or mirror of {vm} was tried again{refused}"
    return unknown(PROMISE, text, move.records, signature="not-tried-again")


def _answers(evidence: RunEvidence, move: TriedMove, again: TriedMove | None) -> Verdict:
    """The source's context can be asked for its status."""
    before, after = statuses(evidence, move)
    if after is None:
        if again is not None:
            return kept(PROMISE, f"{move}; then {again}", (*move.records, *again.records))
        return unknown(PROMISE, f"{move}, and {move.source} was not asked for its status afterwards", move.records)
    same = before is not None and before.outcome == "fail" and before.errno == after.errno
    if after.outcome == "ok" or same:
        return kept(PROMISE, f"{move}; GUEST_STATUS of {move.source} answers", (*move.records, after))
    name = errname(after.errno)
    if before is None and not any(done.outcome == "ok" for _, done in evidence.done(move.source, "launch_start")):
        text = (
            f"{move}; GUEST_STATUS of {move.source} then failed with {name}, and need not have answered before the move"
        )
        return unknown(PROMISE, text, (*move.records, after))
    return broken(
        PROMISE,
        f"{move}; GUEST_STATUS of {move.source} then failed with {name}",
        (*move.records, after),
        signature=f"guest_status-after-failed-move:{name}",
        expected="GUEST_STATUS: ok",
        seen=f"GUEST_STATUS: {name}",
    )


def _charges(evidence: RunEvidence, move: TriedMove) -> Verdict:
    """What was charged before the move is charged after it, and nothing else."""
    over = move.over or 0
    found = evidence.ledger.mismatches("charge", "guests", "answer")
    # What had been wrong before is not laid on this move: of such counters only a change would be.
    already = {(m.kind, m.where, m.key) for m in found if m.record < move.invoke.seq}
    wrong = [m for m in found if m.record >= over and (m.kind, m.where, m.key) not in already]
    if wrong:
        first = wrong[0]
        record = next(entry.record for entry in evidence.ledger.entries if entry.record.seq == first.record)
        before = [entry.record for entry in evidence.observations if entry.record.seq < move.invoke.seq][-1:]
        what = "the firmware's guest count" if first.kind == "guests" else f"{first.where} {first.key}"
        return broken(
            PROMISE,
            f"{move}, and left {what} at {first.seen}",
            (*move.records, *before, record),
            signature=f"{first.kind}-after-failed-move",
            expected=" or ".join(str(value) for value in sorted(first.expected)),
            seen=str(first.seen),
        )
    if evidence.ledger.lost:
        return unknown(PROMISE, f"what must be charged cannot be told: {evidence.ledger.lost}")
    seen = [entry for entry in evidence.observations if shows_charge(entry)]
    earlier = [entry for entry in seen if entry.record.seq < move.invoke.seq]
    later = [entry for entry in seen if entry.record.seq > over]
    if not earlier or not later:
        side = "after" if earlier else "before"
        return unknown(PROMISE, f"no observation shows a charge {side} the move that failed")
    was, now = earlier[-1], later[0]
    records = (was.record, now.record)
    guests = [_guests_off(evidence, entry) for entry in (was, now)]
    for what, told in (("charge", [paid(was), paid(now)]), ("guests", guests)):
        if already and all(told) and told[0] != told[1]:
            return broken(
                PROMISE,
                f"{move}, and changed the {what}{'s' * (what == 'charge')}",
                records,
                signature=f"{what}-after-failed-move",
                expected=told[0],
                seen=told[1],
            )
    return kept(PROMISE, f"charged as before: {paid(now)}", records)


def _guests_off(evidence: RunEvidence, entry: Entry) -> str:
    """By how many guests the firmware counted otherwise than it must, "" if it was not asked."""
    record = entry.record
    if not isinstance(record, Observation) or evidence.contexts.guests(record) is None:
        return ""
    counted = [mismatch for mismatch in entry.mismatches if mismatch.kind == "guests"]
    off = {mismatch.seen - value for mismatch in counted for value in mismatch.expected}
    return " or ".join(f"{by:+} guests" for by in sorted(off)) or "as many guests as live"


def _destination(evidence: RunEvidence, move: TriedMove) -> Verdict:
    """The destination still answers: an operation on it succeeds, or is refused because it owns no context.

    One that a context was moved away from before, or meanwhile, is dead, and has to stay it.
    """
    return _destination_gone(evidence, move) or _usable(evidence, move)


def _destination_gone(evidence: RunEvidence, move: TriedMove) -> Verdict | None:
    """That nothing could be asked of the destination any more, or nothing but death expected."""
    vm, over = move.destination, move.over or 0
    death = evidence.death(vm, over)  # also by a move that was made while this one was under way
    if death is not None:
        return kept(PROMISE, f"{vm} was dead by then: {death}", death.records)
    exited = evidence.exited(move.invoke.agent, after=move.invoke.seq)
    if exited is not None and exited.seq <= over:
        return kept(PROMISE, f"the process of {vm} died with the move", (exited,))
    return None


def _usable(evidence: RunEvidence, move: TriedMove) -> Verdict:
    vm, over = move.destination, move.over or 0
    given, end = evidence.changed(vm, move)
    ioctls = ((i, d) for i, d in evidence.done(vm) if i.f in IOCTLS - {"moves"} and ioctl_answered(d))
    later = [(invoke, done) for invoke, done in ioctls if over < invoke.seq < end]
    for invoke, done in later:
        if says_dead(done):
            return broken(
                PROMISE,
                f"{move}; {invoke.f} of {vm} then failed with EIO",
                (*move.records, done),
                signature="destination-after-failed-move:EIO",
                expected="no EIO",
                seen="EIO",
            )
    answers = [(i.f, d) for i, d in later if d.outcome == "ok" or (i.f == "guest_status" and owns(d) is False)]
    lives = [a for a in evidence.asked if a.vm == vm and over < a.seq < end and said_dead(a) is False]
    if answers:
        return kept(PROMISE, f"{vm} is usable: {answers[0][0]} answers", (answers[0][1],))
    if lives:
        return kept(PROMISE, f"{vm} is usable, by its own answers", lives[:1])
    if given is not None and given.happened:
        return kept(PROMISE, f"{vm} was usable: {given}", given.records)
    return unknown(PROMISE, f"{move}, and whether {vm} is still usable was not asked", move.records)
