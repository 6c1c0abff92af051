# SPDX-License-Identifier: Apache-2.0
"""P13, no firmware traffic: a move sends the PSP nothing, and a context is decommissioned exactly once.

The witness stands between the driver and the PSP and counts what passes; only a lab has one. That it saw nothing during
a move means something only if it was there: it must have seen a command before the move and one after it, without a gap
in its count. It may have been asked only when the run was over, so its records are placed by their times and not by
where they stand. Commands of other operations that were under way at the same time, and of looking at the guest count,
are not the move's; nor are those that are matched with what they answered (`chaos.judge.ledger.commands`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chaos.experiment.model import Experiment
from chaos.history.records import Done, Exited, Firmware, History, Invoke, Observation
from chaos.judge.evidence import RunEvidence, TriedMove
from chaos.judge.ledger.commands import LOOKS
from chaos.judge.ledger.firmware_contexts import ENDS, GONE, STARTS, told
from chaos.judge.parts import broken, combine, kept, skipped, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P13"
# Operations that send commands, at once or (the last three) because a context goes with them.
SENDS = ("init", "launch_", "guest_status", "dbg_", "platform", "close", "exit", "kill")
NAMELESS = (0, None, "")  # the status, handle and fault of a command that was carried out on nobody knows what


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    seen = [record for record in history.records if isinstance(record, Firmware)]
    if not seen and history.header is not None and history.header.host == "local":
        return skipped(PROMISE, "on a real host nobody stands between the driver and the firmware", what="firmware")
    if not seen:
        return unknown(PROMISE, "nobody watched what the firmware was sent")
    parts = [unknown(PROMISE, f"records of the firmware are missing between {a.order} and {b.order}", (a, b))
             for a, b in evidence.contexts.gaps]  # fmt: skip
    if seen[0].order:
        parts.append(unknown(PROMISE, f"the first {seen[0].order} records of the firmware are missing", seen[:1]))
    parts += [unknown(PROMISE, f"a witness was lost: {note.text}", (note,)) for note in evidence.lost_of("firmware")]
    if not evidence.moves:
        parts.append(unknown(PROMISE, f"{evidence.untried}, so it could send nothing"))
    parts += [_move(evidence, seen, move) for move in evidence.moves]
    parts += _once(evidence)
    return combine(PROMISE, parts)


def _move(evidence: RunEvidence, seen: Sequence[Firmware], move: TriedMove) -> Verdict:
    during = [record for record in seen if record.move == move.invoke.op]
    over = move.over
    if over is None:
        return unknown(PROMISE, f"{move}: what it will still send, nobody can say", move.records)
    known = frozenset(evidence.contexts.matched.orders.values())
    asked = [record for record in during if record.command == LOOKS]
    ours = asked[: _looks(evidence, move.invoke.seq, over)]
    sent = [record for record in during if record not in ours and record.order not in known]
    if sent:
        names = ", ".join(dict.fromkeys(record.command for record in sent))
        others = [i for i, done in evidence.operations if _sends(i, done, move.invoke, over)]
        died = any(isinstance(r, Exited) and move.invoke.seq < r.seq <= over for r in evidence.history.records)
        if others or died:
            whose = ", ".join(sorted({invoke.f for invoke in others})) or "the end of a process"
            text = f"{move}; the firmware was sent {names} meanwhile, perhaps by {whose}"
            return unknown(PROMISE, text, (*move.records, *sent))
        return broken(
            PROMISE,
            f"{move}, and sent the firmware {names}",
            (*move.records, *sent),
            signature=f"sent-in-move:{'+'.join(sorted({record.command for record in sent}))}",
            expected="no command",
            seen=names,
        )
    ended = next(record.t for record in evidence.history.records if record.seq == over)
    before, after = any(r.t < move.invoke.t for r in seen), any(r.t > ended for r in seen)
    if not (before and after):
        side = "after" if before else "before"
        text = f"{move}; whether anybody watched the firmware {side} it, nothing shows"
        gone = before and evidence.contexts.gone_by(ended)
        return unknown(PROMISE, text, move.records, signature=GONE if gone else "")
    return kept(PROMISE, f"{move}, and the firmware was sent nothing", move.records)


def _looks(evidence: RunEvidence, begun: int, over: int) -> int:
    """How often the guest count was observed between the two records: each sends one command."""
    observations = (r for r in evidence.history.records[begun + 1 : over] if isinstance(r, Observation))
    return sum(observation.guests is not None for observation in observations)


def _sends(invoke: Invoke, done: Done | None, move: Invoke, over: int) -> bool:
    """Whether another operation that sends commands was under way during the move."""
    overlaps = invoke.seq < over and (done is None or done.seq > move.seq)
    return overlaps and invoke.op != move.op and invoke.f.startswith(SENDS)


def _once(evidence: RunEvidence) -> Iterator[Verdict]:
    """Each guest that was started is decommissioned once. A handle may be given anew after that. What a fault has kept
    in the firmware was asked for once as well."""
    contexts = evidence.contexts
    nameless = [r for r in contexts.seen if r.command in (*STARTS, ENDS) and (r.status, r.handle, r.fault) == NAMELESS]
    if nameless:
        text = f"{nameless[0].command} was answered, and of which context it was is not on record"
        yield unknown(PROMISE, text, nameless)
        return
    launched = [d for i, d in evidence.operations if i.f == "launch_start" and d is not None and d.outcome == "ok"]
    started = [r for r in contexts.seen if r.command in STARTS and (r.status == 0 or r.fault)]
    if len(started) < len(launched):
        text = f"{len(launched)} guests were launched, and the firmware was seen to start {len(started)}"
        yield unknown(PROMISE, text, (*launched, *started))
    # The firmware refuses to decommission a guest that it does not have; a driver that asks has lost count.
    if contexts.refused:
        reason = "a context was decommissioned that there was none of, or a second time"
        yield broken(PROMISE, reason, contexts.refused, signature="decommissioned-twice", expected="once", seen="twice")
    left = tuple(contexts.live.values())
    if left and not contexts.gaps and not contexts.gone and _all_gone(evidence):
        reason = f"{len(left)} contexts were never decommissioned, though every process is gone"
        yield broken(PROMISE, reason, left, signature="never-decommissioned", expected="once", seen="never")
    elif left:
        why = f": {contexts.gone}" if contexts.gone else ""
        text = f"{len(left)} contexts were not seen to be decommissioned{why}"
        yield unknown(PROMISE, text, left, signature=GONE if contexts.gone else "")
    elif contexts.owed:
        text = f"no context was decommissioned twice; {told(contexts.owed)}"
        yield kept(PROMISE, text, (*contexts.ended, *(owed.record for owed in contexts.owed)))
    elif contexts.ended:
        yield kept(PROMISE, f"each context was decommissioned once: {len(contexts.ended)}", contexts.ended)


def _all_gone(evidence: RunEvidence) -> bool:
    """Every process that was started has been reaped, and the firmware was watched after that."""
    spawned = {i.agent: i.seq for i, done in evidence.operations if i.f == "spawn" and done and done.outcome == "ok"}
    ends = [exited for agent, seq in spawned.items() if (exited := evidence.exited(agent, after=seq)) is not None]
    if not spawned or len(ends) < len(spawned):
        return False
    last = max(exited.t for exited in ends)
    return any(isinstance(r, Firmware) and r.t > last for r in evidence.history.records)
