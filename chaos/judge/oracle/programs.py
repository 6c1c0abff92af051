# SPDX-License-Identifier: Apache-2.0
"""Programs for the oracle: any bytes are one, so that whoever has chance to give can drive it.

Four bytes are an operation: which one, on what, with what, and which of the allowed answers it gets. Names are few, so
that operations meet. A move, a mirror or a new vCPU may be left under way, and ends some operations later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from chaos.history.reading import argument, levels
from chaos.history.records import Invoke, Value
from chaos.judge.ledger.world import ON_CGROUPS, ON_ITS_WAY, Context, World
from chaos.judge.oracle import OracleAnswer, State, after, allowed, under_way

AGENTS = ("p0", "p1", "p2")
VMS = ("v0", "v1", "v2", "v3", "v4")
CGROUPS = ("a", "b", "b/inner", "c")
KEYS = ("sev", "sev_es")
LIMITS: tuple[int | str, ...] = (0, 1, 2, "max")
WIDTH = 4

# How often each is drawn. Programs that never get a context are not worth much, so what leads to one comes often.
_WEIGHTS = {
    "spawn": 4, "create": 12, "init": 12, "launch_start": 6, "launch_update_vmsa": 5, "create_vcpu": 5,
    "send_fd": 9, "move": 16, "mirror": 9, "close": 4, "kill": 1, "enter": 3, "limit": 3, "add_cgroup": 4,
    "remove_cgroup": 3, "disable_misc": 2, "enable_misc": 2, "guest_status": 2, "launch_update_data": 1,
    "launch_measure": 1, "launch_finish": 1, "finish": 8, "psp_dies": 1,
}  # fmt: skip
_DRAWN = tuple(f for f, weight in _WEIGHTS.items() for _ in range(weight))
_RARELY = 31  # of a byte: one time in eight
_LEFT_UNDER_WAY = 5  # one in so many of those that can be
_TAKES_ANOTHER = frozenset({"move", "mirror"})
_CAN_BE_UNDER_WAY = frozenset({"move", "mirror", "create_vcpu"})
# Every program begins so: it would take most of one to get here by chance.
_PROLOGUE: tuple[tuple[str, str, dict[str, Value]], ...] = (
    ("add_cgroup", "", {"cgroup": "a"}),
    ("add_cgroup", "", {"cgroup": "b"}),
    ("spawn", "p0", {"cgroup": "a"}),
    ("spawn", "p1", {"cgroup": "b"}),
)


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """An operation that was made, with its answer; None if it was left under way."""

    before: State
    operation: Invoke
    answer: OracleAnswer | None
    state: State


def run(state: State, program: bytes) -> Iterator[ProgramStep]:
    """Carry the program out. Operations that cannot be made where they come are passed over."""
    pending: list[Invoke] = []
    for number, (f, agent, args) in enumerate(_PROLOGUE):
        step = _made(state, _invoke(number, f, agent, args), 0)
        if step is not None:
            state = step.state
            yield step
    for at in range(0, len(program) - WIDTH + 1, WIDTH):
        which, on, with_, how = program[at : at + WIDTH]
        f = _DRAWN[which % len(_DRAWN)]
        pending = [op for op in pending if state.world.home(op.agent) is not None]
        if f == "finish":
            if not pending:
                continue
            operation = pending.pop(on % len(pending))
        elif how > _RARELY and (f == "psp_dies" or (f in _TAKES_ANOTHER and not state.world.holders)):
            continue
        else:
            operation = _operation(state, len(_PROLOGUE) + at, f, on, with_)
            for step in _sent(state, operation, how):
                state = step.state
                yield step
            if f in _CAN_BE_UNDER_WAY and how % _LEFT_UNDER_WAY == 0 and OracleAnswer() in allowed(state, operation):
                pending.append(operation)
                begun = under_way(state, operation)
                yield ProgramStep(state, operation, None, begun)
                state = begun
                continue
        step = _made(state, operation, how)
        if step is not None:
            state = step.state
            yield step


def _sent(state: State, operation: Invoke, how: int) -> Iterator[ProgramStep]:
    """Mostly whoever is to take a context is sent the descriptor of the VM that has it, as in a migration."""
    source = state.world.vm(argument(operation, "source"))
    if source is None or source.agent == operation.agent or how <= _RARELY:
        return
    args: dict[str, Value] = {"vm": source.name, "to": operation.agent}
    step = _made(state, _invoke(operation.op + 1, "send_fd", source.agent, args), 0)
    if step is not None:
        yield step


def _made(state: State, operation: Invoke, how: int) -> ProgramStep | None:
    answers = sorted(allowed(state, operation))
    if not answers:
        return None
    answer = answers[how // 3 % len(answers) if how % 3 == 0 else 0]  # mostly success, where that is allowed
    return ProgramStep(state, operation, answer, after(state, operation, answer))


def _operation(state: State, op: int, f: str, on: int, with_: int) -> Invoke:
    """On a VM it is mostly the process that created it that asks; now and then it is another."""
    living = sorted(vm.name for vm in state.world.vms)
    vm = VMS[on % len(VMS)] if f == "create" or on <= _RARELY or not living else living[on % len(living)]
    agent = AGENTS[with_ % len(AGENTS)]
    owner = state.world.vm(vm)
    if owner is not None and with_ % 8:
        agent = owner.agent
    args: dict[str, Value] = {}
    if f in ("spawn", "enter") or f in ON_CGROUPS - {"limit"}:
        args = {"cgroup": CGROUPS[on % len(CGROUPS)]}
    elif f == "limit":
        where = (".", *CGROUPS)[on % (len(CGROUPS) + 1)]
        args = {"cgroup": where, "key": KEYS[with_ % 2], "max": LIMITS[with_ // 2 % len(LIMITS)]}
    elif f == "init":
        args = {"vm": vm, "key": KEYS[with_ % 2]}
    elif f in ("move", "mirror"):
        having = sorted(state.world.holders)
        source = VMS[with_ % len(VMS)] if with_ <= _RARELY or not having else having[with_ % len(having)]
        args = {"vm": vm, "source": source}
    elif f == "send_fd":
        args = {"vm": vm, "to": (*AGENTS, "")[with_ % (len(AGENTS) + 1)]}
    elif f not in ("kill", "psp_dies"):
        args = {"vm": vm}
    return _invoke(op, f, agent, args)


def _invoke(op: int, f: str, agent: str, args: dict[str, Value]) -> Invoke:
    return Invoke(t=op, op=op, f=f, agent=agent, pid=0, step=-1, args=args)


def violations(step: ProgramStep) -> Iterator[str]:
    """What of part 0 does not hold of the state after the step; nothing if all does."""
    state, world = step.state, step.state.world
    charged = world.charges
    paid = [(context.payer, context.key) for context in world.contexts]
    paid += [(extra.cgroup, extra.key) for extra in world.extras if extra.charged]
    for key in KEYS:
        if charged[".", key] != sum(of == key for _, of in paid):
            yield f"P1: {charged['.', key]} charges of {key} for {paid}"
        for cgroup in {level for place, _ in charged for level in levels(place)}:
            inner = {c for c, _ in charged if c != cgroup and _parent(c) == cgroup}
            own = sum((cgroup, key) == each for each in paid)
            if charged[cgroup, key] != own + sum(charged[c, key] for c in inner):
                yield f"P1: {cgroup} {key} is not the sum of what is below it"
        if charged[".", key] > state.capacity_of(key):
            yield f"P10: {charged['.', key]} charges of {key}, more than the host can have"
    owners = [context.owner for context in world.contexts]
    if len(owners) != len(set(owners)) or world.dead & world.holders:
        yield "P4: two contexts of one VM, or one of a dead VM"
    if any(mirror.owner not in owners or mirror.vm in owners for mirror in world.mirrors):
        yield "P4: a mirror without an owner, or one that is an owner"
    if not world.homes and world.contexts:
        yield "P9: nobody lives, and contexts do"
    yield from _changed(step)


def _changed(step: ProgramStep) -> Iterator[str]:
    """What the step may not have changed."""
    f, before, now = step.operation.f, step.before.world, step.state.world
    if step.answer is not None and step.answer.errno:
        op, agent = step.operation.op, step.operation.agent
        # A file, until it failed: it was held by the call, or sent for it.
        kept = any(r.op == op or (r.sent and r.agent in (agent, ON_ITS_WAY)) for r in before.references)
        if not kept and (_contexts(before), before.mirrors, before.dead) != (_contexts(now), now.mirrors, now.dead):
            yield f"P6: a {f} that failed changed something"
    elif f in ("mirror", "enter", "limit", "create_vcpu") and before.charges != now.charges:
        yield f"P2, P11: a {f} changed a charge"
    if f == "move" and step.answer is not None and not step.answer.errno:
        if argument(step.operation, "source") not in now.dead:
            yield "P3: a source that was moved lives"
        if len(before.contexts) != len(now.contexts):
            yield "P4: a move made or lost a context"


def _contexts(world: World) -> frozenset[Context]:
    """Without their regions: one is registered for LAUNCH_UPDATE_DATA, whatever becomes of that."""
    return frozenset(replace(context, regions=()) for context in world.contexts)


def _parent(cgroup: str) -> str:
    return cgroup.rpartition("/")[0] or "."
