# SPDX-License-Identifier: Apache-2.0
"""Programs of chance are worth what they reach: every operation with every name, allowed and refused, and calls that
are under way while others are made. They are drawn with a seed here, so what they reach is the same every day."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace
from errno import EBADF, EBUSY, EINVAL, EIO, ENOTTY, ETIMEDOUT
from itertools import pairwise

import pytest

from chaos.judge import oracle
from chaos.judge.ledger.world import World
from chaos.judge.oracle import OK, State, allowed
from chaos.judge.oracle.programs import AGENTS, CGROUPS, KEYS, LIMITS, VMS, WIDTH, ProgramStep, run, violations
from tests.unit.core.test_oracle import NEW, host, launched, op

PROGRAMS = 150
BIDS = ("move", "mirror")
PROLOGUE = [("add_cgroup", ""), ("add_cgroup", ""), ("spawn", "p0"), ("spawn", "p1")]


def shared() -> State:
    return oracle.new(NEW, {"sev": 4, "sev_es": 3}, {"sev": 1})


def programs() -> tuple[tuple[ProgramStep, ...], ...]:
    chance = random.Random(1)
    return tuple(tuple(run(shared(), chance.randbytes(50 * WIDTH))) for _ in range(PROGRAMS))


def made() -> list[ProgramStep]:
    """What was made after the prologue and was answered."""
    return [step for program in programs() for step in program[len(PROLOGUE) :] if step.answer is not None]


def test_every_program_begins_with_two_processes_in_cgroups_of_their_own() -> None:
    for program in (*programs(), tuple(run(shared(), b""))):
        begun = program[: len(PROLOGUE)]
        assert [(step.operation.f, step.operation.agent) for step in begun] == PROLOGUE
        assert {step.answer for step in begun} == {OK}
        assert {(step.operation.pid, step.operation.step) for step in program} == {(0, -1)}  # of no experiment
        assert begun[-1].state.world.homes == {("p0", "a"), ("p1", "b")}


def test_bytes_that_are_no_whole_operation_do_nothing() -> None:
    whole = random.Random(2).randbytes(20 * WIDTH)
    for more in range(1, WIDTH):
        assert list(run(shared(), whole + bytes(more))) == list(run(shared(), whole))


def test_the_first_bytes_and_the_last_are_an_operation() -> None:
    made = [list(run(shared(), bytes([which, 0, 0, 1])))[len(PROLOGUE) :] for which in range(256)]
    assert sum(map(bool, made)) > 128  # others cannot be made where nothing is yet
    assert all(len(steps) <= 1 for steps in made)


def test_each_step_goes_on_where_the_one_before_it_ended() -> None:
    for program in programs():
        for before, step in pairwise(program):
            assert step.before == before.state


def test_programs_reach_every_operation_and_most_of_them_a_context() -> None:
    every = programs()
    steps = [step for program in every for step in program if step.answer is not None]
    succeeded = {step.operation.f for step in steps if step.answer == OK}
    refused = {step.operation.f for step in steps if step.answer != OK}
    assert succeeded == {
        "spawn", "kill", "create", "create_vcpu", "init", "launch_start", "launch_update_data", "launch_update_vmsa",
        "launch_measure", "launch_finish", "guest_status", "send_fd", "close", "move", "mirror", "enter", "limit",
        "add_cgroup", "remove_cgroup", "disable_misc", "enable_misc", "psp_dies",
    }  # fmt: skip
    assert succeeded - refused == {"create", "kill", "psp_dies"}  # nothing refuses these
    dead = sum(step.operation.f == "psp_dies" for step in steps)
    assert 0 < dead < 0.1 * PROGRAMS  # after which little can be reached
    with_context = [any(step.state.world.contexts for step in program) for program in every]
    assert sum(with_context) > 0.8 * PROGRAMS


def test_moves_and_mirrors_are_answered_whatever_they_may_be_and_mostly_succeed_where_they_may() -> None:
    steps = made()
    errnos: dict[str, set[int]] = defaultdict(set)
    for step in steps:
        assert step.answer is not None
        errnos[step.operation.f].add(step.answer.errno)
    assert errnos["move"] == {0, EBADF, EBUSY, EINVAL, EIO}
    assert errnos["mirror"] >= {0, EBADF, EINVAL, EIO}
    assert errnos["launch_start"] >= {0, EBADF, EINVAL, EIO, ENOTTY}
    assert ETIMEDOUT in set().union(*errnos.values())
    either = [step for step in steps if OK in allowed(step.before, step.operation) != {OK}]
    assert 0.75 < sum(step.answer == OK for step in either) / len(either) < 0.95


def test_every_name_is_drawn() -> None:
    drawn: dict[tuple[str, str], set[object]] = defaultdict(set)
    for step in made():
        for name, value in step.operation.args.items():
            drawn[step.operation.f, name].add(value)
        drawn[step.operation.f, ""].add(step.operation.agent)
    assert not [f for f, name in drawn if f in ("kill", "psp_dies") and name]  # which are of no VM
    on_vms = ("create", "init", "launch_start", "close", "guest_status", "send_fd", "move", "mirror", "create_vcpu")
    for f in on_vms:
        assert drawn[f, "vm"] == set(VMS), f
    for f in ("spawn", "enter", "add_cgroup", "remove_cgroup", "disable_misc", "enable_misc"):
        assert drawn[f, "cgroup"] == set(CGROUPS), f
    assert (drawn["limit", "cgroup"], drawn["limit", "max"]) == ({".", *CGROUPS}, set(LIMITS))
    assert drawn["limit", "key"] == drawn["init", "key"] == set(KEYS)
    assert drawn["send_fd", "to"] == {*AGENTS, ""}
    assert drawn["move", "source"] == drawn["mirror", "source"] == set(VMS)
    assert drawn["spawn", ""] == drawn["kill", ""] == drawn["create", ""] == set(AGENTS)


def test_it_is_mostly_the_process_that_created_a_vm_that_asks_it_something() -> None:
    asked = [step for step in made() if step.operation.f in ("init", "guest_status", "move", "mirror", "close")]
    vms = [step.before.world.vm(str(step.operation.args["vm"])) for step in asked]
    by_creator = [vm.agent == step.operation.agent for step, vm in zip(asked, vms, strict=True) if vm is not None]
    assert 0.8 < sum(by_creator) / len(by_creator) < 0.98


def test_whoever_is_to_take_a_context_mostly_has_its_descriptor() -> None:
    def elsewhere(step: ProgramStep) -> bool:
        source = step.before.world.vm(str(step.operation.args.get("source")))
        return step.operation.f in BIDS and source is not None and source.agent != step.operation.agent

    across = [step for step in made() if elsewhere(step)]
    had = [step.before.world.given(str(step.operation.args["source"]), step.operation.agent, "") for step in across]
    assert 0.7 < sum(had) / len(had) < 0.98
    assert any(step.answer == OK for step in across)


def test_what_is_sent_for_an_operation_comes_from_another_process_and_every_operation_has_its_own_number() -> None:
    sent = 0
    for program in programs():
        begun = [step.operation for step in program if step.answer is None]
        others = [step.operation for step in program if step.answer is not None and step.operation not in begun]
        numbers = Counter(operation.op for operation in (*begun, *others))
        assert set(numbers.values()) == {1}
        for before, step in pairwise(program):
            if before.operation.op == step.operation.op + 1:
                sent += 1
                assert before.operation.f == "send_fd" and before.operation.args["to"] == step.operation.agent
                assert step.operation.f in BIDS and before.operation.agent != step.operation.agent
    assert sent > PROGRAMS / 2


def test_what_is_left_under_way_is_made_meanwhile_and_ends_later_unless_its_process_dies() -> None:
    ended, every = 0, programs()
    for program in every:
        under_way: dict[int, str] = {}
        for step in program:
            op, agent = step.operation.op, step.operation.agent
            if step.answer is None:
                assert OK in allowed(step.before, step.operation) and step.operation.f in (*BIDS, "create_vcpu")
                under_way[op] = agent
            elif op in under_way:
                assert step.before.world.home(agent) is not None
                del under_way[op]
                ended += 1
            elif step.operation.f == "kill":
                under_way = {op: whose for op, whose in under_way.items() if whose != agent}
    assert ended > 0.1 * PROGRAMS
    may = [step for program in every for step in program if step.operation.f in (*BIDS, "create_vcpu")]
    left = [step.operation.f for step in may if step.answer is None]
    assert set(left) == {*BIDS, "create_vcpu"}
    assert 0.1 < len(left) / sum(OK in allowed(step.before, step.operation) for step in may) < 0.4


def test_no_program_breaks_a_promise() -> None:
    assert [broken for program in programs() for step in program for broken in violations(step)] == []


@pytest.mark.parametrize(
    ("off", "found"),
    [
        ({}, set()),
        ({("source", "sev"): 1}, {". sev", "source sev"}),  # which is not that of the guest, nor in the sum above
        ({("source", "sev_es"): 1}, {". sev_es", "source sev_es"}),
        ({(".", "sev"): 1}, {". sev", "2 charges of sev"}),
        ({("destination/inner", "sev"): 1}, {"destination sev", "destination/inner sev"}),
    ],
)
def test_counters_that_do_not_add_up_are_found(
    monkeypatch: pytest.MonkeyPatch, off: dict[tuple[str, str], int], found: set[str]
) -> None:
    state, right = launched(host()), World.charges.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(World, "charges", property(lambda world: Counter(right(world)) + Counter(off)))
    told = violations(ProgramStep(state, op("enter", "s", cgroup="source"), None, state))
    assert {violation.removeprefix("P1: ").partition(" is not")[0].partition(" for")[0] for violation in told} == found


@pytest.mark.parametrize("f", ["mirror", "enter", "limit", "create_vcpu"])
def test_what_changes_no_charge_and_did_is_found(f: str) -> None:
    before, now = host(), launched(host())
    assert list(violations(ProgramStep(before, op("init", "s"), OK, now))) == []
    assert list(violations(ProgramStep(before, op(f, "s"), OK, now))) == [f"P2, P11: a {f} changed a charge"]


def test_more_charges_than_the_host_can_have_are_found() -> None:
    state = launched(launched(host(sev=2)), "more")
    step = ProgramStep(state, op("enter", "s", cgroup="source"), None, state)
    assert list(violations(step)) == []
    fewer = replace(step, state=replace(state, capacity=frozenset({("sev", 1), ("sev_es", 1)})))
    assert list(violations(fewer)) == ["P10: 2 charges of sev, more than the host can have"]
