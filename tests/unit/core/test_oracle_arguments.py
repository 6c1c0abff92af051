# SPDX-License-Identifier: Apache-2.0
"""The oracle on what operations are given: arguments of INIT, wrong descriptors and flags, commands by their number."""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EBUSY, EINVAL, EIO, ENOMEM, ENOTTY, ETIMEDOUT

import pytest

from chaos.history.records import Value
from chaos.judge.oracle import OK, OracleAnswer, State, after, allowed, under_way
from tests.unit.core.test_oracle import MOVE, NEW, OLD, does, errnos, host, launched, op, ready, with_descriptor

KERNELS = pytest.mark.parametrize("kernel", [OLD, NEW])


def bare(kernel: str = NEW, **args: Value) -> State:
    """A VM without vCPUs, which is nothing yet."""
    return does(host(kernel), "create", "s", vm="old", kind="plain", vcpus=0, **args)


def inits(state: State, **args: Value) -> set[int]:
    """What INIT may answer, but for what the firmware says to being initialised."""
    return {answer.errno for answer in allowed(state, op("init", "s", vm="old", **args)) if not answer.firmware}


def test_a_firmware_that_does_what_it_must_refuses_no_init_and_no_status() -> None:
    for obeys in (False, True):
        state = replace(bare(), obeys=obeys)
        refused = {answer.errno for answer in allowed(state, op("init", "s", vm="old", key="sev")) if answer.firmware}
        assert refused == (set() if obeys else {EIO})
        state = replace(launched(host(NEW)), obeys=obeys)
        for f in ("guest_status", "launch_measure"):  # which it may refuse by the guest's state
            refused = {answer.errno for answer in allowed(state, op(f, "s", vm="old")) if answer.firmware}
            assert refused == (set() if obeys else {EIO})


def test_what_a_firmware_that_does_what_it_must_refuses_has_the_status_of_its_reason() -> None:
    def refusals(state: State, f: str, vm: str = "old") -> set[tuple[int, int]]:
        return {(answer.errno, answer.status) for answer in allowed(state, op(f, "s", vm=vm))}

    nobody = replace(does(bare(), "init", "s", vm="old", key="sev"), obeys=True)
    assert refusals(nobody, "launch_finish") == {(EBADF, 0), (EIO, 1)}  # the platform is not working
    state = does(does(nobody, "launch_start", "s", vm="old"), "create", "s", vm="next", kind="sev", vcpus=1)
    state = does(state, "init", "s", vm="next", key="sev")
    assert refusals(state, "launch_finish", "next") == {(EBADF, 0), (EIO, 16)}  # no such guest
    assert refusals(state, "launch_start") == {(EIO, 12)}  # the ASID is its own already
    assert refusals(state, "launch_finish") == {(EIO, 2)}  # it was not measured
    assert refusals(state, "launch_measure") == {(0, 0)}
    state = does(state, "launch_measure", "s", vm="old")
    for f in ("launch_measure", "launch_update_data"):
        assert refusals(state, f) == {(EIO, 2)}
    state = does(state, "launch_finish", "s", vm="old")
    assert refusals(state, "launch_finish") == {(EIO, 2)}
    assert refusals(state, "guest_status") == {(0, 0)}


@pytest.mark.parametrize(("vcpus", "late", "again"), [(1, (EIO, 2), (EINVAL, 0)), (0, (0, 0), (0, 0))])
def test_registers_are_sealed_once_and_before_the_measurement_unless_there_are_none(
    vcpus: int, late: tuple[int, int], again: tuple[int, int]
) -> None:
    """Where there is no vCPU nothing is sent, and nothing is sealed."""

    def sealing(state: State) -> set[tuple[int, int]]:
        return {(answer.errno, answer.status) for answer in allowed(state, op("launch_update_vmsa", "s", vm="old"))}

    state = does(host(NEW), "create", "s", vm="old", kind="sev_es", vcpus=vcpus)
    state = does(does(state, "init", "s", vm="old", key="sev_es"), "launch_start", "s", vm="old")
    state = replace(state, obeys=True)
    assert sealing(state) == {(0, 0)}
    assert sealing(does(state, "launch_measure", "s", vm="old")) == {late}
    assert sealing(does(state, "launch_update_vmsa", "s", vm="old")) == {again}


def test_who_was_given_no_limit_may_pin_what_it_likes() -> None:
    state, asked = launched(host(NEW)), op("register_region", "s", vm="old")
    assert ENOMEM not in {answer.errno for answer in allowed(state, asked)}
    for limit, due in ((0, {ENOMEM}), (4096, {0, ENOMEM})):
        limited = replace(state, memlock=frozenset({("s", limit)}))
        assert {answer.errno for answer in allowed(limited, asked)} == due


@KERNELS
@pytest.mark.parametrize("f", ["move", "mirror"])
def test_a_flag_is_refused_before_the_descriptor_is_looked_at(kernel: str, f: str) -> None:
    state = ready(kernel, vcpus=0)
    assert errnos(state, f, "d", **MOVE) == {0}
    assert errnos(state, f, "d", flags=1, **MOVE) == {EINVAL}
    assert errnos(state, f, "d", vm="new", fd="pipe") == {EBADF}
    assert errnos(state, f, "d", vm="new", fd="pipe", flags=1 << 31) == {EINVAL}


@KERNELS
def test_a_dead_vm_answers_eio_before_anything_is_looked_at(kernel: str) -> None:
    state = does(ready(kernel), "move", "d", **MOVE)
    for args in ({"fd": "closed"}, {"source": "new", "flags": 1}, {"source": "old"}):
        assert errnos(state, "move", "s", vm="old", **args) == {EIO}
    assert errnos(state, "command", "s", vm="old", id=999) == {EIO}
    assert errnos(state, "register_region", "s", vm="old") == {EIO}


def test_while_the_move_is_under_way_its_source_may_be_dead_or_alive_to_its_own_process() -> None:
    """A move makes its source dead last of all."""
    state = with_descriptor(does(ready(), "move", "d", **MOVE), "old", "d")
    for agent in ("s", "d"):
        assert errnos(state, "guest_status", agent, vm="old") == {EIO}
    dying = replace(state, dying=frozenset({"old"}))
    assert errnos(dying, "guest_status", "s", vm="old") == {EIO, ENOTTY}
    assert errnos(dying, "guest_status", "d", vm="old") == {EIO}  # which has not created it


def test_busy_is_certain_if_the_other_move_was_seen_to_be_stopped() -> None:
    state = does(ready(), "create", "d", vm="third", kind="plain", vcpus=1)
    other = op("move", "d", **MOVE)
    state = under_way(with_descriptor(state, "new", "d"), other)
    third: dict[str, Value] = {"vm": "third", "source": "old"}
    assert errnos(state, "move", "d", **third) == {0, EBUSY}
    assert errnos(state, "move", "d", vm="third", source="new") == {EBUSY, EINVAL}
    marked = replace(state, marked=frozenset({other.op}))
    assert errnos(marked, "move", "d", **third) == {EBUSY}
    assert errnos(marked, "move", "d", vm="third", source="new") == {EBUSY}
    assert errnos(marked, "move", "s", vm="old", source="old") == {EINVAL}  # itself, before the marks
    assert errnos(replace(state, marked=frozenset({999})), "move", "d", **third) == {0, EBUSY}


@pytest.mark.parametrize(("vm", "agent"), [("old", "s"), ("new", "d")])
def test_where_vcpus_are_created_under_the_lock_a_move_waits_for_it(vm: str, agent: str) -> None:
    creation = op("create_vcpu", agent, vm=vm, id=9)
    state = replace(under_way(ready("7.3.4"), creation), half=frozenset({creation.op}))
    assert errnos(state, "move", "d", **MOVE) == {0}


@KERNELS
@pytest.mark.parametrize(("vm", "agent"), [("old", "s"), ("new", "d")])
def test_busy_is_certain_if_half_a_vcpu_was_seen_to_be_stopped(kernel: str, vm: str, agent: str) -> None:
    creation = op("create_vcpu", agent, vm=vm, id=9)
    state = under_way(ready(kernel), creation)
    assert errnos(state, "move", "d", **MOVE) == {0, EBUSY}
    assert errnos(replace(state, half=frozenset({creation.op})), "move", "d", **MOVE) == {EBUSY}
    assert errnos(replace(state, half=frozenset({999})), "move", "d", **MOVE) == {0, EBUSY}


@pytest.mark.parametrize(
    ("kernel", "vm_type", "command", "expected"),
    [
        (OLD, 0, "init", {0}),
        (OLD, 0, "es-init", {0}),
        (OLD, 0, "init2", {EINVAL}),
        (NEW, 0, "init", {0}),
        (NEW, 0, "init2", {EINVAL}),
        (NEW, 2, "init", {EINVAL}),
        (NEW, 3, "es-init", {EINVAL}),
        (NEW, 3, "init2", {0}),
        (NEW, 2, "", {0}),  # what the type asks for
    ],
)
def test_each_init_is_for_vms_of_its_kind(kernel: str, vm_type: int, command: str, expected: set[int]) -> None:
    key = "sev_es" if vm_type == 3 or command == "es-init" else "sev"
    assert inits(bare(kernel, type=vm_type), key=key, command=command) == expected


@pytest.mark.parametrize(
    ("args", "of_sev", "of_es"),
    [
        ({}, {0}, {0}),
        ({"flags": 1}, {EINVAL}, {EINVAL}),
        ({"flags": 1 << 31}, {EINVAL}, {EINVAL}),
        ({"features": 1}, {EINVAL}, {EINVAL}),
        ({"features": 1 << 63}, {EINVAL}, {EINVAL}),
        ({"features": 1 << 5}, {EINVAL}, {0, EINVAL}),  # DEBUG_SWAP: the kernel may have it
        ({"features": 1 << 5 | 1 << 6}, {EINVAL}, {EINVAL}),
        ({"ghcb": 1}, {EINVAL}, {0}),
        ({"ghcb": 2}, {EINVAL}, {0}),
        ({"ghcb": 3}, {EINVAL}, {EINVAL}),
    ],
)
def test_arguments_of_init2(args: dict[str, Value], of_sev: set[int], of_es: set[int]) -> None:
    for vm_type, key, expected in ((2, "sev", of_sev), (3, "sev_es", of_es)):
        state = bare(type=vm_type)
        assert inits(state, key=key, command="init2", **args) == expected
        assert does(state, "init", "s", vm="old", key=key, command="init2").world.contexts  # a refusal leaves it usable


@KERNELS
def test_what_a_mirror_may_not_say(kernel: str) -> None:
    state = does(ready(kernel, vcpus=0), "mirror", "d", **MOVE)
    for number in (*range(4), *range(5, 16), *range(19, 104), 1 << 30):
        assert errnos(state, "command", "d", vm="new", id=number) == {EINVAL}
    for number in (4, 16, 17, 18):
        assert errnos(state, "command", "d", vm="new", id=number) > {0}
    assert errnos(state, "register_region", "d", vm="new") == {EINVAL}
    assert errnos(state, "unregister_region", "d", vm="new") == {EINVAL}
    moved = does(does(state, "create", "s", vm="third", kind="plain", vcpus=0), "send_fd", "d", vm="new", to="s")
    moved = does(moved, "move", "s", vm="third", source="new")
    assert errnos(moved, "command", "s", vm="third", id=2) == {EINVAL}  # a mirror it stays


def test_commands_of_others() -> None:
    state = bare()
    assert errnos(state, "command", "s", vm="old", id=2) == {ENOTTY}
    assert errnos(state, "command", "s", vm="old", id=13) == {EINVAL}
    assert errnos(state, "command", "s", vm="old", id=23) == errnos(state, "command", "s", vm="old", id=10) == {EINVAL}
    assert errnos(bare(OLD), "command", "s", vm="old", id=22) == {EINVAL}
    assert errnos(state, "register_region", "s", vm="old") == {ENOTTY}
    for number, key in ((0, "sev"), (1, "sev_es")):
        assert [c.key for c in does(state, "command", "s", vm="old", id=number).world.contexts] == [key]
    started = launched(host(), key="sev_es")
    assert 0 in errnos(started, "command", "s", vm="old", id=7)
    assert errnos(started, "unregister_region", "s", vm="old") == {EINVAL}


def test_regions_move_with_the_context() -> None:
    """They go by the address that they had in the process that registered them; where nobody recorded that, nobody can
    say whether a region of the destination's is one of them."""
    state = does(launched(host(NEW)), "create", "d", vm="new", kind="plain", vcpus=1)
    here: dict[str, Value] = {"vm": "old", "address": 0x1000}
    there: dict[str, Value] = {"vm": "new", "address": 0x2000}
    assert errnos(state, "unregister_region", "s", **here) == {EINVAL}
    for _ in range(2):
        state = does(state, "register_region", "s", **here)
    state = does(state, "unregister_region", "s", **here)
    assert errnos(state, "unregister_region", "s", **{**here, "address": 0x3000}) == {EINVAL}
    assert errnos(state, "register_region", "d", **there) == {ENOTTY}
    state = does(with_descriptor(state, "old", "d"), "move", "d", **MOVE)
    for f in ("register_region", "unregister_region"):
        assert errnos(state, f, "s", **here) == {EIO}
    assert errnos(state, "unregister_region", "d", **there) == {EINVAL}
    assert errnos(state, "unregister_region", "d", vm="new") == {0, EINVAL}
    state = does(state, "unregister_region", "d", vm="new", address=0x1000)
    assert errnos(state, "unregister_region", "d", vm="new", address=0x1000) == {EINVAL}
    assert errnos(does(state, "register_region", "d", **there), "unregister_region", "d", **there) == {0}


REFUSED_LATE = [
    OracleAnswer(EIO, firmware=True, open=True),
    OracleAnswer(ETIMEDOUT),
    OracleAnswer(EBUSY),
    OracleAnswer(EBADF),
]


@pytest.mark.parametrize("answer", [OK, *REFUSED_LATE], ids=str)
def test_a_launch_registers_its_memory_whatever_becomes_of_its_command(answer: OracleAnswer) -> None:
    started = launched(host(NEW))
    if answer.errno in (ETIMEDOUT, EBUSY):
        started = does(started, "psp_dies")
    if answer.errno == EBADF:
        started = replace(started, world=replace(started.world, cut_off=frozenset({"s"})))
    args: dict[str, Value] = {"vm": "old", "address": 0x1000}
    state = after(started, op("launch_update_data", "s", **args), answer)
    assert errnos(state, "unregister_region", "s", **args) == {0}


def test_memory_that_may_not_be_pinned_is_not_registered() -> None:
    limited = replace(launched(host(NEW)), memlock=frozenset({("s", 0)}))
    args: dict[str, Value] = {"vm": "old", "address": 0x1000}
    state = after(limited, op("launch_update_data", "s", **args), OracleAnswer(ENOMEM))
    assert errnos(state, "unregister_region", "s", **args) == {EINVAL}


def test_what_is_refused_for_want_of_the_vm_registers_nothing() -> None:
    args: dict[str, Value] = {"vm": "old", "address": 0x1000}
    state = after(launched(host(NEW)), op("launch_update_data", "d", **args), OracleAnswer(EBADF))
    assert errnos(state, "unregister_region", "s", **args) == {EINVAL}


def test_a_command_can_encrypt_registers() -> None:
    state = does(does(bare(), "init", "s", vm="old", key="sev_es"), "create_vcpu", "s", vm="old", id=5)
    state = does(does(state, "launch_start", "s", vm="old"), "create", "d", vm="new", kind="plain", vcpus=1)
    state = with_descriptor(state, "old", "d")
    assert errnos(state, "move", "d", **MOVE) == {EINVAL}
    sealed = does(state, "command", "s", vm="old", id=4)
    assert errnos(sealed, "move", "d", **MOVE) == {0}
    assert errnos(does(sealed, "create_vcpu", "s", vm="old", id=6), "move", "d", **MOVE) == {EINVAL}
