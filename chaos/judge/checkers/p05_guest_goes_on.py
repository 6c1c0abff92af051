# SPDX-License-Identifier: Apache-2.0
"""P5, the guest goes on: at the destination where it stopped, and what could be asked of its context before the move
can be asked after it.

Four questions. The context: every GUEST_STATUS at the destination gives handle, policy and state as the source gave
them, until the context moves on.
The registers: the destination takes what it is given of them, and has it when it is read again. The guest: its own
counter goes on from where the source left it, and its memory holds what its registers say (`Counted.stale` is 0). A
guest that cannot be entered any more does not go on, whatever its registers say; one that was not given its registers
cannot. Where the move failed the first and the last are asked of the source. A host that cannot enter SEV-ES guests
(`Header.executes_es`) skips the last.

Interrupts, the fourth, are asked in `chaos.judge.interrupts`, and what CPUs take guests for in `chaos.judge.asids`.

A guest that was paused, before the move and after it, does not go on; it stands where it stood, at the source while it
is there and at the destination then. Letting it run is for whoever paused it, and no part of a hand-over, least of all
of one that failed.

A guest that was broken already when it was taken out before the move is no witness of it. One that is broken when it
is taken out after the move, at the latest at the end of the run, was broken by the last move before that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from chaos.experiment.model import Experiment
from chaos.history.reading import argument, errname, ioctl_answered, owns
from chaos.history.records import QUESTION, Counted, Done, History
from chaos.judge.asids import asids
from chaos.judge.evidence import RunEvidence, TriedMove
from chaos.judge.interrupts import interrupts
from chaos.judge.ledger.firmware_contexts import GONE
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P5"
STATUS = ("handle", "policy", "state")


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    parts = [part for move in evidence.moves for part in _move(evidence, move)]
    if not evidence.moves:
        parts = [unknown(PROMISE, f"{evidence.untried}, so nothing interrupted the guest")]
    parts += [*_standing(evidence), *asids(PROMISE, evidence)]
    return combine(PROMISE, [*parts, *(interrupts(PROMISE, evidence) if evidence.moves else ())])


def _standing(evidence: RunEvidence) -> Iterator[Verdict]:
    """Of each guest that was looked at twice while it was paused, and that no step let run in between, whether it stood
    still."""
    for vms in dict.fromkeys(evidence.lineage(count.vm) for count in evidence.counted if count.paused):
        for was, now in pairwise(count for count in evidence.counted if count.vm in vms):
            if was.paused and now.paused and not _let_run(evidence, vms, was, now):
                yield _stood(was, now)


def _let_run(evidence: RunEvidence, vms: frozenset[str], was: Counted, now: Counted) -> bool:
    """Whether a step or a question did so between the two. What a phase of a migration does, it does by itself."""
    runs = (i for i, _ in evidence.operations if i.f == "run" and was.seq < i.seq < now.seq)
    told = (invoke for invoke in runs if invoke.phase in ("", QUESTION))
    return any(argument(invoke, "vm") in vms for invoke in told)


def _stood(was: Counted, now: Counted) -> Verdict:
    told = f"{was.ticks} ticks at {was.vm} and then {now.ticks} at {now.vm}"
    if (was.ticks, was.each) == (now.ticks, now.each):
        return kept(PROMISE, f"the guest stood still while it was paused: {told}", (was, now))
    return broken(
        PROMISE, f"the guest was paused and did not stand still: {told}", (was, now),
        signature="moved-while-paused", expected=f"{was.ticks} ticks", seen=f"{now.ticks} ticks",
    )  # fmt: skip


def _move(evidence: RunEvidence, move: TriedMove) -> Iterator[Verdict]:
    if move.happened is None or move.over is None:
        yield unknown(PROMISE, f"{move}, and nobody can say whether it took effect", move.records)
        return
    if not move.happened and not evidence.had_guest(move):
        return
    before, after = _before(evidence, move), _after(evidence, move)
    later, _ = evidence.changed(move.source, move)
    if after:
        yield from _contexts(evidence, move, before, after)
    elif move.happened or later is None or not later.happened:  # or else that one is compared with what was before
        yield _unheard(evidence, move)
    given = _given(evidence, move)
    if given is not None and _broken(evidence, move) is None:
        yield _registers(move, given)
    yield goes_on(evidence, move, PROMISE)
    yield from _taken_out(evidence, move)


def _broken(evidence: RunEvidence, move: TriedMove) -> Done | None:
    """The pause before the move at which the guest had already left its program or stopped, or its memory was not what
    its registers said. What goes wrong after that, at either side, the move has not done."""
    began, _ = evidence.span(move)
    paused = [done for invoke, done in evidence.done(move.source, "pause") if began < invoke.seq < move.invoke.seq]
    return paused[-1] if paused and any(paused[-1].value.get(how) for how in ("astray", "torn", "ended")) else None


def statuses(evidence: RunEvidence, move: TriedMove) -> tuple[Done | None, Done | None]:
    """The last GUEST_STATUS of the source before the move, and of those of the survivor after it the first that failed,
    or else the first."""
    after = _after(evidence, move)
    return _before(evidence, move), next((done for done in after if done.outcome != "ok"), next(iter(after), None))


def _before(evidence: RunEvidence, move: TriedMove) -> Done | None:
    """The last GUEST_STATUS of the source before the move. Where an earlier move of the same context has cost the
    source its answer, a move that happened is measured against the last answer that was had of that context, at
    whatever VM."""
    began, _ = evidence.span(move)
    before = [done for invoke, done in evidence.statuses(move.source) if began < invoke.seq < move.invoke.seq]
    if move.happened and before and before[-1].outcome != "ok":
        before = [done for done in _answers_before(evidence, move) if done.outcome == "ok"] or before
    return before[-1] if before else None


def _after(evidence: RunEvidence, move: TriedMove) -> tuple[Done, ...]:
    """Every GUEST_STATUS of the survivor after the move, until its context moves on."""
    assert move.over is not None
    _, end = evidence.changed(move.survivor, move)
    return tuple(done for i, done in evidence.statuses(move.survivor) if move.over < i.seq < end)


def _answers_before(evidence: RunEvidence, move: TriedMove) -> list[Done]:
    """Every GUEST_STATUS of the context before the move, at the VMs that have owned it, in order."""
    owners, vm = [move.source], move.source
    for earlier in reversed([m for m in evidence.moves if m.happened and m.invoke.seq < move.invoke.seq]):
        if earlier.destination == vm:
            vm = earlier.source
            owners.append(vm)
    answers = [pair for owner in owners for pair in evidence.statuses(owner)]
    began, _ = evidence.span(move)
    return [done for invoke, done in sorted(answers, key=lambda a: a[0].seq) if began < invoke.seq < move.invoke.seq]


def _unheard(evidence: RunEvidence, move: TriedMove) -> Verdict:
    """The survivor was not asked for its status, or no firmware was there to say anything."""
    over, contexts = move.over or 0, evidence.contexts
    _, end = evidence.changed(move.survivor, move)
    asked = [done for i, done in evidence.done(move.survivor, "guest_status") if over < i.seq < end]
    if asked and contexts.gone_by(asked[0].t):
        return unknown(PROMISE, f"{move}, and {contexts.gone}", (*move.records, asked[0]), signature=GONE)
    return unknown(PROMISE, f"{move}, and {move.survivor} was not asked for its status afterwards", move.records)


def _contexts(evidence: RunEvidence, move: TriedMove, before: Done | None, after: Sequence[Done]) -> Iterator[Verdict]:
    """Every answer after the move against the one before it; of those that say the same the first."""
    told: list[tuple[object, ...]] = []
    for done in after:
        says = (done.outcome, done.errno, done.firmware, *(done.value.get(field) for field in STATUS))
        if says not in told:
            yield _context(evidence, move, before, done, later=bool(told))
            told.append(says)


def _context(evidence: RunEvidence, move: TriedMove, before: Done | None, after: Done, *, later: bool) -> Verdict:
    """One answer after the move. The first and a later one that differs from it have signatures of their own: a finding
    that explains the first does not explain why it changed."""
    if not move.happened and before and before.outcome == "fail" and before.errno == after.errno:
        text = f"{move}; GUEST_STATUS of {move.source} fails with {errname(after.errno)} as before"
        return kept(PROMISE, text, (before, after))
    into = "-into-the-dying" if evidence.died_meanwhile(move) else ""
    when = f"{'later-' * later}{f'after-move{into}' if move.happened else 'after-failed-move'}"
    refused = after.outcome != "ok" and not after.firmware
    if refused and (_unexplained(evidence, move, after) if before is None else before.errno != after.errno):
        return _refused(move, before, after, when)
    if before is None or before.outcome != "ok":
        return unknown(PROMISE, f"GUEST_STATUS of {move.source} was not had before the move, so nothing can compare")
    return _refused(move, before, after, when) if after.outcome != "ok" else _same(evidence, move, before, after, when)


def _same(evidence: RunEvidence, move: TriedMove, before: Done, after: Done, when: str) -> Verdict:
    """Whether two answers that were given are of the same context in the same state."""
    records = (before, after)
    fields = _comparable(evidence, move, before, after)
    if not fields:
        return unknown(PROMISE, f"{move}; the context was launched only then, so nothing can compare", records)
    unsaid = {field for field in fields if None in (before.value.get(field), after.value.get(field))}
    changed = [field for field in fields if field not in unsaid and before.value[field] != after.value[field]]
    if changed:
        return broken(
            PROMISE,
            f"{move}; the context's {' and '.join(changed)} changed",
            records,
            signature=f"guest_status-{when}:{'+'.join(changed)}",
            expected=", ".join(f"{field} {before.value.get(field)}" for field in changed),
            seen=", ".join(f"{field} {after.value.get(field)}" for field in changed),
        )
    if unsaid:
        side = "before" if any(before.value.get(field) is None for field in unsaid) else "after"
        told = " and ".join(field for field in fields if field in unsaid)
        return unknown(PROMISE, f"{move}; GUEST_STATUS {side} it did not say {told}", records)
    told = ", ".join(f"{field} {after.value[field]}" for field in fields)
    return kept(PROMISE, f"{move}; GUEST_STATUS of {move.survivor} gives {told} as before", records)


def _refused(move: TriedMove, before: Done | None, after: Done, when: str) -> Verdict:
    """GUEST_STATUS of the VM that owns the context fails, and did not before, or not so."""
    name = errname(after.errno)
    said = f"GUEST_STATUS fails with {name} at {move.survivor} after"
    if before is not None:
        was = "succeeded before" if before.outcome == "ok" else f"failed with {errname(before.errno)} before"
        said = f"GUEST_STATUS {was} and fails with {name} at {move.survivor} after"
    return broken(
        PROMISE,
        f"{move}; {said}",
        move.records if before is None else (before, after),
        signature=f"guest_status-{when}:{name}",
        expected="GUEST_STATUS: ok",
        seen=f"GUEST_STATUS: {name}",
    )


def _unexplained(evidence: RunEvidence, move: TriedMove, after: Done) -> bool:
    """Whether a refusal is one without an answer from before to compare it with: the firmware knew the context, by one
    of the VMs that have owned it, and the errno does not say who owns it, of which P4 would speak."""
    began, _ = evidence.span(move)
    launches = (d for vm in evidence.lineage(move.source) for _, d in evidence.done(vm, "launch_start"))
    launched = any(done.outcome == "ok" and began < done.seq < move.invoke.seq for done in launches)
    return launched and owns(after, numberless=True) is None


def _comparable(evidence: RunEvidence, move: TriedMove, before: Done, after: Done) -> tuple[str, ...]:
    """What of the status must be the same: a step of a launch between the two changes the state, and its first step
    all of it."""
    operations = ((i, d) for vm in evidence.lineage(move.source) for i, d in evidence.done(vm))
    done = {i.f for i, d in operations if d.outcome == "ok" and before.seq < d.seq < after.seq}
    if done & {"launch_start", "command"}:
        return ()
    return STATUS[:2] if any(f.startswith("launch_") for f in done) else STATUS


def _given(evidence: RunEvidence, move: TriedMove) -> Done | None:
    """The destination's answer when it was given the registers, before the context left it again."""
    if not move.happened or move.over is None:
        return None
    _, end = evidence.changed(move.destination, move)
    answers = (d for i, d in evidence.done(move.destination, "set_state") if move.over < i.seq < end)
    return next(answers, None)


def _registers(move: TriedMove, given: Done) -> Verdict:
    records = (*move.records, given)
    if given.outcome != "ok" and not ioctl_answered(given):
        return unknown(PROMISE, f"{move}; its registers did not arrive: {given.value.get('call')}", records)
    if given.outcome != "ok":
        call, name = given.value.get("call") or "set_state", errname(given.errno)
        return broken(
            PROMISE,
            f"{move}; {move.destination} does not take the registers it is given: {call} fails with {name}",
            records,
            signature=f"state-refused-after-move:{str(call).replace(' ', '-')}:{name}",
            expected="ok",
            seen=name,
        )
    differs = given.value.get("differs")
    if not isinstance(differs, list):
        return unknown(PROMISE, f"{move}; the registers of {move.destination} were not read again", records)
    if differs:
        parts = sorted({str(text).partition(": ")[2] for text in differs})
        return broken(
            PROMISE,
            f"{move}; {move.destination} has other registers than it was given: {', '.join(map(str, differs))}",
            records,
            signature=f"state-differs-after-move:{'+'.join(parts).replace(' ', '-')}",
            expected="as they were given",
            seen=", ".join(parts),
        )
    return kept(PROMISE, f"{move}; registers as they were given, vCPUs: {given.value.get('vcpus')}", records)


def goes_on(evidence: RunEvidence, move: TriedMove, promise: str) -> Verdict:
    """Whether the guest's counter went on after the move, wherever it had to, as a verdict on `promise`."""
    unasked = _unasked(evidence, move, promise)
    if unasked is not None:
        return unasked
    over = move.over if move.over is not None else len(evidence.history.records)
    bound = over if move.happened else move.invoke.seq
    vms = evidence.lineage(move.source)
    began, end = evidence.span(move)
    mine = [count for count in evidence.counted if count.vm in vms and began < count.seq < end]
    before = [count for count in mine if count.seq < bound]
    # A move that failed may be tried again at once: then the guest goes on wherever that one took it.
    later = None if move.happened else evidence.changed(move.source, move)[0]
    other = move.other if later is None or not later.happened else None
    seen_later = [count for count in mine if count.seq > over and count.vm != other]
    after = [count for count in seen_later if not count.paused]
    refused = _not_entered(evidence, move, promise, over)
    if refused is not None:
        return refused
    exited = evidence.died(move.survivor, at=over)
    if not after and exited is not None:
        return unknown(promise, f"whether the guest itself goes on: the process of {move.survivor} is dead", (exited,))
    if not before or not after:
        text, stands = f"it was not seen to count {'after' if before else 'before'} the move", seen_later[-1:]
        if before and stands:
            text = f"it stands at {stands[0].vm}, and nobody let it run"
        return unknown(promise, f"whether the guest itself goes on: {text}", stands)
    given = _given(evidence, move)
    late = given is None or given.seq > after[0].seq
    if move.happened and after[0].vm == move.destination and late:
        return unknown(
            promise, f"whether the guest itself goes on: {after[0].vm} was not given its registers", after[:1]
        )
    seen = _worst(evidence, after, move)
    return _compared(evidence, promise, before[-1], seen, move)


def _worst(evidence: RunEvidence, after: Sequence[Counted], move: TriedMove) -> Counted:
    """Of the readings after the move the first that shows a broken guest, until the context moves on; else the first
    of all."""
    _, end = evidence.changed(move.survivor, move)
    broken = (count for count in after if (count.stale or count.ended) and count.seq < end)
    return next(broken, after[0])


def _taken_out(evidence: RunEvidence, move: TriedMove) -> Iterator[Verdict]:
    """What the vCPUs said when they were taken out of the guest after the move, until another move of the context was
    tried: that it had left its program or stopped, or its memory was not what its registers said. Of what was so
    before the move already, and of a guest that was not given its registers, this says nothing new."""
    assert move.over is not None
    _, end = evidence.changed(move.survivor, move)
    end = min([end, *(m.invoke.seq for m in evidence.moves if m.source == move.survivor and m.invoke.seq > move.over)])
    given = _given(evidence, move)
    if _broken(evidence, move) is not None or (move.happened and (given is None or given.outcome != "ok")):
        return
    since = move.over if given is None else given.seq
    when = "after-move" if move.happened else "after-failed-move"
    for invoke, done in evidence.done(move.survivor, "pause"):
        if not since < invoke.seq < end:
            continue
        for how, said in _damage(evidence, move.survivor, when, done):
            yield broken(
                PROMISE,
                f"{move}; then {said}",
                (*move.records, done),
                signature=how,
                expected="a guest that runs",
                seen=said,
            )


def _damage(evidence: RunEvidence, vm: str, when: str, done: Done) -> Iterator[tuple[str, str]]:
    """What a pause says against the guest: a signature, and the same in words."""
    ended, astray, torn = (done.value.get(how) for how in ("ended", "astray", "torn"))
    if ended:
        yield _stopped(evidence, vm, when, str(ended)), f"the guest at {vm} had stopped by itself ({ended})"
    elif astray:
        yield f"astray-{when}", f"vCPUs {astray} of {vm} had left the guest's program"
    if torn:
        yield f"torn-{when}", f"memory was not what the registers said of vCPUs {torn} of {vm}"


def _stopped(evidence: RunEvidence, vm: str, when: str, ended: str) -> str:
    """VMs with a type may stop for reasons of their own, which are not to excuse the others."""
    return f"stopped-{when}{'-of-typed' * evidence.typed(vm)}:{_plain(ended)}"


def _unasked(evidence: RunEvidence, move: TriedMove, promise: str) -> Verdict | None:
    """Why the guest is no witness of this move, None if it is one."""
    header = evidence.history.header
    if evidence.key(move.source) == "sev_es" and header is not None and not header.executes_es:
        text = "whether the guest itself goes on: this host cannot enter SEV-ES guests"
        return skipped(promise, text, what="es-cannot-run")
    broken = _broken(evidence, move)
    if broken is None:
        return None
    ended, astray = broken.value.get("ended"), broken.value.get("astray")
    if ended:
        text, why = f"{move.source} had stopped by itself ({ended})", _plain(str(ended))
        lost = _lost_before(evidence, move, str(ended))
        how = f"lost-in-earlier-move-of-typed:{why}" if lost else f"stopped-before-move:{why}"
    elif astray:
        text, how = f"vCPUs {astray} of {move.source} had left the guest's program", "astray-before-move"
    else:
        torn = broken.value["torn"]
        text, how = f"memory was not what the registers said of vCPUs {torn} of {move.source}", "torn-before-move"
    text = f"whether the guest itself goes on: {text} when they were taken out, before the move"
    return unknown(promise, text, (broken,), signature=how)


def _lost_before(evidence: RunEvidence, move: TriedMove, ended: str) -> bool:
    """Whether an earlier move into a VM with a type has lost the guest, and after this one it stands where it stood:
    its counters are the same, and it cannot run for the same reason. Only then is it known that this move has added
    nothing to what that one did."""
    over, vms = move.over if move.over is not None else len(evidence.history.records), evidence.lineage(move.source)
    _, end = evidence.changed(move.survivor, move)
    began, _ = evidence.span(move)
    mine = [count for count in evidence.counted if count.vm in vms and began < count.seq]
    before = [count for count in mine if count.seq < move.invoke.seq]
    after = [count for count in mine if over < count.seq < end and count.vm == move.survivor]
    lost = next((count for count in before if count.ended), None)
    if lost is None or not after or not evidence.typed(lost.vm):
        return False
    into = [
        m.invoke.seq for m in evidence.moves if m.happened and m.destination == lost.vm and (m.over or 0) < lost.seq
    ]
    ran = any(count.seq < seq and not count.stale for seq in into for count in before if count is not lost)
    stands = (before[-1].ticks, before[-1].each, 0, ended)
    return ran and all((count.ticks, count.each, count.stale, count.ended) == stands for count in (before[-1], *after))


def _not_entered(evidence: RunEvidence, move: TriedMove, promise: str, over: int) -> Verdict | None:
    """That the survivor's vCPUs could not be let into the guest, None if nobody tried or they could."""
    _, end = evidence.changed(move.survivor, move)
    first = next((done for invoke, done in evidence.done(move.survivor, "run") if over < invoke.seq < end), None)
    if first is None or first.outcome == "ok" or not ioctl_answered(first):
        return None
    call, name = first.value.get("call") or "run", errname(first.errno)
    return broken(
        promise,
        f"the guest does not go on: at {move.survivor} {call} fails with {name}",
        (*move.records, first),
        signature=f"not-entered-after-{'' if move.happened else 'failed-'}move:{call}:{name}",
        expected="a guest that runs",
        seen=name,
    )


def _compared(evidence: RunEvidence, promise: str, last: Counted, first: Counted, move: TriedMove) -> Verdict:
    """The last reading before the move and the one after it that says most."""
    records = (last, first)
    if last.stale or last.ended:
        why = last.ended or f"its memory and registers disagreed at {last.stale} ticks"
        text = f"something was wrong with the guest before the move already: {why}"
        how = f"stopped-before-move:{_plain(last.ended)}" if last.ended else "stale-before-move"
        return unknown(promise, text, records, signature=how)
    when = "after-move" if move.happened else "after-failed-move"
    if first.stale:
        return broken(
            promise,
            f"at {first.where} the guest's memory did not hold what its registers said for {first.stale} ticks",
            records,
            signature=f"stale-memory-{when}",
            expected="stale 0",
            seen=f"stale {first.stale}",
        )
    if first.ended:
        return broken(
            promise,
            f"the guest does not go on: at {first.vm} it stopped by itself ({first.ended})",
            records,
            signature=_stopped(evidence, first.vm, when, first.ended),
            expected="a guest that runs",
            seen=first.ended,
        )
    told = f"{last.ticks} ticks at {last.vm} before, {first.ticks} at {first.vm} after"
    then, since = last.each or (last.ticks,), first.each or (first.ticks,)
    # Where only one of the two readings has a counter for each, the least of all can be compared.
    alike = bool(last.each) == bool(first.each)
    pairs = zip(then, since, strict=False) if alike else ((last.ticks, first.ticks),)
    for number, (was, now) in enumerate(pairs):
        if now <= was:
            return broken(
                promise,
                f"the guest itself did not go on: {told}; vCPU {number} had {was} before and {now} after",
                records,
                signature=f"counter-stopped-{when}",
                expected=f"more than {was} ticks",
                seen=f"{now} ticks",
            )
    if len(since) < len(then) or not (alike or len(since) == 1):
        text = f"whether the guest itself goes on: of {len(then)} vCPUs that counted before, {len(since)} did after"
        return unknown(promise, text, records)
    return kept(promise, f"the guest itself went on: {told}", records)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text)
