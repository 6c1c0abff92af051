# SPDX-License-Identifier: Apache-2.0
"""The oracle: the contract's tables row by row, and the oracle against itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EBADF, EBUSY, EEXIST, EINVAL, EIO, ENOENT, ENOTTY, EPIPE, ETIMEDOUT
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos.history.records import Invoke, Value
from chaos.judge import oracle
from chaos.judge.oracle import OK, OracleAnswer, State, after, allowed, charges, events, under_way
from chaos.judge.oracle.programs import WIDTH, ProgramStep, run, violations

OLD, NEW = "6.1.192", "6.12.117"
_numbers = count(1)


def op(f: str, agent: str = "", **args: Value) -> Invoke:
    number = next(_numbers)
    return Invoke(t=number, op=number, f=f, agent=agent, pid=0, step=-1, args=args)


def errnos(state: State, f: str, agent: str, **args: Value) -> set[int]:
    return {answer.errno for answer in allowed(state, op(f, agent, **args))}


def does(state: State, f: str, agent: str = "", **args: Value) -> State:
    return after(state, op(f, agent, **args), OK)


def host(kernel: str = NEW, **capacity: int) -> State:
    """Process s in cgroup source, d in destination."""
    state = oracle.new(kernel, {"sev": capacity.get("sev", 4), "sev_es": capacity.get("sev_es", 3)})
    for cgroup in ("source", "destination", "destination/inner"):
        state = does(state, "add_cgroup", cgroup=cgroup)
    state = does(state, "spawn", "s", cgroup="source")
    return does(state, "spawn", "d", cgroup="destination/inner")


def launched(state: State, vm: str = "old", agent: str = "s", key: str = "sev", vcpus: int = 1) -> State:
    state = does(state, "create", agent, vm=vm, kind=key, vcpus=vcpus)
    state = does(state, "init", agent, vm=vm, key=key)
    state = does(state, "launch_start", agent, vm=vm)
    return does(state, "launch_update_vmsa", agent, vm=vm) if key == "sev_es" else state


def ready(kernel: str = NEW, *, key: str = "sev", vcpus: int = 1) -> State:
    """A guest at s, an empty VM at d, which has been sent the guest's descriptor for good."""
    state = does(launched(host(kernel), key=key), "create", "d", vm="new", kind="plain", vcpus=vcpus)
    return with_descriptor(state, "old", "d")


def with_descriptor(state: State, vm: str, agent: str) -> State:
    """The agent has the VM open as if it had opened it: nobody need wonder whether it still has."""
    from chaos.judge.ledger.world import Reference

    return replace(state, world=replace(state.world, references=state.world.references | {Reference(vm, agent)}))


MOVE: dict[str, Value] = {"vm": "new", "source": "old"}


@contextmanager
def impossible() -> Iterator[None]:
    with pytest.raises(ValueError, match="must not answer"):
        yield


# The move, step by step (part 1.2)


def test_a_move_moves_the_charge() -> None:
    state = ready()
    assert dict(charges(state)) == {(".", "sev"): 1, ("source", "sev"): 1}
    assert allowed(state, op("move", "d", **MOVE)) == {OK}
    state = does(state, "move", "d", **MOVE)
    levels = (".", "destination", "destination/inner")
    assert dict(charges(state)) == {(level, "sev"): 1 for level in levels}
    assert errnos(state, "guest_status", "s", vm="old") == {EIO}
    assert errnos(state, "create_vcpu", "s", vm="old") == {EIO}
    assert errnos(state, "guest_status", "d", vm="new") == {0, EIO}
    state = does(does(state, "exit", "s"), "kill", "d")
    assert not any(charges(state).values())
    assert state.world.contexts == frozenset()


@pytest.mark.parametrize(
    ("agent", "vm", "source", "expected"),
    [
        ("s", "new", "old", {EIO}),  # [0] another process's VM
        ("d", "none", "old", {EBADF}),  # there is no such VM
        ("d", "new", "none", {EBADF}),  # [1]
        ("d", "new", "new", {EINVAL}),  # [2] itself, though it is no encrypted VM
        ("d", "new", "bare", {EINVAL}),  # [6] the source has nothing
        ("d", "full", "old", {EINVAL}),  # [6] the destination has something
        ("d", "new", "old", {0}),
    ],
)
@pytest.mark.parametrize("kernel", [OLD, NEW])
def test_what_a_move_refuses(kernel: str, agent: str, vm: str, source: str, expected: set[int]) -> None:
    state = does(ready(kernel), "create", "d", vm="bare", kind="plain", vcpus=0)
    state = with_descriptor(launched(state, "full", "d"), "new", "s")
    assert errnos(state, "move", agent, vm=vm, source=source) == expected


def test_a_descriptor_that_was_sent_is_there_until_it_was_used_or_let_go() -> None:
    state = does(launched(host()), "create", "d", vm="new", kind="plain", vcpus=1)
    assert errnos(state, "move", "d", **MOVE) == {EBADF, 0}  # nobody recorded how it came there
    state = does(state, "connect", "s", vm="old", peer="new")
    there = does(state, "send_fd", "s", vm="old", to="d")
    assert errnos(there, "move", "d", **MOVE) == {0}
    assert errnos(does(there, "close", "s", vm="old"), "move", "d", **MOVE) == {0}
    for f in ("disconnect", "connect", "close"):
        gone = does(there, f, "d", vm="new", peer="old")
        again = gone if f != "close" else does(gone, "create", "d", vm="new", kind="plain", vcpus=1)
        assert errnos(again, "move", "d", **MOVE) == {EBADF, 0}
    taken = does(does(there, "receive_fd", "d", vm="new", source="old"), "disconnect", "d", vm="new")
    assert errnos(taken, "move", "d", **MOVE) == {0}
    full = does(there, "limit", cgroup="destination", key="sev", max=0)
    refused = after(full, op("move", "d", **MOVE), OracleAnswer(EBUSY, at="destination"))
    assert errnos(refused, "move", "d", **MOVE) == {EBADF, EBUSY}  # it is closed after the call, however that ends


def test_a_dead_vm_as_source_and_as_destination() -> None:
    state = does(does(ready(), "move", "d", **MOVE), "create", "s", vm="third", kind="plain", vcpus=1)
    assert errnos(state, "move", "s", vm="old", source="third") == {EIO}
    assert errnos(state, "move", "s", vm="third", source="old") == {EINVAL}
    state = with_descriptor(state, "new", "s")
    assert allowed(state, op("move", "s", vm="old", source="new")) == {OracleAnswer(EIO)}
    chained = does(state, "move", "s", vm="third", source="new")
    assert dict(charges(chained)) == {(".", "sev"): 1, ("source", "sev"): 1}


def test_types_differ_only_where_there_are_types() -> None:
    typed = op("create", "s", vm="typed", kind="plain", vcpus=1, type=2)
    assert allowed(launched(host(OLD)), typed) == {OracleAnswer(EINVAL)}
    state = after(launched(host(NEW)), typed, OK)
    assert errnos(state, "move", "s", vm="typed", source="old") == {EINVAL}


def test_another_operation_on_the_same_vms() -> None:
    state = does(ready(), "create", "s", vm="third", kind="plain", vcpus=1)
    first = op("move", "d", **MOVE)
    state = under_way(state, first)
    assert dict(charges(state))[".", "sev"] == 2  # the destination is charged before the source is not
    assert allowed(state, first) == {OK}
    assert errnos(state, "move", "s", vm="third", source="old") == {EBUSY, 0}
    assert errnos(state, "mirror", "s", vm="third", source="old") == {EBUSY, EINVAL}
    closed = does(state, "close", "s", vm="old")
    assert closed.world.context("old") is not None  # the call holds the file
    done = after(state, first, OK)
    assert dict(charges(done)) == {(lv, "sev"): 1 for lv in (".", "destination", "destination/inner")}


def test_a_move_under_way_pays_where_it_began() -> None:
    first = op("move", "d", **MOVE)
    state = does(under_way(ready(), first), "enter", "d", cgroup="source")
    state = does(state, "remove_cgroup", cgroup="destination/inner")
    state = after(state, first, OK)
    assert (charges(state)["destination", "sev"], charges(state)["source", "sev"]) == (1, 0)


@pytest.mark.parametrize("at", ["destination/inner", "destination", "."])
def test_a_limit_stops_a_move_and_counts_an_event(at: str) -> None:
    state = ready()
    state = does(state, "limit", cgroup=at, key="sev", max=1 if at == "." else 0)
    move = op("move", "d", **MOVE)
    assert allowed(state, move) == {OracleAnswer(EBUSY, at=at)}
    after_it = after(state, move, OracleAnswer(EBUSY, at=at))
    assert charges(after_it) == charges(state)
    hit = {"destination/inner": 3, "destination": 2, ".": 1}[at]
    assert sum(events(after_it).values()) == hit
    assert events(after_it)[at, "sev"] == events(after_it)[".", "sev"] == 1
    retried = does(after_it, "limit", cgroup=at, key="sev", max="max")
    assert allowed(retried, move) == {OK}
    assert events(retried) == events(after_it)


def test_a_limit_hides_a_wrong_number_of_vcpus() -> None:
    state = ready(key="sev_es", vcpus=2)
    assert errnos(state, "move", "d", **MOVE) == {EINVAL}  # [11]
    state = does(state, "limit", cgroup="destination", key="sev_es", max=0)
    assert errnos(state, "move", "d", **MOVE) == {EBUSY}  # [8]


def test_the_key_is_the_context_s() -> None:
    state = does(ready(key="sev_es"), "limit", cgroup="destination", key="sev", max=0)
    assert allowed(state, op("move", "d", **MOVE)) == {OK}


def test_within_a_cgroup_nothing_is_charged() -> None:
    state = does(launched(host()), "create", "s", vm="new", kind="plain", vcpus=1)
    state = does(state, "limit", cgroup="source", key="sev", max=0)
    assert allowed(state, op("move", "s", **MOVE)) == {OK}


def test_a_full_host_has_no_room_for_a_move() -> None:
    state = oracle.new(NEW, {"sev": 2, "sev_es": 0}, {"sev": 1})
    for cgroup in ("source", "destination"):
        state = does(state, "add_cgroup", cgroup=cgroup)
    state = does(does(state, "spawn", "s", cgroup="source"), "spawn", "d", cgroup="destination")
    state = does(launched(state), "create", "d", vm="new", kind="plain", vcpus=1)
    state = with_descriptor(state, "old", "d")
    # The host's own level counts no event of ours.
    assert allowed(state, op("move", "d", **MOVE)) == {
        OracleAnswer(EBUSY)
    }  # the host's own level counts no event of ours
    full = replace(state, foreign=frozenset({("sev", 0)}), capacity=frozenset({("sev", 1)}))
    assert allowed(full, op("move", "d", **MOVE)) == {OracleAnswer(EBUSY, at=".", full=True)}
    none = replace(state, capacity=frozenset())
    assert errnos(none, "move", "d", **MOVE) == {EINVAL}


def test_es_wants_sealed_registers() -> None:
    state = does(host(), "create", "s", vm="old", kind="sev_es", vcpus=1)
    state = does(state, "init", "s", vm="old", key="sev_es")
    state = does(state, "launch_start", "s", vm="old")
    state = with_descriptor(does(state, "create", "d", vm="new", kind="plain", vcpus=1), "old", "d")
    assert errnos(state, "move", "d", **MOVE) == {EINVAL}  # [12]
    sealed = does(state, "launch_update_vmsa", "s", vm="old")
    assert errnos(sealed, "move", "d", **MOVE) == {0}
    more = does(does(sealed, "create_vcpu", "s", vm="old"), "create_vcpu", "d", vm="new")
    assert errnos(more, "move", "d", **MOVE) == {EINVAL}


@pytest.mark.parametrize(
    ("kernel", "busy"), [("5.16.0", False), ("6.1.100", False), (OLD, True), (NEW, True), ("7.3.4", False)]
)
@pytest.mark.parametrize("vm", ["old", "new"])
@pytest.mark.parametrize("key", ["sev", "sev_es"])
def test_a_vcpu_half_made(kernel: str, busy: bool, vm: str, key: str) -> None:
    creating = op("create_vcpu", "s" if vm == "old" else "d", vm=vm)
    state = under_way(ready(kernel, key=key), creating)
    expected = {0} | ({EBUSY} if busy else set()) | ({EINVAL} if key == "sev_es" else set())
    assert errnos(state, "move", "d", **MOVE) == expected
    finished = after(state, creating, OK)
    assert errnos(finished, "move", "d", **MOVE) == ({0} if key == "sev" else {EINVAL})
    assert under_way(state, op("create_vcpu", "s", vm="none")) == state


# Mirrors (part 1.8)


def mirrored(kernel: str = NEW, key: str = "sev") -> State:
    state = does(launched(host(kernel), key=key), "create", "d", vm="mirror", kind="plain", vcpus=0)
    state = with_descriptor(state, "old", "d")
    return does(state, "mirror", "d", vm="mirror", source="old")


def test_what_a_mirror_refuses() -> None:
    state = does(ready(), "create", "d", vm="empty", kind="plain", vcpus=0)
    assert errnos(state, "mirror", "d", vm="empty", source="old") == {0}
    assert errnos(state, "mirror", "d", vm="new", source="old") == {EINVAL}  # has vCPUs
    assert errnos(state, "mirror", "d", vm="empty", source="empty") == {EINVAL}
    assert errnos(state, "mirror", "d", vm="empty", source="new") == {EINVAL}
    assert errnos(state, "mirror", "d", vm="empty", source="none") == {EBADF}
    creating = under_way(state, op("create_vcpu", "d", vm="empty"))
    assert errnos(creating, "mirror", "d", vm="empty", source="old") == {0, EINVAL}
    mirror = does(state, "mirror", "d", vm="empty", source="old")
    assert errnos(mirror, "mirror", "d", vm="empty", source="old") == {EINVAL}
    mirror = does(mirror, "create", "d", vm="second", kind="plain", vcpus=0)
    assert errnos(mirror, "mirror", "d", vm="second", source="empty") == {EINVAL}  # of a mirror


def test_a_mirror_pays_nothing_wherever_it_goes() -> None:
    state = mirrored()
    assert dict(charges(state)) == {(".", "sev"): 1, ("source", "sev"): 1}
    for cgroup in ("source", "destination"):
        state = does(state, "limit", cgroup=cgroup, key="sev", max=0)
    state = with_descriptor(does(state, "create", "s", vm="far", kind="plain", vcpus=0), "mirror", "s")
    assert allowed(state, op("move", "s", vm="far", source="mirror")) == {OK}
    moved = does(state, "move", "s", vm="far", source="mirror")
    assert charges(moved) == charges(state)
    assert errnos(moved, "guest_status", "d", vm="mirror") == {EIO}
    assert errnos(moved, "guest_status", "s", vm="far") == {0, EIO}


def test_a_mirror_may_do_little() -> None:
    state = mirrored(key="sev_es")
    for f in ("launch_start", "launch_update_data", "launch_measure", "launch_finish"):
        assert errnos(state, f, "d", vm="mirror") == {EINVAL}
    assert errnos(state, "init", "d", vm="mirror", key="sev") == {EINVAL}
    state = does(state, "create_vcpu", "d", vm="mirror")
    state = does(state, "create", "s", vm="far", kind="plain", vcpus=1)
    state = with_descriptor(state, "mirror", "s")
    assert errnos(state, "move", "s", vm="far", source="mirror") == {EINVAL}
    state = does(state, "launch_update_vmsa", "d", vm="mirror")
    assert errnos(state, "move", "s", vm="far", source="mirror") == {0}
    state = does(does(state, "create_vcpu", "d", vm="mirror"), "create", "s", vm="farther", kind="plain", vcpus=2)
    assert errnos(state, "move", "s", vm="farther", source="mirror") == {EINVAL}  # the new one's are not encrypted
    state = does(state, "launch_update_vmsa", "d", vm="mirror")
    assert errnos(state, "move", "s", vm="farther", source="mirror") == {0}


def test_what_charges_nothing_and_gives_up_nothing_changes_nothing() -> None:
    state = ready()
    for f in ("guest_status", "set_memory"):
        assert does(state, f, "s", vm="old") == state


def test_an_owner_with_mirrors_moves_from_5_18_on() -> None:
    for kernel, expected in (("5.16.20", {EBUSY}), ("5.18.0", {0}), (OLD, {0})):
        state = does(mirrored(kernel), "create", "d", vm="new", kind="plain", vcpus=0)
        assert errnos(state, "move", "d", **MOVE) == expected


# eventfds and memory slots


@pytest.mark.parametrize("kernel", [OLD, NEW, "6.16.9", "6.17.0"])
def test_an_eventfd_raises_interrupts_of_one_vm_only_from_6_17_on(kernel: str) -> None:
    """Before, it may too: a kernel may have got it without the number."""
    state, elsewhere = ready(kernel), {EBUSY} if kernel == "6.17.0" else {0, EBUSY}
    bind: dict[str, Value] = {"gsi": 48, "assign": True}
    state = does(state, "irqfd", "s", vm="old", **bind)
    assert errnos(state, "irqfd", "s", vm="old", **bind) == {EBUSY}
    assert errnos(state, "irqfd", "d", vm="new", **bind) == elsewhere
    assert errnos(state, "irqfd", "d", vm="new", gsi=49, assign=True) == {0}
    dead = does(state, "move", "d", **MOVE)
    for assign in (True, False):
        assert errnos(dead, "irqfd", "s", vm="old", gsi=48, assign=assign) == {EIO}
    assert errnos(dead, "irqfd", "d", vm="new", **bind) == elsewhere
    held = does(dead, "close", "s", vm="old")  # d has a descriptor of it
    assert errnos(held, "irqfd", "d", vm="new", **bind) == elsewhere
    gone = does(held, "close", "d", vm="old")
    assert errnos(gone, "irqfd", "d", vm="new", **bind) == {0}


def test_an_irqfd_that_was_taken_away_may_be_bound_anywhere() -> None:
    state = does(ready("7.3.4"), "irqfd", "s", vm="old", gsi=48, assign=True)
    state = does(state, "irqfd", "s", vm="old", gsi=48, assign=False)
    assert errnos(state, "irqfd", "d", vm="new", gsi=48, assign=True) == {0}
    assert errnos(state, "irqfd", "s", vm="old", gsi=48, assign=False) == {0}


def test_an_ioeventfd_is_there_once() -> None:
    state = ready()
    assert errnos(state, "ioeventfd", "s", vm="old", port=32, assign=False) == {ENOENT}
    state = does(state, "ioeventfd", "s", vm="old", port=32, assign=True)
    assert errnos(state, "ioeventfd", "s", vm="old", port=32, assign=True) == {EEXIST}
    assert errnos(state, "ioeventfd", "s", vm="old", port=33, assign=True) == {0}
    assert errnos(does(state, "move", "d", **MOVE), "ioeventfd", "s", vm="old", port=32, assign=False) == {EIO}
    freed = does(state, "ioeventfd", "s", vm="old", port=32, assign=False)
    assert errnos(freed, "ioeventfd", "s", vm="old", port=32, assign=False) == {ENOENT}
    gone = does(does(state, "close", "s", vm="old"), "close", "d", vm="old")
    again = launched(gone, "old", "s")
    assert errnos(again, "ioeventfd", "s", vm="old", port=32, assign=False) == {ENOENT}, "it went with its VM"


def test_whether_a_slot_behind_the_first_is_there_nobody_keeps_count_of() -> None:
    assert errnos(ready(), "set_memory", "s", vm="old", there=False, slot=2) == {0, EINVAL}
    assert errnos(ready(), "set_memory", "s", vm="old", there=False) == {0}
    assert errnos(ready(), "set_memory", "s", vm="old", there=True, slot=2) == {0}


# INIT and the launch (part 3.4)


@pytest.mark.parametrize(("kernel", "twice", "none"), [(OLD, EBUSY, {EBUSY}), (NEW, EINVAL, {EINVAL, ENOTTY})])
def test_init(kernel: str, twice: int, none: set[int]) -> None:
    state = does(host(kernel), "create", "s", vm="old", kind="sev", vcpus=1)
    empty = replace(state, capacity=frozenset({("sev", 0), ("sev_es", 0)}))
    assert errnos(empty, "init", "s", vm="old", key="sev") == none
    assert errnos(empty, "init", "s", vm="old", key="sev_es") == none | {ENOTTY}
    for f in ("launch_start", "launch_measure", "guest_status", "launch_update_vmsa"):
        assert errnos(state, f, "s", vm="old") == {ENOTTY}
    bare = does(state, "init", "s", vm="old", key="sev")
    assert errnos(bare, "init", "s", vm="old", key="sev") == {EINVAL}  # it has its vCPU
    without = does(does(state, "create", "s", vm="none", kind="sev", vcpus=0), "init", "s", vm="none", key="sev")
    assert errnos(without, "init", "s", vm="none", key="sev") == {twice}
    assert errnos(bare, "launch_measure", "s", vm="old") == {EBADF, EIO}
    half = under_way(without, op("create_vcpu", "s", vm="none"))
    assert errnos(half, "init", "s", vm="none", key="sev") == {EINVAL, twice}


def test_init_of_a_typed_vm() -> None:
    state = does(host(), "create", "s", vm="typed", kind="sev", vcpus=0, type=2)
    state = does(state, "init", "s", vm="typed", key="sev")
    assert errnos(state, "init", "s", vm="typed", key="sev") == {EINVAL}


def test_init_until_the_host_is_full() -> None:
    state = does(host(sev=2), "limit", cgroup="source", key="sev", max=1)
    state = does(launched(state), "create", "s", vm="second", kind="sev", vcpus=1)
    init = op("init", "s", vm="second", key="sev")
    assert allowed(state, init) == {OracleAnswer(EBUSY, at="source")}
    state = after(state, init, OracleAnswer(EBUSY, at="source"))
    assert dict(events(state)) == {("source", "sev"): 1, (".", "sev"): 1}
    state = does(launched(state, "third", "d"), "create", "d", vm="fourth", kind="sev", vcpus=1)
    assert allowed(state, op("init", "d", vm="fourth", key="sev")) == {OracleAnswer(EBUSY, at=".", full=True)}
    lowered = does(state, "limit", cgroup="destination", key="sev", max=0)
    assert charges(lowered)["destination", "sev"] == 1


@pytest.mark.parametrize(("limit", "full"), [(1, False), (2, True), (3, True)])
def test_a_limit_that_is_no_lower_than_what_the_host_has_is_not_what_is_in_the_way(limit: int, full: bool) -> None:
    state = does(host(sev=2), "limit", cgroup="source", key="sev", max=limit)
    for vm in ("first", "second")[: min(limit, 2)]:
        state = launched(state, vm)
    state = does(state, "create", "s", vm="next", kind="sev", vcpus=0)
    answer = OracleAnswer(EBUSY, at="source", full=full)
    assert allowed(state, op("init", "s", vm="next", key="sev")) == {answer}


def test_the_firmware_may_refuse_and_says_so() -> None:
    state = does(launched(host()), "create", "s", vm="next", kind="sev", vcpus=1)
    state = does(state, "init", "s", vm="next", key="sev")
    refused = OracleAnswer(EIO, firmware=True, open=True)
    assert allowed(state, op("launch_start", "s", vm="next")) == {OK, refused}
    # the ASID is its own
    assert allowed(state, op("launch_start", "s", vm="old")) == {OracleAnswer(EIO, firmware=True)}
    assert allowed(state, op("launch_finish", "s", vm="old")) == {OK, refused}


def test_a_firmware_that_stops_answering() -> None:
    state = does(launched(host()), "psp_dies")
    finish = op("launch_finish", "s", vm="old")
    assert allowed(state, finish) == {OracleAnswer(EBUSY), OracleAnswer(ETIMEDOUT)}
    dead = after(state, finish, OracleAnswer(ETIMEDOUT))
    assert allowed(dead, finish) == {OracleAnswer(EBUSY)}
    dead = does(dead, "create", "s", vm="next", kind="sev", vcpus=1)
    assert errnos(dead, "init", "s", vm="next", key="sev") == {0, EBUSY}
    moved = does(dead, "create", "s", vm="new", kind="plain", vcpus=1)
    assert errnos(moved, "move", "s", **MOVE) == {0}  # a move sends it nothing (P13)


@pytest.mark.parametrize(("kernel", "again", "creating"), [(OLD, {0, EIO}, {0, EIO}), (NEW, {EINVAL}, {EBUSY, EINVAL})])
def test_registers_are_sealed_once(kernel: str, again: set[int], creating: set[int]) -> None:
    state = launched(host(kernel), key="sev_es")
    assert errnos(state, "launch_update_vmsa", "s", vm="old") == again
    half = under_way(state, op("create_vcpu", "s", vm="old"))
    assert errnos(half, "launch_update_vmsa", "s", vm="old") == creating
    plain = launched(host(kernel))
    assert errnos(plain, "launch_update_vmsa", "s", vm="old") == {ENOTTY}


# Processes and cgroups


def test_processes_and_cgroups() -> None:
    state = host()
    assert errnos(state, "spawn", "x", cgroup="nowhere") == {ENOENT}
    assert allowed(state, op("spawn", "s", cgroup="source")) == frozenset()  # it lives
    assert allowed(state, op("spawn", "", cgroup="source")) == frozenset()
    assert allowed(state, op("create", "x", vm="v")) == frozenset()
    assert allowed(does(state, "create", "s", vm="v"), op("create", "s", vm="v")) == frozenset()
    assert errnos(state, "enter", "s", cgroup="nowhere") == {ENOENT}
    assert errnos(state, "add_cgroup", "", cgroup="source") == {EEXIST}
    assert errnos(state, "add_cgroup", "", cgroup="x/y") == {ENOENT}
    assert errnos(state, "remove_cgroup", "", cgroup="x") == {ENOENT}
    for used in (".", "source", "destination"):
        assert errnos(state, "remove_cgroup", "", cgroup=used) == {EBUSY}
    assert errnos(state, "limit", "", cgroup="x", key="sev", max=1) == {ENOENT}
    for wrong in (-1, "much", None):
        assert errnos(state, "limit", "", cgroup="source", key="sev", max=wrong) == {EINVAL}
    assert errnos(state, "limit", "", cgroup="source", key="tdx", max=1) == {EINVAL}
    state = does(state, "create", "s", vm="v", kind="plain", vcpus=1)
    assert errnos(state, "send_fd", "s", vm="v", to="x") == {EPIPE}
    assert errnos(state, "send_fd", "d", vm="v", to="s") == {EBADF}
    assert errnos(state, "close", "d", vm="v") == {EBADF}
    with pytest.raises(KeyError):
        allowed(state, op("dance", "s"))
    with impossible():
        after(state, op("close", "d", vm="v"), OK)


def test_a_task_that_goes_leaves_its_charges() -> None:
    state = does(launched(host()), "enter", "s", cgroup="destination")
    assert dict(charges(state)) == {(".", "sev"): 1, ("source", "sev"): 1}


def test_without_the_controller_below_it_a_cgroup_pays_for_all() -> None:
    state = does(launched(host(), "v", "d"), "limit", cgroup="destination/inner", key="sev", max=0)
    assert errnos(state, "disable_misc", "", cgroup=".") == {EBUSY}
    assert errnos(state, "enable_misc", "", cgroup="destination/inner") == {EBUSY}
    state = does(state, "disable_misc", cgroup="destination")
    assert errnos(state, "limit", "", cgroup="destination/inner", key="sev", max=0) == {ENOENT}
    assert (charges(state)["destination", "sev"], charges(state)["destination/inner", "sev"]) == (1, 0)
    state = launched(state, "w", "d")  # the limit went with the controller
    assert {context.payer for context in state.world.contexts} >= {"destination"}
    state = does(does(state, "enable_misc", cgroup="destination"), "enter", "d", cgroup="destination/inner")
    assert (charges(state)["destination", "sev"], charges(state)["destination/inner", "sev"]) == (2, 0)
    assert charges(does(does(state, "close", "d", vm="v"), "close", "d", vm="w"))[".", "sev"] == 0


def test_a_removed_cgroup_is_charged_on() -> None:
    state = does(launched(host(), "v", "d"), "enter", "d", cgroup="source")
    state = does(does(state, "remove_cgroup", cgroup="destination/inner"), "add_cgroup", cgroup="destination/inner")
    assert (charges(state)["destination", "sev"], charges(state)["destination/inner", "sev"]) == (1, 0)
    state = does(does(state, "remove_cgroup", cgroup="destination/inner"), "remove_cgroup", cgroup="destination")
    state = does(state, "add_cgroup", cgroup="destination")
    assert (charges(state)[".", "sev"], charges(state)["destination", "sev"]) == (1, 0)
    assert charges(does(state, "close", "d", vm="v"))[".", "sev"] == 0


# Versions


# The oracle against itself


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.sampled_from([OLD, NEW]), st.binary(min_size=50 * WIDTH, max_size=50 * WIDTH))
def test_programs_of_fifty_operations(kernel: str, program: bytes) -> None:
    for step in run(oracle.new(kernel, {"sev": 4, "sev_es": 3}, {"sev": 1}), program):
        assert list(violations(step)) == []
        assert all(value >= 0 for value in charges(step.state).values())
        assert step.answer is None or step.answer in allowed(step.before, step.operation)


def test_a_violation_is_found() -> None:
    state = ready()
    move = op("move", "d", **MOVE)
    good = after(state, move, OK)
    assert list(violations(ProgramStep(state, move, OK, good))) == []
    world = good.world
    twice = replace(good, world=replace(world, contexts=world.contexts | state.world.contexts))
    found = "; ".join(violations(ProgramStep(state, move, OK, twice)))
    assert "one of a dead VM" in found and "made or lost a context" in found
    assert "lives" in "; ".join(violations(ProgramStep(state, move, OK, state)))
    failed = OracleAnswer(EBUSY)
    assert "P6" in "; ".join(violations(ProgramStep(state, move, failed, good)))
    assert "P10" in "; ".join(violations(ProgramStep(state, move, OK, replace(good, capacity=frozenset()))))
    enter = op("enter", "s", cgroup="source")
    assert "P11" in "; ".join(violations(ProgramStep(state, enter, OK, good)))
    nobody = replace(good, world=replace(world, homes=frozenset()))
    assert "P9" in "; ".join(violations(ProgramStep(state, move, None, nobody)))
    orphan = replace(mirrored(), world=replace(mirrored().world, contexts=frozenset()))
    assert "without an owner" in "; ".join(violations(ProgramStep(state, enter, None, orphan)))


@pytest.mark.parametrize("others", [False, True])
def test_guest_status_of_a_guest_that_was_never_started_is_no_error_of_the_firmware(*, others: bool) -> None:
    """Kernels with finding 0001 do not get that far; those without it are told UNINIT. Other commands are refused."""
    state = launched(host(), "other") if others else host()
    state = does(state, "create", "s", vm="old", kind="sev", vcpus=1)
    state = does(state, "init", "s", vm="old", key="sev")
    assert {OK, OracleAnswer(EBADF)} <= allowed(state, op("guest_status", "s", vm="old"))
    assert OK not in allowed(state, op("launch_measure", "s", vm="old"))
