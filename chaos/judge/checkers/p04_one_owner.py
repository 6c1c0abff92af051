# SPDX-License-Identifier: Apache-2.0
"""P4, one owner: at every moment exactly one VM owns the context while any holder lives.

Three witnesses, each blind alone. GUEST_STATUS tells whether a VM owns a context (`chaos.judge.ledger.owners`), so
the one that must own it is asked, and the other one too unless its process is gone: two VMs that both own one context
would go unseen else. The firmware's guest count tells of contexts that no VM owns any more.

After a migration the two VMMs must have been left with the same idea of who has the guest, whatever became of it: what
either knows, it knows by the kernel's answers and by what the other said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chaos.experiment.model import Experiment
from chaos.history.reading import errname, said_dead
from chaos.history.records import Done, Exited, Handover, History, Observation
from chaos.judge.evidence import RunEvidence, TriedMove
from chaos.judge.ledger.firmware_contexts import GONE, told
from chaos.judge.ledger.replay import Entry, Mismatch
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P4"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    parts = [_mismatch(evidence, mismatch) for mismatch in evidence.ledger.mismatches("owner", "guests")]
    parts += _agreement(history)
    if evidence.ledger.lost:
        parts.append(unknown(PROMISE, f"who owns what cannot be told: {evidence.ledger.lost}"))
    elif not evidence.moves:
        parts.append(unknown(PROMISE, f"{evidence.untried}, so ownership was never in question"))
    elif evidence.settled is None:
        last = evidence.moves[-1]
        parts.append(unknown(PROMISE, f"{last}: who owns the context after it cannot be asked", last.records))
    else:
        after = [entry for entry in evidence.ledger.entries if _asked(evidence, entry) > evidence.settled]
        lineages = dict.fromkeys(evidence.lineage(move.source) for move in evidence.moves)
        wrong = {mismatch.where for mismatch in evidence.ledger.mismatches("owner") if not mismatch.seen}
        guests = [vms for vms in lineages if evidence.given(vms) and not vms & wrong]
        parts += [_owner(evidence, after, vms) for vms in guests]
        parts += [_other(evidence, move) for move in evidence.moves if move.other]
        parts.append(_firmware(evidence, after))
    return combine(PROMISE, parts)


def _agreement(history: History) -> Iterator[Verdict]:
    """What the two VMMs of each attempt said afterwards, where both could say anything."""
    for ended in (record for record in history.records if isinstance(record, Handover)):
        says = {ended.source: ended.source_says, ended.destination: ended.destination_says}
        if "" in says.values():
            continue
        owners = [vm for vm, word in says.items() if word == "mine"]
        told = f"after attempt {ended.attempt} {' and '.join(f'{vm} says {word}' for vm, word in says.items())}"
        if len(owners) == 1 and ended.guest in ("", *owners):
            yield kept(PROMISE, told, (ended,))
            continue
        how = {0: "neither-says-mine", 2: "both-say-mine"}.get(len(owners), "said-otherwise")
        yield broken(
            PROMISE, f"{told} of the guest, which {ended.guest or 'nobody'} has by the order of events", (ended,),
            signature=how, expected="one says mine, and has the guest", seen=" and ".join(says.values()),
        )  # fmt: skip


def _asked(evidence: RunEvidence, entry: Entry) -> int:
    """From which record on it was asked: what was answered after a move may have been asked before it."""
    asked = (invoke.seq for invoke, done in evidence.operations if done is entry.record)
    return next(asked, entry.record.seq)


def _mismatch(evidence: RunEvidence, mismatch: Mismatch) -> Verdict:
    entry = next(entry for entry in evidence.ledger.entries if entry.record.seq == mismatch.record)
    record = entry.record
    expected = " or ".join(str(value) for value in sorted(mismatch.expected))
    dead = all(mismatch.where in world.dead for world in entry.worlds)
    if mismatch.kind == "owner" and dead and not mismatch.seen:
        reason = f"{mismatch.where} was given the context when it was dead, so nobody can use it any more"
        given = (m for m in evidence.moves if m.destination == mismatch.where)
        signature = "owner-died-in-move" if any(map(evidence.died_meanwhile, given)) else "owner-was-dead"
    elif mismatch.kind == "owner":
        said = "owns a context and must not" if mismatch.seen else "owns no context and must"
        reason, signature = f"{mismatch.where} {said}", "two-own" if mismatch.seen else "none-owns"
    else:
        label = record.label if isinstance(record, Observation) else ""
        reason = f"at {label!r} the firmware counted {mismatch.seen} guests of this run where {expected} must live"
        signature = "firmware-counts-more" if mismatch.seen > max(mismatch.expected) else "firmware-counts-fewer"
    return broken(PROMISE, reason, (record,), signature=signature, expected=expected, seen=str(mismatch.seen))


def _owner(evidence: RunEvidence, after: list[Entry], vms: frozenset[str]) -> Verdict:
    """Of the VMs that a context went through, the one that must own it now was asked."""
    answered = {
        vm: done
        for vm in sorted(vms)
        for invoke, done in evidence.done(vm, "guest_status")
        if invoke.seq > (evidence.settled or 0) and evidence.owners.says(invoke, done) and not evidence.lost(invoke)
    }
    first = after[0].fits if after else evidence.ledger.worlds
    if not any(world.holders & vms and world.holders & vms <= answered.keys() for world in first):
        text = f"of {' and '.join(sorted(vms))} the owner was not asked for its status after the move"
        silent = tuple(_silent(evidence, vms))
        if silent:
            said = ", ".join(f"{vm}: {_said(done)}" for vm, done in silent)
            text = f"no GUEST_STATUS after the move says which of {' and '.join(sorted(vms))} owns the context ({said})"
        gone = bool(silent) and all(evidence.contexts.gone_by(done.t) for _, done in silent)
        why = f": {evidence.contexts.gone}" if gone else ""
        return unknown(PROMISE, text + why, [done for _, done in silent], signature=GONE if gone else "")
    said = ", ".join(f"{vm} owns the context (GUEST_STATUS: {_said(done)})" for vm, done in answered.items())
    return kept(PROMISE, said, answered.values())


def _silent(evidence: RunEvidence, vms: frozenset[str]) -> Iterator[tuple[str, Done]]:
    """The answers to GUEST_STATUS that do not say whether there is a context."""
    for vm in sorted(vms):
        for invoke, done in evidence.done(vm, "guest_status"):
            if invoke.seq > (evidence.settled or 0) and evidence.owners.says(invoke, done) is None:
                yield vm, done


def _other(evidence: RunEvidence, move: TriedMove) -> Verdict:
    """Whoever must not own the context does not, by its own answer or because it is gone."""
    if move.happened is None or move.over is None:
        return unknown(PROMISE, f"{move}, and nobody can say whether it took effect", move.records)
    vm, over = move.other, move.over
    exited = evidence.died(vm, at=move.invoke.seq)
    if exited is not None and exited.seq <= over:
        return _outlived(evidence, move, exited)
    if not move.happened and evidence.had_context(vm, move.invoke):
        return _its_own(evidence, move)
    return _without(evidence, move, vm, over)


def _without(evidence: RunEvidence, move: TriedMove, vm: str, over: int) -> Verdict:
    """The VM has no context after record `over`, and before another move may have given it one: that the kernel took
    that move says nothing of what the VM owned."""
    given = next((m for m in evidence.moves if _gives(m, vm, move)), None)
    end = evidence.remade(vm, over) if given is None else given.invoke.seq
    if given is not None and _meanwhile(move, given):
        return kept(PROMISE, f"{vm} was given a context meanwhile: {given}", (*move.records, *given.records))
    for invoke, done in evidence.done(vm, "guest_status"):
        if over < invoke.seq < end and evidence.owners.says(invoke, done) is False:
            return kept(PROMISE, f"{vm} owns none (GUEST_STATUS: {_said(done)})", (done,))
    for asked in evidence.asked:
        if asked.vm == vm and over < asked.seq < end and said_dead(asked):
            return kept(PROMISE, f"{vm} is dead, by its own answers", (asked,))
    exited = evidence.died(vm, at=move.invoke.seq)
    if exited is not None and exited.seq < end:
        return _outlived(evidence, move, exited)
    lost = "vm" in evidence.lost_fds(vm, len(evidence.history.records))
    why = ": it has lost its descriptor" if lost else ""
    until = f", before {given}," if given is not None else ""
    text = f"{move}, and{until} {vm} was not asked whether it owns a context as well{why}"
    return unknown(PROMISE, text, move.records, signature="descriptor-lost" if lost else "")


def _gives(later: TriedMove, vm: str, move: TriedMove) -> bool:
    """Whether another move, over after this one, gives the VM a context, or may."""
    over = later.over is None or move.over is None or later.over > move.over
    return later is not move and over and later.happened is not False and later.destination == vm != later.source


def _meanwhile(move: TriedMove, given: TriedMove) -> bool:
    """Whether that move was under way before this one was over, so that there is no moment between them."""
    return move.done is not None and (given.done.began if given.done else given.invoke.t) < move.done.ended


def _outlived(evidence: RunEvidence, move: TriedMove, exited: Exited) -> Verdict:
    """A process that was not asked before it died took no context along, if the firmware still has the guest: of a VM
    that goes and owns one, KVM has it decommissioned. That a process is dead says nothing by itself: a descriptor that
    it had sent keeps its VM."""
    since = max(exited.seq, move.over or 0)
    answers = (d for i, d in evidence.statuses(move.survivor) if i.seq > since and d.outcome == "ok")
    counts = (entry.record for entry in _counted(evidence, evidence.ledger.entries) if entry.record.seq > since)
    still = next(answers, None) or next(counts, None)
    later = " later" if exited.seq > (move.over or 0) else ""
    if still is not None:
        text = f"the process of {move.other} died{later} and took no context along"
        return kept(PROMISE, text, (*move.records, exited, still))
    text = f"{move}, and the process of {move.other} died{later}, before it was asked whether it owns a context as well"
    return unknown(PROMISE, text, (*move.records, exited), signature="other-process-dead")


def _its_own(evidence: RunEvidence, move: TriedMove) -> Verdict:
    """The destination of a move that failed had a context already, and has that one and no other. Where the firmware
    is not reached before and after, it says of both times that there is one."""
    vm, over = move.destination, move.over or 0
    asked = evidence.done(vm, "guest_status")
    answers = [(i.seq, done) for i, done in asked if evidence.owners.says(i, done)]
    before = [done for seq, done in answers if seq < move.invoke.seq]
    after = [done for seq, done in answers if seq > over]
    if not before or not after:
        side = "after" if before else "before"
        return unknown(PROMISE, f"{move}, and {vm} was not asked for its own context {side} it", move.records)
    was, now = _which(before[-1]), _which(after[0])
    if was == now:
        return kept(PROMISE, f"{vm} owns its own ({now}), as before", (before[-1], after[0]))
    reason = f"{move}, and {vm} answered {was} for its context before and {now} after"
    records = (before[-1], after[0])
    return broken(PROMISE, reason, records, signature="another-context", expected=was, seen=now)


def _which(done: Done) -> str:
    return f"handle {done.value.get('handle')}" if done.outcome == "ok" else f"GUEST_STATUS: {_said(done)}"


def _said(done: Done) -> str:
    return "ok" if done.outcome == "ok" else errname(done.errno)


def _firmware(evidence: RunEvidence, after: list[Entry]) -> Verdict:
    """The firmware counted its guests while one must have lived."""
    if evidence.shared:
        return skipped(
            PROMISE, "the firmware counts guests of others too, so it is no witness", what="guests-of-others"
        )
    contexts = evidence.contexts
    counts = [entry.record for entry in _counted(evidence, after)]
    if not counts:
        read = [entry.record for entry in after if isinstance(entry.record, Observation) and _lives(entry)]
        why = f": {contexts.blind(read[0])}" if read and contexts.blind(read[0]) else ""
        text = f"the firmware's guest count was not read after the move while the context lived{why}"
        gone = bool(read) and all(contexts.gone_by(record.until) for record in read)
        return unknown(PROMISE, text, read, signature=GONE if gone else "")
    owed = told(evidence.contexts.owed_at(counts[-1].t))
    more = f", beside what is owed to a fault: {owed}" if owed else ""
    return kept(PROMISE, f"the firmware counted as many guests as contexts must live{more}", counts)


def _counted(evidence: RunEvidence, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The observations at which the firmware counted its guests while one must have lived."""
    for entry in entries:
        record, ours = entry.record, not evidence.shared and _lives(entry)
        if ours and isinstance(record, Observation) and evidence.contexts.guests(record) is not None:
            yield entry


def _lives(entry: Entry) -> bool:
    return all(world.guests for world in entry.fits)
