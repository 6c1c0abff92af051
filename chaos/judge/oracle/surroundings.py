# SPDX-License-Identifier: Apache-2.0
"""The same of what is done around the VMs: processes, cgroups, descriptors. See `chaos.judge.oracle.rules`."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, EPIPE

from chaos.history.reading import argument, levels
from chaos.history.records import Invoke
from chaos.judge.ledger.world import ON_ITS_WAY
from chaos.judge.oracle.state import Refusal, State
from chaos.judge.oracle.state import sure as _sure

Check = Callable[[State, Invoke], Refusal | None]


def has(state: State, agent: str, vm: str) -> bool:
    """Whether the process has the VM open."""
    mine = (r for r in state.world.references if (r.vm, r.agent, r.op) == (vm, agent, None))
    return any(not reference.lost for reference in mine)


def _no_cgroup(state: State, op: Invoke) -> Refusal | None:
    return _sure(ENOENT, when=argument(op, "cgroup") not in state.cgroups)


def _no_parent(state: State, op: Invoke) -> Refusal | None:
    return _sure(ENOENT, when=not set(levels(argument(op, "cgroup"))[:-1]) <= state.cgroups)


def _there_already(state: State, op: Invoke) -> Refusal | None:
    return _sure(EEXIST, when=argument(op, "cgroup") in state.cgroups)


def _in_use(state: State, op: Invoke) -> Refusal | None:
    """Charges do not keep a cgroup from being removed; processes and children do."""
    name = argument(op, "cgroup")
    lived_in = any(home == name for _, home in state.world.homes)
    return _sure(EBUSY, when=name == "." or bool(state.children(name)) or lived_in)


def _divided_below(state: State, op: Invoke) -> Refusal | None:
    """A child whose own children have the controller keeps it."""
    given_on = {child for child in state.children(argument(op, "cgroup")) if state.children(child)}
    return _sure(EBUSY, when=bool(given_on - state.world.undivided))


def _lived_in(state: State, op: Invoke) -> Refusal | None:
    """Who lives in a cgroup must not share its resources with its children."""
    name = argument(op, "cgroup")
    return _sure(EBUSY, when=any(home == name for _, home in state.world.homes))


def _without_misc(state: State, op: Invoke) -> Refusal | None:
    name = argument(op, "cgroup")
    return _sure(ENOENT, when=state.world.payer(name) != name)


def _no_limit(state: State, op: Invoke) -> Refusal | None:
    """misc.max takes "max" or a number, and only for a key that the host has capacity of."""
    limit = op.args.get("max")
    valid = limit == "max" or (isinstance(limit, int) and limit >= 0)
    return _sure(EINVAL, when=not valid or state.capacity_of(argument(op, "key")) == 0)


def _nobody_to_send_to(state: State, op: Invoke) -> Refusal | None:
    to = argument(op, "to")
    return _sure(EPIPE, when=to != ON_ITS_WAY and state.world.home(to) is None)


def _not_open(state: State, op: Invoke) -> Refusal | None:
    return _sure(EBADF, when=not has(state, op.agent, argument(op, "vm")))


AROUND: dict[str, tuple[Check, ...]] = {
    "spawn": (_no_cgroup,),
    "enter": (_no_cgroup,),
    "exit": (),
    "kill": (),
    "add_cgroup": (_there_already, _no_parent),
    "remove_cgroup": (_no_cgroup, _in_use),
    "limit": (_no_cgroup, _without_misc, _no_limit),
    "disable_misc": (_no_cgroup, _without_misc, _divided_below),
    "enable_misc": (_no_cgroup, _without_misc, _lived_in),
    "close": (_not_open,),
    "send_fd": (_not_open, _nobody_to_send_to),
    "receive_fd": (),
    "connect": (),
    "disconnect": (),
    "psp_dies": (),
    "storage": (),
    "reload": (),
}
