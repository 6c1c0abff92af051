# SPDX-License-Identifier: Apache-2.0
"""P10: limits that did not stop a charge, and events that were not counted."""

from __future__ import annotations

from errno import EBUSY, EINVAL

import msgspec
import pytest

from chaos.history.records import History, Invoke, Observation, Record
from chaos.judge import against_oracle
from chaos.judge.evidence import RunEvidence
from tests.unit.core.build import Builder, changed, moved
from tests.unit.core.doctored import HELD, UNKNOWN, begun, see, verdict_of


def limited(*, error: int = EBUSY, counted: int = 1, above: int = 1, again: bool = True, killed: str = "") -> History:
    """A move into a full cgroup, and perhaps an INIT there that was killed, at that moment: nobody can say what came of
    it."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")

    def perhaps_killed(now: str) -> None:
        if killed == now:
            b.done(b.invoke("init", "destination", vm="other", key="sev"), "info")

    perhaps_killed("before")
    see(b, "before", {"source": 1}, limits={"destination": 0})
    b.move("old", "new", "destination", error=error)
    perhaps_killed("meanwhile")
    if again:
        where = "source" if error else "destination"
        events = {"destination": counted, ".": above}
        see(b, "after", {where: 1}, limits={"destination": 0}, events=events)
    perhaps_killed("after")
    return b.end()


def test_p10() -> None:
    verdict = verdict_of("P10", limited())
    assert verdict.outcome is HELD, verdict.reason
    assert "the limit of destination stopped move of new" in verdict.reason
    verdict = verdict_of("P10", limited(counted=0))
    assert (verdict.signature, verdict.expected, verdict.seen) == ("event-missing:sev", "1", "0")
    verdict = verdict_of("P10", limited(above=3))
    assert (verdict.signature, verdict.expected, verdict.seen) == ("event-unexplained:sev", "1", "3")
    verdict = verdict_of("P10", limited(error=0, counted=0, above=0))
    assert (verdict.signature, verdict.expected, verdict.seen) == ("over-limit:move:sev", "EBUSY", "ok")


def init_over_the_limit(key: str, *, error: int = EBUSY) -> History:
    """An INIT in a cgroup that is full of this key."""
    b = begun()
    b.do("create", "source", vm="old", kind=key, vcpus=1, memory="guest")
    see(b, "before", limits={"source": 0}, key=key)
    b.do("init", "source", vm="old", key=key, error=error)
    charges, events = ({}, {"source": 1, ".": 1}) if error else ({"source": 1}, {})
    see(b, "after", charges, limits={"source": 0}, events=events, key=key)
    return b.end()


def other_key(record: Record) -> Record:
    """What was counted was counted under the other key."""
    if not isinstance(record, Observation):
        return record
    now = {"sev.max": "sev_es.max", "sev_es.max": "sev.max"}
    events = {c: files.get("events", {}) for c, files in record.misc.items()}
    misc = {c: {**files, "events": {now[k]: n for k, n in events[c].items()}} for c, files in record.misc.items()}
    return msgspec.structs.replace(record, misc=misc)


@pytest.mark.parametrize(("key", "other"), [("sev", "sev_es"), ("sev_es", "sev")])
def test_p10_of_an_init_goes_by_its_key(key: str, other: str) -> None:
    refused = init_over_the_limit(key)
    assert verdict_of("P10", refused).outcome is HELD
    verdict = verdict_of("P10", changed(refused, other_key))
    assert verdict.signature == f"event-missing:{key}+event-unexplained:{other}"
    assert verdict_of("P10", init_over_the_limit(key, error=0)).signature == f"over-limit:init:{key}"


@pytest.mark.parametrize(
    ("destination", "root", "signature"),
    [(1, 0, ""), (0, 0, "event-missing-local:sev"), (0, 1, "event-missing-local:sev+event-unexplained-local:sev")],
)
def test_p10_an_event_is_local_where_the_limit_is(destination: int, root: int, signature: str) -> None:
    local = {"destination": destination, ".": root}

    def change(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        after = record.label == "after"
        misc = {
            cgroup: {**files, "events.local": {"sev.max": local.get(cgroup, 0) if after else 0, "sev_es.max": 0}}
            for cgroup, files in record.misc.items()
        }
        return msgspec.structs.replace(record, misc=misc)

    assert verdict_of("P10", changed(limited(), change)).signature == signature


def test_p10_an_operation_that_was_killed_excuses_more_events_and_not_fewer() -> None:
    assert verdict_of("P10", limited(killed="meanwhile")).outcome is HELD
    assert verdict_of("P10", limited(killed="meanwhile", counted=0)).signature == "event-missing:sev"
    history = limited(killed="meanwhile", counted=2)
    verdict = verdict_of("P10", history)
    assert verdict.outcome is UNKNOWN and "nobody can say what was refused meanwhile" in verdict.reason
    seen = [record for record in history.records if isinstance(record, Observation) and record.seq in verdict.records]
    assert [record.label for record in seen] == ["before", "after"]


@pytest.mark.parametrize("killed", ["before", "after"])
def test_p10_an_operation_that_was_killed_at_another_time_excuses_no_events(killed: str) -> None:
    assert verdict_of("P10", limited(killed=killed)).outcome is HELD
    assert verdict_of("P10", limited(killed=killed, counted=2)).signature == "event-unexplained:sev"


def test_p10_a_refusal_counts_nowhere_but_at_the_limit_and_above_it() -> None:
    assert verdict_of("P10", at_the_top({".": 1})).outcome is HELD
    for below in ("destination", "source"):
        assert verdict_of("P10", at_the_top({".": 1, below: 1})).signature == "event-unexplained:sev"


def test_p10_where_nobody_can_say_whose_limit_it_was_either_may_have_counted_it() -> None:
    for counted in (0, 1):
        assert verdict_of("P10", at_the_top({".": 1, "destination": counted}, before="destination")).outcome is HELD
    verdict = verdict_of("P10", at_the_top({".": 1, "destination": 2}, before="destination"))
    assert (verdict.signature, verdict.expected, verdict.seen) == ("event-unexplained:sev", "0 to 1", "2")
    assert verdict_of("P10", at_the_top({}, before="destination")).signature == "event-missing:sev"


def at_the_top(events: dict[str, int], *, before: str = ".") -> History:
    """A move is refused, where the limit was at `before` at first and is at the top when it is read again."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 1}, limits={before: int(before == ".")})
    b.move("old", "new", "destination", error=EBUSY)
    see(b, "after", {"source": 1}, limits={".": 1}, events=events)
    return b.end()


def test_p10_a_refusal_during_an_observation_may_be_counted_by_it_or_by_the_next() -> None:
    def history(during: int, after: int) -> History:
        b = begun()
        b.launch("old", "source", "sev")
        b.launch("new", "destination")
        b.do("send_fd", "source", vm="old", to="destination")
        see(b, "before", {"source": 1}, limits={"destination": 0})
        move = b.invoke("move", "destination", vm="new", source="old")
        see(b, "during", {"source": 1}, limits={"destination": 0}, events={"destination": during, ".": during})
        b.done(move, "fail", error=EBUSY)
        see(b, "after", {"source": 1}, limits={"destination": 0}, events={"destination": after, ".": after})
        return b.end()

    for during in (0, 1):
        assert verdict_of("P10", history(during, 1)).outcome is HELD
    assert verdict_of("P10", history(2, 2)).signature == verdict_of("P10", history(0, 2)).signature
    assert verdict_of("P10", history(0, 2)).signature == "event-unexplained:sev"


def test_p10_once_nobody_can_say_what_is_charged_events_are_neither_due_nor_too_many() -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="none", key="sev")
    see(b, "before")
    b.do("init", "source", vm="old", key="sev", error=EBUSY)
    see(b, "after", events={".": 1})
    verdict = verdict_of("P10", b.end())
    assert verdict.outcome is UNKNOWN
    assert "init of old: init of none succeeded" in verdict.reason
    assert "and nobody can say what was refused meanwhile" in verdict.reason


def test_p10_without_its_witness() -> None:
    assert verdict_of("P10", moved()).outcome is UNKNOWN
    verdict = verdict_of("P10", limited(again=False))
    assert verdict.outcome is UNKNOWN and "were not read" in verdict.reason

    def no_events(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        misc = {
            cgroup: {file: values for file, values in files.items() if file != "events"}
            for cgroup, files in record.misc.items()
        }
        return msgspec.structs.replace(record, misc=misc)

    verdict = verdict_of("P10", changed(limited(), no_events))
    assert verdict.outcome is UNKNOWN and "events of destination were not read" in verdict.reason

    def no_limits(record: Record) -> Record:
        return msgspec.structs.replace(record, misc={}) if isinstance(record, Observation) else record

    assert "limits were not read" in verdict_of("P10", changed(limited(), no_limits)).reason


def lowered(*, error: int = EBUSY, undone: bool = False, recorded: bool = True) -> History:
    """The destination's limit is set to 0 in the middle, which nobody reads, and perhaps taken back in time."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 1})
    for number in (0, "max") if undone else (0,):
        if recorded:
            b.do("limit", "", cgroup="destination", key="sev", max=number)
    b.move("old", "new", "destination", error=error)
    limits = {} if undone else {"destination": 0}
    events = {"destination": 1, ".": 1} if error else {}
    see(b, "after", {"source" if error else "destination": 1}, limits=limits, events=events)
    return b.end()


def test_a_limit_counts_from_the_moment_it_was_set() -> None:
    assert verdict_of("P10", lowered()).outcome is HELD
    assert verdict_of("P10", lowered(error=0)).signature == "over-limit:move:sev"
    assert verdict_of("P7", lowered(undone=True)).signature == "move:EBUSY-for-ok"
    # A change that nobody recorded may have come before the move or after it.
    for error in (0, EBUSY):
        assert not verdict_of("P10", lowered(error=error, recorded=False)).signature


def full(*, error: int) -> History:
    """The destination has 7 of 8 ASIDs when the move comes."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    for number in range(7):
        b.launch(f"other-{number}", "destination", "sev")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 1, "destination": 7})
    b.move("old", "new", "destination", error=error)
    see(b, "after", {"source": 1, "destination": 7}, events={".": 1})
    return b.end()


def test_capacity_is_told_from_a_limit() -> None:
    verdict = verdict_of("P10", full(error=EBUSY))
    assert verdict.outcome is HELD, verdict.reason
    assert "the host's capacity, taken below '.', stopped move of new" in verdict.reason
    assert verdict_of("P10", full(error=EINVAL)).outcome is not HELD


def test_events_of_a_cgroup_that_was_made_anew_are_not_compared() -> None:
    def history(*, made_anew: bool) -> History:
        b = Builder()
        b.begin()
        b.launch("old", "source", "sev")
        see(b, "before", {"source": 1}, limits={"destination": 0}, events={"destination": 3, ".": 3})
        if made_anew:
            for f in ("remove_cgroup", "add_cgroup"):
                b.do(f, "", cgroup="destination")
        see(b, "after", {"source": 1}, limits={} if made_anew else {"destination": 0}, events={".": 3})
        return b.end()

    assert verdict_of("P10", history(made_anew=True)).outcome is UNKNOWN
    assert verdict_of("P10", history(made_anew=False)).signature.startswith("event-missing:sev")


@pytest.mark.parametrize(
    ("f", "cgroup", "left"),
    [
        ("disable_misc", "a", {("a", "sev", 2)}),
        ("enable_misc", "a", {("a", "sev", 2)}),
        ("remove_cgroup", "a/b", {("a", "sev", 2)}),
        ("add_cgroup", "a", set()),
        ("kill", "a", {("a", "sev", 2), ("a/b", "sev", 1)}),
    ],
)
def test_limits_go_with_their_files(f: str, cgroup: str, left: set[tuple[str, str, int]]) -> None:
    limits = frozenset({("a", "sev", 2), ("a/b", "sev", 1)})
    invoke = Invoke(t=0, op=1, f=f, agent="", pid=0, step=-1, args={"cgroup": cgroup})
    assert against_oracle.changed(limits, invoke) == left


def test_a_history_of_an_unknown_kernel_judges_nothing() -> None:
    judge = against_oracle.Contract(RunEvidence(Builder(kernel="mine").end()))
    assert judge.gap and list(judge.judged()) == []
