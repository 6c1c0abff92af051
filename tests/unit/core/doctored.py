# SPDX-License-Identifier: Apache-2.0
"""Histories that tell of a broken promise, or leave a witness out: what the checkers' tests share."""

from __future__ import annotations

import errno
from collections.abc import Callable

import msgspec

from chaos.history.records import Asked, Counted, Done, Exited, History, Invoke, Observation, Record, Stormed
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import ALL, Builder, changed, shipped

HELD, DEVIATED, UNKNOWN, SKIPPED = Outcome.KEPT, Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED
MOVE = "move-across-cgroups"
ES = "move-across-cgroups-es"
KILL_DESTINATION = "kill-destination-in-move"
KILL_SOURCE = "kill-source-in-move"
Change = Callable[[Record], Record | None]
RESTS_ON: dict[str, tuple[type[Record], ...]] = {
    "P1": (Observation,),
    "P2": (Observation,),
    "P3": (Asked, Stormed),
    "P4": (Done,),
    "P5": (Counted, Done),
    "P6": (Observation,),
    "P7": (Done,),
    "P8": (Exited, Done),
    "P9": (Observation,),
    "P10": (Observation, Done),
    "P11": (Observation,),
    "P13": (Done, Invoke),
    "P14": (Done, Invoke),
}
"""Of what a promise was kept or broken, by the records that a verdict points at; P12 rests on none."""


def check(promise: str, name: str, change: Change | None = None) -> Verdict:
    history = ALL[name]()
    return CHECKERS[promise](shipped(name), changed(history, change) if change else history)


def verdict_of(promise: str, history: History, name: str = MOVE) -> Verdict:
    """With the promise judged as of that experiment of the catalogue."""
    verdict = CHECKERS[promise](shipped(name), history)
    assert verdict.promise == promise
    assert set(verdict.records) <= {record.seq for record in history.records}
    assert verdict.records or verdict.outcome is not DEVIATED, "nothing shows what is broken"
    assert (
        verdict.signature
        if verdict.outcome is DEVIATED
        else (verdict.outcome is UNKNOWN or verdict.signature == "+".join(verdict.skips))
    )
    return verdict


def without(kind: type, **fields: object) -> Change:
    """Leave out the records of a kind whose fields have these values."""

    def change(record: Record) -> Record | None:
        matches = isinstance(record, kind) and all(getattr(record, k) == v for k, v in fields.items())
        return None if matches else record

    return change


def replaced(kind: type, where: dict[str, object], **values: object) -> Change:
    def change(record: Record) -> Record:
        if isinstance(record, kind) and all(getattr(record, k) == v for k, v in where.items()):
            return msgspec.structs.replace(record, **values)
        return record

    return change


def charge(label: str, cgroup: str, value: int, key: str = "sev") -> Change:
    """Another value of one counter in one observation."""

    def change(record: Record) -> Record:
        if not isinstance(record, Observation) or record.label != label:
            return record
        misc = msgspec.json.decode(msgspec.json.encode(record.misc))
        misc[cgroup]["current"][key] = value
        return msgspec.structs.replace(record, misc=misc)

    return change


def without_operation(f: str, vm: str, nth: int = 0) -> Change:
    """Leave out an operation on a VM, with its answer: the `nth` of its kind."""
    left: list[int] = []
    seen = [0]

    def change(record: Record) -> Record | None:
        if isinstance(record, Invoke) and record.f == f and record.args.get("vm") == vm:
            if seen[0] == nth:
                left.append(record.op)
            seen[0] += 1
        return None if isinstance(record, Invoke | Done) and record.op in left else record

    return change


def answered(f: str, vm: str, nth: int = 0, **values: object) -> Change:
    """Another answer to an operation on a VM: the `nth` of its kind."""
    ops: list[int] = []

    def change(record: Record) -> Record:
        if isinstance(record, Invoke) and record.f == f and record.args.get("vm", "") == vm:
            ops.append(record.op)
        if isinstance(record, Done) and len(ops) == nth + 1 and record.op == ops[nth]:
            return msgspec.structs.replace(record, **values)
        return record

    return change


def move_unanswered() -> Change:
    """The move was begun and nothing more happened before the end."""
    begun: list[int] = []

    def change(record: Record) -> Record | None:
        if isinstance(record, Invoke) and record.f == "move":
            begun.append(record.op)
        op = begun[0] if begun else -1
        after = getattr(record, "step", -1) > 6 or (isinstance(record, Invoke) and record.f in ("exit", "set_state"))
        if isinstance(record, Done | Exited) and getattr(record, "op", op) >= op > 0:
            return None
        return None if after or (isinstance(record, Observation) and record.label == "end") else record

    return change


def see(
    b: Builder,
    label: str,
    charges: dict[str, int] | None = None,
    *,
    limits: dict[str, int] | None = None,
    events: dict[str, int] | None = None,
    key: str = "sev",
) -> Observation:
    """An observation with misc.max and misc.events as well; events are those of the limits that were met."""
    seen = b.observe(label, charges, key=key)
    misc = {
        cgroup: {
            **files,
            "max": {key: limits[cgroup]} if limits and cgroup in limits else {},
            "events": {f"{k}.max": (events or {}).get(cgroup, 0) if k == key else 0 for k in ("sev", "sev_es")},
        }
        for cgroup, files in seen.misc.items()
    }
    b.records[-1] = msgspec.structs.replace(seen, misc=misc)
    return seen


def begun() -> Builder:
    b = Builder()
    b.begin()
    see(b, "limits")
    return b


def chain() -> Builder:
    """From a to b to c; c is in a's process."""
    b = Builder()
    b.begin()
    b.launch("a", "source", "sev")
    b.launch("b", "destination")
    b.launch("c", "source")
    b.count("a", "source", 10)
    b.status("a", "source")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="a", to="destination")
    b.move("a", "b", "destination")
    b.give_state("b", "destination")
    b.status("b", "destination")
    b.do("send_fd", "destination", vm="b", to="source")
    b.move("b", "c", "source")
    b.give_state("c", "source")
    b.observe("after", {"source": 1})
    b.status("c", "source")
    b.count("c", "source", 20)
    return b


def ready() -> Builder:
    """A guest that was counted, asked for its status and observed, and an empty VM to move it into."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    return b


def again(*, ask: bool = True) -> Builder:
    """A move that fails, and succeeds when it is tried again; between the two the destination owns nothing."""
    b = ready()
    b.move("old", "new", "destination", error=errno.EBUSY)
    b.observe("between", {"source": 1})
    if ask:
        b.status("new", "destination", error=errno.ENOTTY)
    b.move("old", "new", "destination")
    b.give_state("new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    b.count("new", "destination", 20)
    b.ask("old", "source", dead=True)
    return b


def failed(*, status_error: int = 0, ask: bool = True, count: bool = True, observe: bool = True) -> Builder:
    """A move that fails with EBUSY while both processes live."""
    b = ready()
    b.move("old", "new", "destination", error=errno.EBUSY)
    if observe:
        b.observe("after", {"source": 1})
    if count:
        b.count("old", "source", 20)
    if status_error >= 0:
        b.status("old", "source", error=status_error)
    if ask:
        b.ask("old", "source", dead=False)
    return b


def tried_again(b: Builder) -> Builder:
    """A mirror of old that is refused because new has a vCPU: that got past the migration flags of both."""
    b.do("mirror", "destination", error=errno.EINVAL, vm="new", source="old")
    return b
