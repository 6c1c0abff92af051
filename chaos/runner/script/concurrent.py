# SPDX-License-Identifier: Apache-2.0
"""Operations that begin at one moment, in several VMMs, and what is left of loops of them.

A loop of moves is one operation. The moves of it that succeeded are put into the history as operations of their own
when all is over, each with the times of its system call; those that failed are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from chaos.experiment import steps as s
from chaos.history.records import Value
from chaos.linux.fd import OwnedFd
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.native import gate, read
from chaos.native.edge import answered
from chaos.runner.guests import Guest
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import PendingOperation, StepFailed
from chaos.vmm import messages as m
from chaos.vmm import race

# Nothing but threads has to be made ready; this is for a machine in trouble.
READY_WITHIN = 60.0


@dataclass(slots=True)
class _Member:
    """One of the operations, on `vm`. `memory` is where the calls of a loop are recorded."""

    vm: Guest
    operation: m.Move | m.Mirror | m.Moves
    memory: OwnedFd | None = None
    pending: PendingOperation | None = None

    @property
    def threads(self) -> int:
        return self.operation.threads if isinstance(self.operation, m.Moves) else 1


@dataclass(frozen=True, slots=True)
class _Found:
    """A move of a loop that succeeded."""

    member: _Member
    source: str
    began: int
    ended: int


def together(executor: Executor, step: s.TogetherStep) -> None:
    with ExitStack() as stack:
        members = [_prepared(executor, inner, stack) for inner in step.steps]
        if any(member.memory is not None for member in members):
            stack.enter_context(executor.untraced())
        shut = stack.enter_context(gate.new(sum(member.threads for member in members)))
        pendings = [
            _begin(executor, member, shut.number, m.Start(place=place, others=len(members) - 1))
            for place, member in enumerate(members)
        ]
        _await(executor, lambda: all(pending.tid or pending.over for pending in pendings), "all operations to be ready")
        moment = gate.open_at(shut.number)
        _await(executor, lambda: executor.now() >= moment, "the moment at which they begin")
        for inner in step.meanwhile:
            executor.carry_out(inner)
        _join(executor, members, step.within)
        for found in in_order(found for member in members for found in _found(member)):
            _write(executor, found)


def _prepared(executor: Executor, step: s.MoveStep | s.MirrorStep | s.MovesStep, stack: ExitStack) -> _Member:
    """The descriptors of the sources are with whoever takes them, so that nobody waits for one at the moment itself."""
    guests = executor.guests
    if isinstance(step, s.MovesStep):
        vm = guests.launched(step.destination)
        executor.free(vm)
        for source in dict.fromkeys(step.sources):
            executor.provide(vm, source, keep=True)
        memory = stack.enter_context(race.memory_of(step.rounds * len(step.sources), step.threads))
        loop = m.Moves(vm=vm.name, sources=step.sources, rounds=step.rounds, threads=step.threads)
        return _Member(vm, loop, memory)
    vm = guests[step.vm] if isinstance(step, s.MirrorStep) else guests.launched(step.destination)
    if not vm.created:
        guests.create(vm)
    executor.free(vm)
    executor.provide(vm, step.source, keep=True)
    kind = m.Mirror if isinstance(step, s.MirrorStep) else m.Move
    return _Member(vm, kind(vm=vm.name, source=step.source or "", fd=step.fd or "", flags=step.flags))


def _begin(executor: Executor, member: _Member, shut: int, start: m.Start) -> PendingOperation:
    fds = (shut,) if member.memory is None else (member.memory.number, shut)
    member.pending = executor.vmms.invoke(member.vm.vmm, member.operation, fds=fds, start=start)
    executor.guests.under_way[member.vm.name] = member.pending
    return member.pending


def _await(executor: Executor, there: Callable[[], bool], what: str) -> None:
    try:
        executor.loop.wait(there, READY_WITHIN, what, look=LOOK_AGAIN)
    except TimedOut as late:
        raise StepFailed(str(late)) from late


def _join(executor: Executor, members: Iterable[_Member], within: float) -> None:
    """What never ends is not for the script to judge: it goes on, and the operation stays under way."""
    under_way = {member.vm.name: member.pending for member in members if member.pending is not None}
    try:
        executor.loop.wait(lambda: all(pending.over for pending in under_way.values()), within, "all operations to end")
    except TimedOut as late:
        for name, pending in under_way.items():
            if not pending.over:
                where = executor.overdue(pending)
                executor.note("progress", f"{late}: {pending.f} of {name} is under way, its thread: {where}")
    for name, pending in under_way.items():
        if pending.over:
            del executor.guests.under_way[name]


def _found(member: _Member) -> Iterator[_Found]:
    loop, pending = member.operation, member.pending
    if not isinstance(loop, m.Moves) or member.memory is None or pending is None or not pending.over:
        return
    for thread in read(member.memory.number):
        for call in answered(thread, 0):
            yield _Found(member, loop.sources[call.index], call.began, call.ended)


def in_order(found: Iterable[_Found]) -> list[_Found]:
    """As they must have happened. A VM takes a context once and gives it away once, after that; between VMs that have
    nothing to do with each other the times tell."""
    left = sorted(found, key=lambda each: each.ended)
    ordered: list[_Found] = []
    while left:
        waiting = {each.member.vm.name for each in left}
        ready = next((each for each in left if each.source not in waiting), left[0])
        left.remove(ready)
        ordered.append(ready)
    return ordered


def _write(executor: Executor, found: _Found) -> None:
    assert found.member.pending is not None
    args: dict[str, Value] = {"vm": found.member.vm.name, "source": found.source, "of": found.member.pending.op}
    executor.log.made(found.member.vm.vmm, "move", args, began=found.began, ended=found.ended)
