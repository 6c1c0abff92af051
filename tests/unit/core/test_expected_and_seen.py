# SPDX-License-Identifier: Apache-2.0
"""Each deviation says in a few words what was expected and what was seen, and points at the records that show it."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Asked, Counted, Done, History, Observation, Record, Value
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import ALL, Builder, changed, guest_moved, shipped, two_owners
from tests.unit.core.doctored import KILL_DESTINATION, MOVE, Change, answered, replaced

NOT_THE_OWNER = answered("guest_status", "new", outcome="fail", errno=errno.ENOTTY, value={})
REFUSED = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})


def dead(record: Record) -> Record:
    if not isinstance(record, Asked):
        return record
    return msgspec.structs.replace(
        record, answers=tuple(msgspec.structs.replace(answer, errno=errno.EIO) for answer in record.answers)
    )


def alive(record: Record) -> Record:
    if not isinstance(record, Asked):
        return record
    return msgspec.structs.replace(
        record, answers=tuple(msgspec.structs.replace(answer, errno=0) for answer in record.answers)
    )


def of(name: str, change: Change) -> History:
    return changed(ALL[name](), change)


def another_context() -> History:
    """A move into a VM that has a context, refused, after which it tells of the other one."""
    b = Builder()
    b.begin()
    for vm, agent, handle in (("old", "source", 1), ("full", "destination", 2)):
        b.launch(vm, agent, "sev")
        b.done(b.invoke("guest_status", agent, vm=vm), value={"handle": handle, "policy": 0, "state": 3})
    b.observe("before", {"source": 1, "destination": 1})
    b.move("old", "full", "destination", error=errno.EINVAL)
    b.observe("after", {"source": 1, "destination": 1})
    b.status("old", "source")
    b.status("full", "destination")
    return b.finish()


def counted_by_each(before: tuple[int, ...], after: tuple[int, ...]) -> Change:
    """Two vCPUs of the guest, before and after."""

    def change(record: Record) -> Record:
        if not isinstance(record, Counted):
            return record
        return msgspec.structs.replace(record, each=before if record.vm == "old" else after)

    return change


def paused_at_the_end(**said: Value) -> History:
    """The vCPUs are taken out once more after the move."""
    b = guest_moved()
    b.status("new", "destination")
    b.count("new", "destination", 120)
    b.done(b.invoke("pause", "destination", vm="new"), value=dict(said))
    return b.finish()


CASES: dict[str, tuple[str, History, str, str, str, set[type[Record]]]] = {
    "two": ("P4", two_owners(), "two-own", "0", "1", {Done}),
    "none": ("P4", of(MOVE, NOT_THE_OWNER), "none-owns", "1", "0", {Done}),
    "fewer": (
        "P4",
        of(MOVE, replaced(Observation, {"label": "after"}, guests=0)),
        "firmware-counts-fewer",
        "1",
        "0",
        {Observation},
    ),
    "more": (
        "P4",
        of(MOVE, replaced(Observation, {"label": "after"}, guests=2)),
        "firmware-counts-more",
        "1",
        "2",
        {Observation},
    ),
    "another": ("P4", another_context(), "another-context", "handle 2", "handle 1", {Done}),
    "refused": (
        "P5",
        of(MOVE, REFUSED),
        "guest_status-after-move:EBADF",
        "GUEST_STATUS: ok",
        "GUEST_STATUS: EBADF",
        {Done},
    ),
    "ended": (
        "P5",
        of(MOVE, replaced(Counted, {"vm": "new"}, ended="KVM_EXIT_SHUTDOWN")),
        "stopped-after-move:KVM_EXIT_SHUTDOWN",
        "a guest that runs",
        "KVM_EXIT_SHUTDOWN",
        {Counted},
    ),
    "stale": (
        "P5",
        of(MOVE, replaced(Counted, {"vm": "new"}, stale=3)),
        "stale-memory-after-move",
        "stale 0",
        "stale 3",
        {Counted},
    ),
    "stopped": (
        "P5",
        of(MOVE, replaced(Counted, {"vm": "new"}, ticks=99)),
        "counter-stopped-after-move",
        "more than 100 ticks",
        "99 ticks",
        {Counted},
    ),
    "one of two": (
        "P5",
        of(MOVE, counted_by_each((7, 9), (8, 9))),
        "counter-stopped-after-move",
        "more than 9 ticks",
        "9 ticks",
        {Counted},
    ),
    "registers": (
        "P5",
        of(MOVE, answered("set_state", "new", value={"vcpus": 1, "differs": ["vcpu 0: rip", "vcpu 0: fs base"]})),
        "state-differs-after-move:fs-base+rip",
        "as they were given",
        "fs base, rip",
        {Done},
    ),
    "no registers": (
        "P5",
        of(MOVE, answered("set_state", "new", outcome="fail", errno=errno.EINVAL, value={"call": "KVM_SET_SREGS"})),
        "state-refused-after-move:KVM_SET_SREGS:EINVAL",
        "ok",
        "EINVAL",
        {Done},
    ),
    "not entered": (
        "P5",
        of(MOVE, answered("run", "new", outcome="fail", errno=errno.EINVAL, value={"call": "KVM_RUN"})),
        "not-entered-after-move:KVM_RUN:EINVAL",
        "a guest that runs",
        "EINVAL",
        {Done},
    ),
    "astray": (
        "P5",
        paused_at_the_end(astray=[0]),
        "astray-after-move",
        "a guest that runs",
        "vCPUs [0] of new had left the guest's program",
        {Done},
    ),
    "torn": (
        "P5",
        paused_at_the_end(torn=[1]),
        "torn-after-move",
        "a guest that runs",
        "memory was not what the registers said of vCPUs [1] of new",
        {Done},
    ),
    "taken out": (
        "P5",
        paused_at_the_end(ended="KVM_EXIT_SHUTDOWN"),
        "stopped-after-move:KVM_EXIT_SHUTDOWN",
        "a guest that runs",
        "the guest at new had stopped by itself (KVM_EXIT_SHUTDOWN)",
        {Done},
    ),
    "answers": ("P3", of(MOVE, alive), "source-after-move:answered", "EIO", "58 ok", {Asked}),
    "dead": ("P3", of(KILL_DESTINATION, dead), "source-after-failed-move:dead", "no EIO", "31 EIO", {Asked}),
    "operation": (
        "P3",
        of(KILL_DESTINATION, answered("guest_status", "old", 1, outcome="fail", errno=errno.EIO, value={})),
        "source-after-failed-move:dead:guest_status",
        "no EIO",
        "EIO",
        {Done},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_deviation_says_what_was_expected_and_seen(case: str) -> None:
    promise, history, signature, expected, seen, kinds = CASES[case]
    verdict = CHECKERS[promise](shipped(MOVE), history)
    assert verdict.outcome is Outcome.BROKEN
    assert (verdict.signature, verdict.expected, verdict.seen) == (signature, expected, seen)
    by_seq = {record.seq: record for record in history.records}
    assert {type(by_seq[number]) for number in verdict.records} >= kinds
