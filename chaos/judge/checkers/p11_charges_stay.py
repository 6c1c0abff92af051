# SPDX-License-Identifier: Apache-2.0
"""P11, charges stay: a task that changes its cgroup leaves its charges where they are; only a move takes them along.

The witness is an observation after the process went, while a context lives that was charged before it did. A process
that had none leaves nothing behind, and one that is put back after the script is not asked about.
"""

from __future__ import annotations

from collections.abc import Iterator

from chaos.experiment.model import Experiment
from chaos.history.reading import argument
from chaos.history.records import Done, History, Invoke
from chaos.judge.checkers.p01_balance import paid, shows_charge
from chaos.judge.evidence import RunEvidence
from chaos.judge.ledger.replay import Entry, Mismatch
from chaos.judge.ledger.world import World
from chaos.judge.parts import broken, combine, kept, unknown
from chaos.judge.verdict import Verdict

PROMISE = "P11"


def check(experiment: Experiment, history: History) -> Verdict:
    evidence = RunEvidence(history)
    went = [
        (invoke, done)
        for invoke, done in evidence.operations
        if invoke.f == "enter" and done is not None and done.outcome == "ok" and invoke.step < len(experiment.script)
    ]
    if not went:
        return unknown(PROMISE, "no process changed its cgroup, so no charge could follow one")
    if evidence.ledger.lost:
        return unknown(PROMISE, f"what must be charged cannot be told: {evidence.ledger.lost}")
    return combine(PROMISE, [part for invoke, done in went for part in _went(evidence, invoke, done)])


def _went(evidence: RunEvidence, invoke: Invoke, done: Done) -> Iterator[Verdict]:
    """Every observation after a process went that can tell, until it goes again."""
    into = argument(invoke, "cgroup")
    later = (i.seq for i, _ in evidence.operations if i.f == "enter" and i.agent == invoke.agent and i.seq > done.seq)
    again = next(later, len(evidence.history.records))
    seen = [entry for entry in evidence.observations if done.seq < entry.record.seq < again]
    worlds = {world for entry in seen for world in entry.fits} | evidence.ledger.during[invoke.op]
    if worlds and not any(_paid_by(evidence, world, invoke.agent) for world in worlds):
        return
    telling = [entry for entry in seen if _left_behind(evidence, entry, invoke.agent, into)]
    for entry in telling:
        wrong = _followed(entry.mismatches, into)
        if wrong is not None:
            yield broken(
                PROMISE,
                f"{invoke.agent} went into {into}, and the charge went along: {into} read {wrong.key} {wrong.seen}",
                (invoke, done, entry.record),
                signature=f"charge-followed-task:{wrong.key}",
                expected=" or ".join(str(value) for value in sorted(wrong.expected)),
                seen=str(wrong.seen),
            )
        elif entry.mismatches:
            yield unknown(PROMISE, "the counters are wrong for some other reason", (invoke, done, entry.record))
        else:
            text = f"{invoke.agent} went into {into} and left its charge behind: {paid(entry)}"
            yield kept(PROMISE, text, (invoke, done, entry.record))
    if not telling:
        text = f"{invoke.agent} went into {into}, and no charge of its own was seen after it"
        yield unknown(PROMISE, text, (invoke, done))


def _left_behind(evidence: RunEvidence, entry: Entry, agent: str, into: str) -> bool:
    """A context lives that a VM of the process was charged for elsewhere, and every counter was read."""
    return shows_charge(entry) and all(
        _paid_by(evidence, world, agent) - {world.payer(into)} for world in entry.fits
    )  # fmt: skip


def _paid_by(evidence: RunEvidence, world: World, agent: str) -> frozenset[str]:
    """The cgroups that pay for the contexts of the process's VMs."""
    return frozenset(context.payer for context in world.contexts if evidence.agent(context.owner) == agent)


def _followed(mismatches: tuple[Mismatch, ...], into: str) -> Mismatch | None:
    """The counter of the cgroup that was entered, if it is above what is due."""
    above = (m for m in mismatches if m.kind == "charge" and m.where == into and m.seen > max(m.expected))
    return next(above, None)
