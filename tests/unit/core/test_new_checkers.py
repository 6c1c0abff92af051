# SPDX-License-Identifier: Apache-2.0
"""P2, P7, P8, P10, P11, P13 and the instant of death: each holds, deviates on a doctored history, and is unknown
without its witness."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO, ENOTTY, ETIMEDOUT

import msgspec
import pytest

from chaos.checkers import CHECKERS
from chaos.checkers.storm import Call, instant_of_death
from chaos.history import Firmware, Header, History, Invoke, Observation, Record
from chaos.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, changed, moved, shipped, source_killed

HELD, DEVIATED, UNKNOWN = Outcome.HELD, Outcome.DEVIATED, Outcome.UNKNOWN
EXPERIMENT = shipped("move-across-cgroups")


def check(promise: str, history: History) -> Verdict:
    verdict = CHECKERS[promise](EXPERIMENT, history)
    assert verdict.promise == promise
    assert set(verdict.records) <= {record.seq for record in history.records}
    assert bool(verdict.signature) == (verdict.outcome is DEVIATED)
    return verdict


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


# P2


def mirrored(*, charged: int = 0) -> Builder:
    b = begun()
    b.launch("owner", "source", "sev")
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="other")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", vm="mirror", source="owner")
    b.observe("mirrored", {"source": 1, "destination": charged}, guests=1)
    return b


def moved_mirror(*, charged: int = 0, look: bool = True) -> Builder:
    b = mirrored()
    b.launch("new", "source")
    b.do("send_fd", "destination", vm="mirror", to="source")
    b.move("mirror", "new", "source")
    if look:
        b.observe("moved", {"source": 1 + charged}, guests=1)
    return b


def test_p2() -> None:
    assert check("P2", mirrored().finish()).outcome is HELD
    assert check("P2", moved_mirror().finish()).outcome is HELD
    assert check("P2", moved()).outcome is UNKNOWN
    verdict = check("P2", mirrored(charged=1).finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "mirror-is-charged:sev")
    verdict = check("P2", moved_mirror(charged=1).finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "moved-mirror-is-charged:sev")
    assert verdict.seen == ". sev 2; source sev 2"


def test_p2_without_its_witness() -> None:
    assert "not read while it lived on" in check("P2", moved_mirror(look=False).finish()).reason

    def unread(record: Record) -> Record | None:
        return None if isinstance(record, Observation) and record.label == "mirrored" else record

    verdict = check("P2", changed(mirrored().finish(), unread))
    assert (verdict.outcome, verdict.reason) == (UNKNOWN, "the counters were not read while a mirror lived")
    b = mirrored()
    b.do("mirror", "destination", vm="mirror", source="owner")
    assert "cannot be told" in check("P2", b.finish()).reason


# P7


def refused(*, error: int, source: str = "old", kernel: str = "6.12.117", f: str = "move") -> History:
    b = Builder(kernel=kernel)
    b.begin()
    see(b, "limits")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm=source, to="destination")
    see(b, "before", {"source": 1})
    b.do(f, "destination", vm="new", source=source, error=error)
    return b.finish()


def test_p7() -> None:
    held = check("P7", refused(error=EINVAL, f="mirror"))  # the target has vCPUs
    assert (held.outcome, held.reason) == (HELD, "refusals as documented: mirror of new from old: EINVAL")
    verdict = check("P7", refused(error=EBUSY))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "move:EBUSY-for-EBADF-or-ok")
    assert check("P7", refused(error=EINVAL, f="mirror", kernel="6.1.192")).outcome is HELD
    verdict = check("P7", refused(error=0, f="mirror"))
    assert (verdict.outcome, verdict.seen) == (DEVIATED, "ok")
    assert check("P7", refused(error=0)).outcome is UNKNOWN  # nothing was refused


@pytest.mark.parametrize(("kernel", "right", "wrong"), [("6.1.192", EBUSY, EINVAL), ("6.12.117", EINVAL, EBUSY)])
def test_p7_init_twice(kernel: str, right: int, wrong: int) -> None:
    for error, outcome in ((right, HELD), (wrong, DEVIATED)):
        b = Builder(kernel=kernel)
        b.begin()
        see(b, "limits")
        b.do("create", "source", vm="old", kind="sev", vcpus=0, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        b.do("init", "source", vm="old", key="sev", error=error)
        assert check("P7", b.finish()).outcome is outcome


def test_p7_many_refusals_and_a_message_that_did_not_come() -> None:
    b = begun()
    b.launch("old", "source")
    for _ in range(5):
        b.do("launch_start", "source", vm="old", error=ENOTTY)
    b.done(b.invoke("move", "destination", vm="new", source="old"), "fail", error=EIO, value={"call": "the other end"})
    verdict = check("P7", b.finish())
    assert verdict.outcome is HELD and verdict.reason.endswith("and 2 more")


def test_p7_the_firmware_s_own_refusals() -> None:
    for firmware, outcome in ((23, HELD), (0, DEVIATED)):
        b = begun()
        b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        b.do("launch_start", "source", vm="old", error=EIO, firmware=firmware)
        verdict = check("P7", b.finish())
        assert verdict.outcome is outcome
    assert verdict.signature == "launch_start:EIO-for-EIO-of-the-firmware-or-ok"
    for told in (True, False):
        b = begun()
        b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        if told:
            b.kernel("ccp 0000:01:00.0: sev command 0x30 timed out, disabling PSP")
        b.do("launch_start", "source", vm="old", error=ETIMEDOUT)
        assert check("P7", b.finish()).outcome is (HELD if told else DEVIATED)


def test_p7_without_its_witness() -> None:
    history = refused(error=EBUSY)

    def no_limits(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        misc = {cgroup: {"current": files["current"]} for cgroup, files in record.misc.items()}
        return msgspec.structs.replace(record, misc=misc)

    verdict = check("P7", changed(history, no_limits))
    assert verdict.outcome is UNKNOWN and "the limits were not read" in verdict.reason

    def no_kernel(record: Record) -> Record:
        return msgspec.structs.replace(record, kernel="mine") if isinstance(record, Header) else record

    for promise in ("P7", "P10"):
        assert "is no version" in check(promise, changed(history, no_kernel)).reason
        assert "on which kernel" in check(promise, History(())).reason
    b = begun()
    b.do("create", "source", vm="second", kind="mirror", vcpus=0, memory="guest")
    b.do("mirror", "source", vm="second", source="none")
    b.do("mirror", "source", vm="second", source="none", error=EINVAL)
    assert "succeeded at record" in check("P7", b.finish()).reason


# P8


def test_p8() -> None:
    assert check("P8", moved()).outcome is HELD
    verdict = check("P8", source_killed())
    assert verdict.outcome is HELD and "1 of them after a hold" in verdict.reason


def hung(*, fault: bool = False, exits: bool = False, status: int = -9, complete: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    if fault:
        b.kill_begins("destination")
    if exits:
        b.exited("destination", status)
        b.done(invoke, "info")
    return b.end(complete=complete)


def test_p8_what_never_ends() -> None:
    verdict = check("P8", hung())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "never-ended:move")
    assert check("P8", hung(exits=True)).signature == "never-ended:move"  # it had to be cleared away
    assert check("P8", hung(fault=True)).signature == "signal-did-not-end:move"
    assert check("P8", hung(fault=True, exits=True)).outcome is HELD
    assert check("P8", hung(exits=True, status=1)).outcome is HELD
    verdict = check("P8", hung(complete=False))
    assert verdict.outcome is UNKNOWN and "cut short" in verdict.reason
    assert check("P8", begun().finish()).outcome is UNKNOWN


# P10


def limited(*, error: int = EBUSY, counted: int = 1, above: int = 1, again: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 1}, limits={"destination": 0})
    b.move("old", "new", "destination", error=error)
    if again:
        where = "source" if error else "destination"
        events = {"destination": counted, ".": above}
        see(b, "after", {where: 1}, limits={"destination": 0}, events=events)
    return b.end()


def test_p10() -> None:
    verdict = check("P10", limited())
    assert verdict.outcome is HELD, verdict.reason
    assert "the limit of destination stopped move of new" in verdict.reason
    assert check("P10", limited(counted=0)).signature == "event-missing:sev"
    assert check("P10", limited(above=3)).signature == "event-unexplained:sev"
    verdict = check("P10", limited(error=0, counted=0, above=0))
    assert verdict.signature == "over-limit:move"


def test_p10_without_its_witness() -> None:
    assert check("P10", moved()).outcome is UNKNOWN
    verdict = check("P10", limited(again=False))
    assert verdict.outcome is UNKNOWN and "were not read" in verdict.reason

    def no_events(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        misc = {
            cgroup: {file: values for file, values in files.items() if file != "events"}
            for cgroup, files in record.misc.items()
        }
        return msgspec.structs.replace(record, misc=misc)

    verdict = check("P10", changed(limited(), no_events))
    assert verdict.outcome is UNKNOWN and "events of destination were not read" in verdict.reason

    def no_limits(record: Record) -> Record:
        return msgspec.structs.replace(record, misc={}) if isinstance(record, Observation) else record

    assert "limits were not read" in check("P10", changed(limited(), no_limits)).reason


# P11


def went(charges: dict[str, int], *, look: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    if look:
        b.observe("went", charges, guests=1)
    return b.finish()


def test_p11() -> None:
    assert check("P11", went({"source": 1, "elsewhere": 0})).outcome is HELD
    verdict = check("P11", went({"source": 0, "elsewhere": 1}))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "charge-followed-task:sev")
    assert check("P11", went({"source": 2, "elsewhere": 0})).outcome is UNKNOWN
    assert check("P11", went({}, look=False)).outcome is UNKNOWN
    assert check("P11", moved()).outcome is UNKNOWN
    b = begun()
    b.do("enter", "source", cgroup="elsewhere")
    b.do("init", "source", vm="none", key="sev")
    assert "cannot be told" in check("P11", b.finish()).reason


# P13


def watched(
    *, in_move: str = "", twice: bool = False, ends: bool = True, gap: int = 0, look: bool = False, before: bool = True
) -> History:
    b = begun()
    order = 0

    def sent(command: str, handle: int | None = None, status: int = 0, move: Invoke | None = None) -> None:
        nonlocal order
        op = None if move is None else move.op
        b.add(Firmware(t=b.tick(), order=order, command=command, status=status, handle=handle, move=op))
        order += 1

    b.launch("old", "source", "sev")
    if before:
        sent("LAUNCH_START", 1)
    b.launch("new", "destination")
    order += gap
    invoke = b.invoke("move", "destination", vm="new", source="old")
    if look:
        b.observe("in", {"source": 1})
    if in_move:
        sent(in_move, 1 if in_move != "PLATFORM_STATUS" else None, move=invoke)
    b.done(invoke)
    sent("PLATFORM_STATUS")
    for agent in ("source", "destination"):
        b.exit(agent)
    for again in range(int(ends) + int(twice)):
        sent("DECOMMISSION", 1, status=16 if again else 0)
    sent("PLATFORM_STATUS")
    return b.finish()


def test_p13() -> None:
    verdict = check("P13", watched())
    assert verdict.outcome is HELD and "1 contexts were decommissioned" in verdict.reason
    assert check("P13", watched(in_move="DEACTIVATE")).signature == "sent-in-move:DEACTIVATE"
    assert check("P13", watched(in_move="PLATFORM_STATUS", look=True)).outcome is HELD
    assert check("P13", watched(in_move="PLATFORM_STATUS")).outcome is DEVIATED
    assert check("P13", watched(twice=True)).signature == "decommissioned-twice"
    assert check("P13", watched(ends=False)).signature == "never-decommissioned"


def test_p13_without_its_witness() -> None:
    assert check("P13", moved()).reason == "nobody watched what the firmware was sent"
    assert "missing between" in check("P13", watched(gap=1)).reason
    assert "before it" in check("P13", watched(before=False, ends=False)).reason
    b = begun()
    b.add(Firmware(t=b.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    assert "no move was tried" in check("P13", b.end()).reason
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.add(Firmware(t=b.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    invoke = b.invoke("move", "destination", vm="new", source="old")
    assert "nobody can say" in check("P13", b.end()).reason
    b.records.pop()
    b.status("old", "source")
    b.add(Firmware(t=b.tick(), order=1, command="GUEST_STATUS", status=0, handle=1, move=invoke.op))
    b.done(invoke)
    verdict = check("P13", b.end())
    assert verdict.outcome is UNKNOWN and "perhaps by guest_status" in verdict.reason


# The instant of death


MOVE = Call(100, 200, 0)


def storm(death: int = 150, count: int = 5000) -> list[Call]:
    """Calls of 3 ns, one a nanosecond; each looks in its middle."""
    calls = [Call(at, at + 3, EIO if at + 1 >= death else 0) for at in range(death - count // 2, death + count // 2)]
    return calls[::2] + calls[1::2]


def test_a_storm_with_one_instant_of_death() -> None:
    death = instant_of_death(storm(), MOVE)
    assert death.one_instant
    assert (death.answered, death.refused) == (2499, 2501)
    assert (death.after, death.before) == (148, 152)


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (Call(160, 163, 0), ["answered-after-eio"]),
        (Call(210, 213, EINVAL), ["answered-after-eio", "answered-after-move"]),
        (Call(90, 99, EIO), ["answered-after-eio", "eio-before-move"]),
        (Call(90, 300, EIO), []),
        (Call(90, 300, 0), []),
    ],
)
def test_a_doctored_storm(call: Call, kinds: list[str]) -> None:
    death = instant_of_death([*storm(), call], MOVE)
    assert [found.kind for found in death.contradictions] == kinds
    assert all(call in (found.first, found.second) for found in death.contradictions)


def test_a_move_that_failed_kills_nobody() -> None:
    failed = MOVE._replace(errno=EBUSY)
    assert instant_of_death([Call(at, at + 3, 0) for at in range(300)], failed).one_instant
    assert [c.kind for c in instant_of_death(storm(), failed).contradictions] == ["eio-after-failed-move"]
    assert instant_of_death([], MOVE).one_instant


def test_p3_of_a_source_that_dies_before_its_move() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("get_state", "source", vm="old", error=EIO)
    b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    assert check("P3", b.finish()).signature == "source-in-move:eio-before-move"
