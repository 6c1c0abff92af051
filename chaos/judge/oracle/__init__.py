# SPDX-License-Identifier: Apache-2.0
"""The oracle: part 0 of the kernel contract (docs/contract.md), executable.

It knows what each operation may answer, and what every counter of every cgroup must read afterwards. It states the
promise and never what a kernel happened to answer; where kernels differ, it is because the contract says so, and
`versions.DIFFERENCES` is all of it. What an operation makes of contexts, mirrors and processes is told by
`chaos.judge.ledger.effects`, which the ledger uses too; `rules.CHECKS` says when an operation is refused.

An operation is an `Invoke`, as in a history, so that a history can be held against the oracle as it is. Beside those of
`chaos.history.records` it knows some that are not recorded so:

    kill {}                             the process `agent` is killed
    psp_dies {}                         the firmware stops answering, for good

Answers are sets for two reasons only: something was under way of which nobody can say how far it had come, or the
firmware was asked, which may refuse for reasons of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from errno import EBADF, EBUSY, ETIMEDOUT

from chaos.history.reading import argument, levels
from chaos.history.records import Invoke
from chaos.judge.ledger.effects import begin, effect, halfway, left_behind
from chaos.judge.ledger.world import ON_CGROUPS, ON_ITS_WAY, World, die, forget, gone
from chaos.judge.oracle.rules import CHECKS
from chaos.judge.oracle.state import OK, OracleAnswer, State, charge, charges, events
from chaos.judge.oracle.surroundings import has
from chaos.judge.oracle.versions import DIFFERENCES, Difference, Rules, rules

__all__ = [
    "DIFFERENCES",
    "OK",
    "Difference",
    "OracleAnswer",
    "Rules",
    "State",
    "after",
    "allowed",
    "charge",
    "charges",
    "events",
    "new",
    "rules",
    "under_way",
]  # fmt: skip

# Those that nobody living has to make: a process to be, and what is done from outside.
_FROM_OUTSIDE = ON_CGROUPS | {"spawn", "psp_dies"}


def new(kernel: str, capacity: Mapping[str, int], foreign: Mapping[str, int] | None = None) -> State:
    """A host on which nothing runs but `foreign` contexts. Raises `UsageError` if the kernel is no version."""
    return State(
        rules=rules(kernel),
        capacity=frozenset(capacity.items()),
        foreign=frozenset((foreign or {}).items()),
    )


def allowed(state: State, operation: Invoke) -> frozenset[OracleAnswer]:
    """What the operation may answer. Nothing if it cannot be made: its process does not live, or its name is taken.

    Raises KeyError for an operation that the oracle does not know.
    """
    checks = CHECKS[operation.f]
    if not _can_be_made(state.world, operation):
        return frozenset()
    answers: list[OracleAnswer] = []
    for check in checks:
        refusal = check(state, operation)
        if refusal is None:
            continue
        answers.append(refusal.answer)
        if refusal.sure:
            return frozenset(answers)
    return frozenset((OK, *answers))


def after(state: State, operation: Invoke, answer: OracleAnswer) -> State:
    """The state once the operation has answered so. Raises ValueError if it must not."""
    if answer not in allowed(state, operation):
        raise ValueError(f"{operation.f} must not answer {answer}")
    state = replace(state, world=begin(state.world, operation))
    if answer.errno:
        return _refused(state, operation, answer)
    rule = _BESIDE_THE_WORLD.get(operation.f)
    if rule is not None:
        return rule(state, operation)
    world = effect(state.world, operation)
    if world is None:  # the checks and chaos.judge.ledger.effects disagree
        raise ValueError(f"{operation.f} has no effect where it may succeed")
    return replace(state, world=forget(world, operation.op))


def _refused(state: State, operation: Invoke, answer: OracleAnswer) -> State:
    """Nothing has changed but what a refusal leaves behind."""
    context = state.world.context(argument(operation, "source"))
    key = argument(operation, "key") if context is None else context.key
    return replace(
        state,
        world=forget(_left_behind(state, operation, answer), operation.op),
        blocked=(*state.blocked, (answer.at, key)) if answer.at else state.blocked,
        psp="dead" if answer.errno == ETIMEDOUT else state.psp,
    )


def _left_behind(state: State, operation: Invoke, answer: OracleAnswer) -> World:
    """Of several system calls it is the last that is to ask the firmware. One that the VM's own descriptor was there
    for lacked that of the firmware."""
    unsent = answer.errno == EBADF and has(state, operation.agent, argument(operation, "vm"))
    last = answer.firmware or unsent or answer.errno in (EBUSY, ETIMEDOUT)
    return left_behind(state.world, operation) if last else state.world


def under_way(state: State, operation: Invoke) -> State:
    """The state with the operation in its middle, as far in as it gets before it has happened."""
    begun = begin(state.world, operation)
    return replace(state, world=halfway(begun, operation) or begun)


def _can_be_made(world: World, operation: Invoke) -> bool:
    lives = world.home(operation.agent) is not None
    if operation.f == "spawn":
        return not lives and operation.agent != ON_ITS_WAY
    if operation.f == "create":
        return lives and world.vm(argument(operation, "vm")) is None
    return lives or operation.f in _FROM_OUTSIDE


def _die(state: State, operation: Invoke) -> State:
    return replace(state, world=die(state.world, operation.agent))


def _add_cgroup(state: State, operation: Invoke) -> State:
    return replace(state, cgroups=state.cgroups | {argument(operation, "cgroup")})


def _remove_cgroup(state: State, operation: Invoke) -> State:
    name = argument(operation, "cgroup")
    return replace(_without_misc(state, operation, frozenset({name})), cgroups=state.cgroups - {name})


def _disable_misc(state: State, operation: Invoke) -> State:
    return _without_misc(state, operation, state.children(argument(operation, "cgroup")))


def _without_misc(state: State, operation: Invoke, cgroups: frozenset[str]) -> State:
    """These, with which go all below them, lose their limits. What they have refused stays counted above them."""
    world = effect(state.world, operation)
    assert world is not None
    blocked = list(state.blocked)
    for name in cgroups:
        blocked = [(gone(cgroup, name, operation.op), key) for cgroup, key in blocked]
    return replace(
        state,
        world=world,
        limits=frozenset(limit for limit in state.limits if not cgroups & set(levels(limit[0]))),
        blocked=tuple(blocked),
    )


def _limit(state: State, operation: Invoke) -> State:
    """Lowering it below what is used takes nothing away; it only stops new charges (P10)."""
    name, key, limit = argument(operation, "cgroup"), argument(operation, "key"), operation.args.get("max")
    others = frozenset(entry for entry in state.limits if entry[:2] != (name, key))
    return replace(state, limits=others | {(name, key, limit)} if isinstance(limit, int) else others)


def _psp_dies(state: State, operation: Invoke) -> State:
    return replace(state, psp="stalled")


_BESIDE_THE_WORLD = {
    "kill": _die,
    "exit": _die,
    "add_cgroup": _add_cgroup,
    "remove_cgroup": _remove_cgroup,
    "disable_misc": _disable_misc,
    "limit": _limit,
    "psp_dies": _psp_dies,
}
