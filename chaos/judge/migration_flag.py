# SPDX-License-Identifier: Apache-2.0
"""Who held the migration flag of a VM when a move or mirror was refused with EBUSY.

`sev_lock_two_vms()` sets `migration_in_progress` of the destination, then that of the source, and answers EBUSY where
one is set already. The flag lets exactly one in: whoever fails on it fails because another has it at that moment. So

* of moves that are under way together on one source, and have no other reason to be refused, at least one gets in;
* an EBUSY with nobody beside it comes from a flag that was never cleared.

Both are one rule here: each EBUSY needs a holder, another call that overlaps it in time and may have held the flag. A
call holds its destination's flag also when it then fails on its source's; it holds its source's only when it got past
both. Two moves that cross (A from B, B from A) may so both be refused; two into different VMs from one source may not.

A loop counts its answers and does not time them. One that is answered nothing but EBUSY from a source needs a holder
in the second half of its time: of hundreds of calls that sleep nowhere, some began there. Whether any began after a
holder that went in that half, nobody can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from errno import EBADF, EBUSY, EFAULT, EIO, ENOTTY

from chaos.history.reading import argument, errname, number
from chaos.history.records import Done, Invoke, Record
from chaos.judge.against_oracle import BIDS, Contract, Judged
from chaos.judge.evidence import RunEvidence
from chaos.judge.timeline import named

# What is answered before either flag is looked at (steps 0 and 1 of the contract's part 1.2).
BEFORE_THE_FLAGS = frozenset({EIO, EBADF, EFAULT, ENOTTY})
MANY = 100  # calls of a loop


@dataclass(frozen=True, slots=True)
class Bid:
    """A call that wants both flags, or all calls of a loop that were answered alike, from `began` to `ended` (ns).

    `errno` is None if it gave no answer. `passed` if it may have had both flags; else it was refused with EBUSY, for
    one of them and nothing else, and somebody held that at `since` or later. `loop` if it was one, `several` if of
    several threads, which may be in each other's way."""

    invoke: Invoke
    done: Done | None
    errno: int | None
    began: int
    ended: int
    passed: bool
    since: int
    loop: bool = False
    several: bool = False

    @property
    def destination(self) -> str:
        return argument(self.invoke, "vm")

    @property
    def source(self) -> str:
        return argument(self.invoke, "source")

    @property
    def records(self) -> tuple[Record, ...]:
        return (self.invoke,) if self.done is None else (self.invoke, self.done)

    def __str__(self) -> str:
        told = "gave no answer" if self.errno is None else f"answered {errname(self.errno)}"
        return f"{named(self.invoke)} from {self.source} {told}"


class MigrationFlags:
    """All bids of a history. `stuck` are those that were refused while nobody held a flag that they wanted, `doubtful`
    the loops of which nobody can say so."""

    def __init__(self, evidence: RunEvidence, contract: Contract) -> None:
        self.bids = (*_answered(evidence, contract), *_unanswered(evidence))
        self.stuck = _without_holder(self.bids)
        at_the_end = [replace(bid, since=bid.ended) if bid.since > bid.began else bid for bid in self.bids]
        self.doubtful = _without_holder(at_the_end) - self.stuck

    def of(self, judged: Judged) -> int | None:
        """The number of the bid that this operation made, None if it made none."""
        mine = (judged.invoke.op, argument(judged.invoke, "source"), judged.answer.errno)
        return next((n for n, bid in enumerate(self.bids) if (bid.invoke.op, bid.source, bid.errno) == mine), None)

    def after(self, vm: str, over: int, loop: int) -> Iterator[tuple[int, Bid]]:
        """The bids for the VM's flag that began after record `over`, and those of the loop of that number."""
        for number_, bid in enumerate(self.bids):
            mine = bid.loop and bid.invoke.op == loop
            if vm in (bid.source, bid.destination) and (mine or bid.invoke.seq > over):
                yield number_, bid


def _answered(evidence: RunEvidence, contract: Contract) -> Iterator[Bid]:
    made = {invoke.op: invoke for invoke, _ in evidence.operations}
    for each in contract.judged():
        code, invoke, done = each.answer.errno, each.invoke, each.done
        itself = argument(invoke, "vm") == argument(invoke, "source")
        if invoke.f not in BIDS or code in BEFORE_THE_FLAGS or itself or number(invoke, "flags"):
            continue
        passed = code != EBUSY or each.busy_otherwise
        began, ended = done.began or invoke.t, done.ended or done.t
        since = (began + ended) // 2 if not passed and _nothing_else(evidence, made[invoke.op], each) else began
        loop, several = made[invoke.op].f == "moves", number(made[invoke.op], "threads") > 1
        yield Bid(invoke, done, code, began, ended, passed, since, loop, several)


def _nothing_else(evidence: RunEvidence, made: Invoke, refused: Judged) -> bool:
    """Whether it is a loop that had many answers from this source, all of them this one. Calls that succeeded are
    operations of their own."""
    source = argument(refused.invoke, "source")
    if made.f != "moves":
        return False
    counts = {told: count for told, count in refused.done.value.items() if told.partition(" ")[0] == source}
    return len(counts) == 1 and all(isinstance(count, int) and count >= MANY for count in counts.values())


def _unanswered(evidence: RunEvidence) -> Iterator[Bid]:
    """What was killed may have held the flags until its process was reaped."""
    for invoke, done in evidence.operations:
        if invoke.f in BIDS and (done is None or done.outcome == "info") and argument(invoke, "source"):
            gone = evidence.exited(invoke.agent, after=invoke.seq)
            ended = evidence.history.records[-1].t if gone is None else gone.t
            yield Bid(invoke, done, None, invoke.t, ended, passed=True, since=invoke.t)


def _without_holder(bids: Sequence[Bid]) -> frozenset[int]:
    """The refused bids, by number, that nothing explains. What two refused ones explain of each other counts, so it
    starts with every explanation and takes away those that rest on none."""
    refused = frozenset(n for n, bid in enumerate(bids) if not bid.passed)
    beside = {n: [m for m, other in enumerate(bids) if _overlap(bids[n], other)] for n in refused}
    by_source = refused  # those that may have had their destination's flag, and failed on their source's
    while True:
        blocked = {n for n in by_source if any(_blocks(bids[n].source, bids[m], m in by_source) for m in beside[n])}
        if blocked == by_source:
            break
        by_source = frozenset(blocked)
    ends = {n: bids[n].destination for n in refused}
    by_destination = {n for n in refused if any(_blocks(ends[n], bids[m], m in by_source) for m in beside[n])}
    return refused - by_source - by_destination


def _blocks(vm: str, other: Bid, by_source: bool) -> bool:
    """Whether the other bid may have held the flag of that VM."""
    return (other.passed and vm in (other.source, other.destination)) or (by_source and vm == other.destination)


def _overlap(refused: Bid, other: Bid) -> bool:
    """Calls of a loop of one thread come one after the other, those that succeeded among them, and no call is beside
    itself."""
    itself = refused.invoke.op in (other.invoke.op, number(other.invoke, "of"))
    if itself and not refused.several:
        return False
    return other.began <= refused.ended and other.ended >= refused.since
