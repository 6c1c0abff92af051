# SPDX-License-Identifier: Apache-2.0
"""A history held against the oracle: what each operation was allowed to answer where it came.

The ledger says in which worlds an operation may have been carried out, observations say which limits there were. What
was not read cannot be judged: `Judged.gap` says so.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from errno import ETIMEDOUT
from functools import cached_property
from itertools import product

import msgspec

from chaos.errors import UsageError
from chaos.experiment.steps import UNARMED
from chaos.history.reading import KEYS, NEW_KEYS, argument, ioctl_answered, number
from chaos.history.records import Done, Filled, Held, Invoke, Kernel, Observation, Value
from chaos.judge import oracle
from chaos.judge.evidence import RunEvidence
from chaos.judge.ledger.effects import took_effect
from chaos.judge.ledger.firmware_contexts import TIMED_OUT
from chaos.judge.ledger.peaks import renews
from chaos.judge.ledger.replay import WATCHED
from chaos.judge.ledger.world import ON_CGROUPS
from chaos.judge.oracle import OK, OracleAnswer, Rules, State
from chaos.judge.oracle.state import Psp

Limits = frozenset[tuple[str, str, int]]
# A move marks both VMs as being migrated before it takes any lock (steps 3 and 4 of the contract's part 1.2). So it has
# where it waits for a lock, which are the holds that need no arming, and at the entry of a function that comes later.
MARKED = frozenset(
    {
        "misc_cg_try_charge",
        "sev_lock_vcpus_for_migration",
        "kvm_lock_all_vcpus",
        "sev_check_source_vcpus",
        "sev_migrate_from",
        "sev_init_vmcb",
        "sev_unlock_vcpus_for_migration",
        "misc_cg_uncharge",
    }
)
BIDS = frozenset({"move", "mirror"})  # what wants the migration flags of two VMs
# Between created_vcpus and online_vcpus.
HALF_A_VCPU = "kvm_arch_vcpu_create"
# What an operation may answer in which an allocation of the kernel's failed, or a copy from or to the caller.
POINT_FAILED = frozenset({OracleAnswer(errno.ENOMEM), OracleAnswer(errno.EFAULT)})
START = "start"
OTHER_THREAD = -1


@dataclass(frozen=True, slots=True)
class Judged:
    """An operation that was answered. `allowed` is what it may have answered, `gap` why that is not known, "" if it
    is. `as_sev` is what the charge of a SEV-ES context's move would have answered under the key `sev`, None of any
    other operation, or if nobody can say. `busy_otherwise` if it may have answered EBUSY though no other move or mirror
    held the flag of either VM, or if that is not known."""

    invoke: Invoke
    done: Done
    answer: OracleAnswer
    allowed: frozenset[OracleAnswer]
    gap: str = ""
    as_sev: OracleAnswer | None = None
    busy_otherwise: bool = True

    @property
    def fits(self) -> bool:
        """Whether the answer is one of those; whose limit it was does not show in it."""
        return any(True for _ in self._as_answered)

    @property
    def left_open(self) -> bool:
        """Whether it is one that the contract leaves open. A command without data may as well succeed."""
        alike = list(self._as_answered)
        others = self.invoke.f == "command" and any(answer.open for answer in self.allowed)
        return bool(alike) and (others or all(answer.open for answer in alike))

    @property
    def _as_answered(self) -> Iterator[OracleAnswer]:
        seen = self.answer
        for answer in self.allowed:
            same = (answer.errno, answer.firmware) == (seen.errno, seen.firmware)
            if same and answer.status in (0, seen.status):
                yield answer

    @property
    def limits(self) -> frozenset[str]:
        """The cgroups one of whose limits may have been in the way."""
        return frozenset(answer.at for answer in self.allowed if answer.at)

    @property
    def in_the_way(self) -> str:
        """What those limits are, in words."""
        told = {
            f"the host's capacity, taken below {answer.at!r}," if answer.full else f"the limit of {answer.at}"
            for answer in self.allowed
            if answer.at
        }
        return " or ".join(sorted(told))


class Contract:
    """The oracle at work on one history."""

    def __init__(self, evidence: RunEvidence) -> None:
        self.evidence = evidence
        self.observations = [r for r in evidence.history.records if isinstance(r, Observation)]

    @cached_property
    def gap(self) -> str:
        """Why nothing of the history can be judged, "" if it can."""
        header = self.evidence.history.header
        if header is None:
            return "the history does not say on which kernel it was made"
        if not header.asids:
            return "the history does not say how many ASIDs the host has"
        try:
            oracle.rules(header.kernel)
        except UsageError as error:
            return error.message
        return ""

    @cached_property
    def _capacity(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many contexts the host has room for, and how many of them were not to be had when the run began."""
        header = self.evidence.history.header
        assert header is not None
        capacity = dict(header.asids)
        if header.host == "lab" and not header.shared:
            return capacity, {}  # nobody else is there: what cannot be had is missing, and that is no limit
        filled = next(
            (r for r in self.evidence.history.records if isinstance(r, Filled) and r.label == START),
            None,
        )
        counts = filled.count if filled is not None else {}
        return capacity, {key: max(0, capacity.get(key, 0) - count) for key, count in counts.items()}

    @cached_property
    def rules(self) -> Rules:
        header = self.evidence.history.header
        assert header is not None
        return oracle.rules(header.kernel)

    def judged(self) -> Iterator[Judged]:
        """Every operation that the oracle knows and that a kernel has answered, in the order of invocation."""
        if self.gap:
            return
        for invoke, done in self.evidence.operations:
            if invoke.f in WATCHED and done is not None and done.outcome != "info" and self._answered(invoke, done):
                yield from self._loop(invoke, done) if invoke.f == "moves" else (self._judge(invoke, done),)

    def _loop(self, invoke: Invoke, done: Done) -> Iterator[Judged]:
        """Each answer that a loop of moves was given, once: when in the loop it was, nobody recorded. Those that
        succeeded are operations of their own."""
        several = number(invoke, "threads") > 1
        for told in done.value:
            source, _, name = told.partition(" ")
            code = getattr(errno, name, 0) or (int(name) if name.isdigit() else 0)
            if code:
                args: dict[str, Value] = {"vm": argument(invoke, "vm"), "source": source}
                move = msgspec.structs.replace(invoke, f="move", args=args)
                yield self._judge(move, done, OracleAnswer(code), op=OTHER_THREAD if several else None)

    @cached_property
    def _moves(self) -> tuple[tuple[Invoke, Done | None], ...]:
        return tuple((invoke, done) for invoke, done in self.evidence.operations if invoke.f == "move")

    @staticmethod
    def _answered(invoke: Invoke, done: Done) -> bool:
        return took_effect(invoke, done) or ioctl_answered(done)

    def _judge(
        self, invoke: Invoke, done: Done, answer: OracleAnswer | None = None, *, op: int | None = None
    ) -> Judged:
        """`op` is what the operation goes by where it may be in the way of itself."""
        if answer is None:
            answer = OK if took_effect(invoke, done) else _answer(done)
        made = invoke if op is None else msgspec.structs.replace(invoke, op=op)
        ledger = self.evidence.ledger
        if ledger.lost_at is not None and invoke.seq > ledger.lost_at:
            return Judged(invoke, done, answer, frozenset(), ledger.lost)
        capacity, foreign = self._capacity
        around = self._limits(invoke.seq, done.seq)
        marked = self._stopped("move", invoke, done, lambda r: r.hold in UNARMED or r.function in MARKED)
        half = self._stopped("create_vcpu", invoke, done, lambda r: r.function == HALF_A_VCPU)
        moving = [other for other, over in self._moves if _overlap(other, over, invoke, done)]
        # What takes another VM would give a context to the dying one, or take it from there: that is finding 0007.
        dying = frozenset(argument(other, "source") for other in moving if invoke.f not in ("move", "mirror"))
        flushes = not self.evidence.contexts.flush_failed(invoke, done)
        firmware = self._firmware(invoke, done)
        allowed: set[OracleAnswer] = set()
        unflagged: set[OracleAnswer] = set()
        as_sev: set[OracleAnswer | None] = set()
        for world in ledger.during.get(invoke.op, ()):
            for limits, psp in product(around or {frozenset[tuple[str, str, int]]()}, firmware):
                state = State(
                    rules=self.rules,
                    world=world,
                    capacity=frozenset(capacity.items()),
                    foreign=frozenset(foreign.items()),
                    limits=limits,
                    psp=psp,
                    flushes=flushes,
                    obeys=self.evidence.contexts.obeys,
                    marked=marked,
                    dying=dying,
                    half=half,
                    memlock=self._memlock(invoke, done),
                    storage=self._storage(invoke, done),
                )
                allowed |= oracle.allowed(state, made)
                unflagged |= oracle.allowed(replace(state, flags_free=True), made) if made.f in BIDS else set()
                as_sev.add(_charged_as_sev(state, made))
        if allowed and done.value.get("struck"):
            allowed |= POINT_FAILED
            if answer.errno in {each.errno for each in POINT_FAILED}:
                allowed.add(answer)  # with whatever the firmware had answered until then
        if allowed and done.firmware in self.evidence.contexts.refusals(invoke, done):
            allowed.add(_answer(done))  # what the firmware refuses is handed on as it is (part 3.4)
        gap = "" if allowed else f"nobody can say in what state {invoke.f} found its VMs"
        if not around and invoke.f in ("init", "move"):
            gap = f"the limits were not read, which {invoke.f} may have met"
        other = bool(gap) or any(answer.errno == errno.EBUSY for answer in unflagged)
        sev = as_sev.pop() if len(as_sev) == 1 else None
        return Judged(invoke, done, answer, frozenset(allowed), gap, sev, busy_otherwise=other)

    def _stopped(self, f: str, invoke: Invoke, done: Done, at: Callable[[Held], bool]) -> frozenset[int]:
        """The operations `f` that were seen to be stopped there before this one began, and ended after it."""
        holds = (r for r in self.evidence.history.records if isinstance(r, Held) and r.reached and r.seq < invoke.seq)
        stopped = {r.op for r in holds if at(r)}
        return frozenset(
            other.op
            for other, ended in self.evidence.operations
            if other.f == f
            and other.op in stopped
            and (ended is None or (ended.seq > done.seq and ended.ended >= done.ended))
        )

    @cached_property
    def _given_up(self) -> int | None:
        """When the driver gave the firmware up, None if it never did."""
        log = (r.t for r in self.evidence.history.records if isinstance(r, Kernel) and TIMED_OUT in r.text)
        return next(log, None)

    @cached_property
    def _found_out(self) -> int | None:
        """The operation that found out, by its answer: there is one at most, and whatever asks later is told EBUSY."""
        late = (i.op for i, done in self.evidence.operations if done is not None and done.errno == ETIMEDOUT)
        asked = {i.op: i for i, _ in self.evidence.operations if i.f in WATCHED}
        return next((op for op in late if op in asked), None)

    def _firmware(self, invoke: Invoke, done: Done) -> tuple[Psp, ...]:
        """What the firmware may have been while the operation was under way."""
        given_up = self._given_up
        if given_up is None or done.t < given_up:
            return ("well",)
        if invoke.t > given_up:
            return ("dead",)
        return ("well", "stalled", "dead") if invoke.op == self._found_out else ("well", "dead")

    def _memlock(self, invoke: Invoke, done: Done) -> frozenset[tuple[str, int]]:
        """What the process of this operation may have been allowed to lock while it was under way."""
        mine = [i for i, _ in self.evidence.operations if i.f == "memlock" and i.agent == invoke.agent]
        before = [i for i in mine if i.seq < invoke.seq][-1:]
        given = (i.args.get("bytes") for i in (*before, *(i for i in mine if invoke.seq < i.seq < done.seq)))
        return frozenset((invoke.agent, size) for size in given if isinstance(size, int))

    def _storage(self, invoke: Invoke, done: Done) -> frozenset[str]:
        """What the file of the firmware's state may have been like while the operation was under way, if not well; and
        nothing if the firmware was neither initialised meanwhile nor given new keys, for then nobody wrote it."""
        writes = argument(invoke, "command") in NEW_KEYS or self.evidence.contexts.initialised(invoke, done)
        if not writes:
            return frozenset()
        latest, states = "well", set[str]()
        for change, over in self.evidence.operations:
            if change.f != "storage" or change.seq > done.seq or (over is not None and over.outcome != "ok"):
                continue
            if over is None or over.seq > invoke.seq:
                states.add(argument(change, "state"))
            else:
                latest = argument(change, "state")
        return frozenset({latest, *states} - {"well"})

    def unwritten(self, invoke: Invoke) -> bool:
        """Whether the platform was initialised before it by an INIT that failed for want of a place to write the
        firmware's state down, or whose process was killed meanwhile, and by none since that succeeded."""
        failed = False
        for other, done in self.evidence.operations:
            if other.f == "init" and done is not None and done.seq < invoke.seq:
                killed = done.outcome == "info" and self.evidence.contexts.initialised(other, done)
                failed = done.outcome != "ok" and (failed or killed or bool(self._storage(other, done)))
        return failed

    def _limits(self, begun: int, over: int) -> frozenset[Limits]:
        """The limits that may have been in force from record `begun` to record `over`: as they were read before, with
        what was changed since. What was read afterwards tells of changes that were not recorded."""
        before = next((r for r in reversed(self.observations) if r.seq < begun), None)
        after = next((r for r in self.observations if r.seq > over), None)
        limits = None if before is None else limits_of(before)
        found: set[Limits] = set()
        if before is not None and limits is not None:
            for invoke, done in self.changes:
                if not before.seq < done.seq or invoke.seq > over:
                    continue
                if done.seq > begun:
                    found.add(limits)
                limits = changed(limits, invoke)
            found.add(limits)
        read = None if after is None else limits_of(after)
        if after is not None and read is not None and not self._explained(limits, read, over, after.seq):
            found.add(read)
        return frozenset(found)

    @cached_property
    def changes(self) -> tuple[tuple[Invoke, Done], ...]:
        """The operations that changed a limit, or with the cgroup or its controller did away with one."""
        return tuple(
            (invoke, done)
            for invoke, done in self.evidence.operations
            if invoke.f in ON_CGROUPS and done is not None and done.outcome == "ok"
        )

    def _explained(self, limits: Limits | None, read: Limits, over: int, seen: int) -> bool:
        """Whether the recorded changes from record `over` on make these limits what was read at record `seen`."""
        for invoke, done in self.changes:
            if limits is not None and over < invoke.seq and done.seq < seen:
                limits = changed(limits, invoke)
        return limits == read


def _overlap(move: Invoke, over: Done | None, invoke: Invoke, done: Done) -> bool:
    """Whether another operation was made while the move was under way, by the times of the system calls."""
    return move.op != invoke.op and move.seq < done.seq and (over is None or not 0 < over.ended <= done.began)


def _answer(done: Done) -> OracleAnswer:
    return OracleAnswer(done.errno, done.firmware != 0, status=done.firmware)


def _charged_as_sev(state: State, move: Invoke) -> OracleAnswer | None:
    context, payer = state.world.context(argument(move, "source")), state.world.home(move.agent)
    if move.f != "move" or context is None or context.key != "sev_es" or payer is None or payer == context.payer:
        return None
    return oracle.charge(state, payer, "sev")


def changed(limits: Limits, change: Invoke) -> Limits:
    """The limits after an operation on cgroups."""
    name = argument(change, "cgroup")
    if change.f == "limit":
        key, number = argument(change, "key"), change.args.get("max")
        others = frozenset(limit for limit in limits if limit[:2] != (name, key))
        return others | {(name, key, number)} if isinstance(number, int) else others
    return frozenset(limit for limit in limits if not renews(change, limit[0]))


def limits_of(observation: Observation) -> Limits | None:
    """Every misc.max that was read and is no "max". None if that of some cgroup was not read. One without the
    controller has no files."""
    if not observation.misc or any(files and "max" not in files for files in observation.misc.values()):
        return None
    return frozenset(
        (cgroup, key, limit)
        for cgroup, files in observation.misc.items()
        for key, limit in files.get("max", {}).items()
        if key in KEYS
    )


def events_of(observation: Observation, cgroup: str, key: str, file: str = "events") -> int | None:
    """misc.events of a cgroup: how often its limit, or one below it, was in the way; or misc.events.local, how often it
    was its own. None if it was not read."""
    events = observation.misc.get(cgroup, {}).get(file)
    return None if events is None else events.get(f"{key}.max", 0)
