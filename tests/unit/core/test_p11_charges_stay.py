# SPDX-License-Identifier: Apache-2.0
"""P11: a charge that followed its task."""

from __future__ import annotations

from chaos.history.records import History, Invoke, Observation
from tests.unit.core.build import Builder, moved, shipped
from tests.unit.core.doctored import DEVIATED, HELD, MOVE, UNKNOWN, begun, verdict_of


def went(charges: dict[str, int], *, look: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    if look:
        b.observe("went", charges, guests=1)
    return b.finish()


def test_p11() -> None:
    assert verdict_of("P11", went({"source": 1, "elsewhere": 0})).outcome is HELD
    verdict = verdict_of("P11", went({"source": 0, "elsewhere": 1}))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "charge-followed-task:sev")
    assert (verdict.expected, verdict.seen) == ("0", "1")
    assert verdict_of("P11", moved()).outcome is UNKNOWN
    b = begun()
    b.do("enter", "source", cgroup="elsewhere")
    b.do("init", "source", vm="none", key="sev")
    assert "cannot be told" in verdict_of("P11", b.finish()).reason


def test_what_nobody_can_say_points_at_who_went_and_at_what_was_read() -> None:
    for history, read in ((went({"source": 2, "elsewhere": 0}), ["went"]), (went({}, look=False), [])):
        verdict = verdict_of("P11", history)
        records = [history.records[seq] for seq in verdict.records]
        assert verdict.outcome is UNKNOWN
        assert [record.f for record in records if isinstance(record, Invoke)] == ["enter"]
        assert [record.label for record in records if isinstance(record, Observation)] == read


def test_a_charge_that_may_just_be_made_there_is_none_that_followed() -> None:
    def history(here: int, there: int) -> History:
        b = begun()
        b.launch("old", "source", "sev")
        b.do("create", "source", vm="second", kind="sev", vcpus=1, memory="guest")
        b.do("enter", "source", cgroup="elsewhere")
        init = b.invoke("init", "source", vm="second", key="sev")
        b.observe("went", {"source": here, "elsewhere": there}, guests=1)
        b.done(init)
        return b.finish()

    assert verdict_of("P11", history(1, 1)).outcome is HELD
    verdict = verdict_of("P11", history(0, 2))
    assert (verdict.signature, verdict.expected, verdict.seen) == ("charge-followed-task:sev", "0 or 1", "2")


def test_an_observation_tells_of_the_cgroup_that_the_process_went_into_last() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    for cgroup in ("elsewhere", "further"):
        b.do("enter", "source", cgroup=cgroup)
    b.observe("went", {"source": 1, "elsewhere": 0, "further": 0})
    verdict = verdict_of("P11", b.finish())
    assert verdict.outcome is UNKNOWN
    assert "source went into elsewhere, and no charge of its own was seen after it" in verdict.reason
    assert "source went into further and left its charge behind" in verdict.reason


def test_what_it_does_there_and_where_others_go_changes_nothing_about_that() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    b.launch("plain", "source")
    b.do("enter", "destination", cgroup="elsewhere")
    b.observe("went", {"source": 1, "elsewhere": 0})
    assert verdict_of("P11", b.finish()).outcome is HELD


def test_every_observation_after_it_went_is_asked() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    b.observe("at-first", {"source": 1, "elsewhere": 0}, guests=1)
    b.observe("later", {"source": 0, "elsewhere": 1}, guests=1)
    verdict = verdict_of("P11", b.finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "charge-followed-task:sev")


def test_who_has_no_charge_leaves_none_behind() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "destination", cgroup="elsewhere")
    b.observe("went", {"source": 1})
    verdict = verdict_of("P11", b.finish())
    assert verdict.outcome is UNKNOWN and verdict.reason == "nothing was asked"


def test_who_is_put_back_after_the_script_is_not_asked_about() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    b.observe("went", {"source": 1})
    b.do("enter", "source", step=len(shipped(MOVE).script), cgroup="source")
    assert verdict_of("P11", b.finish()).outcome is HELD


def removed(left: dict[str, int]) -> History:
    """The charged cgroup is removed once its process has gone elsewhere, and the context is moved out of it."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("enter", "source", cgroup="elsewhere")
    b.do("remove_cgroup", "", cgroup="source")
    b.observe("removed", {"source": 0, "elsewhere": 0, ".": 1, **left}, guests=1)
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.observe("moved", {"destination": 1})
    return b.finish()


def test_a_removed_cgroup_keeps_its_charge_until_the_context_is_moved() -> None:
    for promise in ("P1", "P11"):
        verdict = verdict_of(promise, removed({}))
        assert verdict.outcome is HELD, verdict.reason
    assert verdict_of("P11", removed({"elsewhere": 1})).signature == "charge-followed-task:sev"
    assert verdict_of("P1", removed({".": 0})).signature.startswith("undercharged-before-move")


def test_without_the_controller_two_cgroups_are_one() -> None:
    """A move between them charges nothing, and who goes from one to the other stays where it is."""

    def history(*, middle: int) -> History:
        b = Builder()
        b.fill("start")
        b.do("disable_misc", "", cgroup="tenant")
        for agent in ("source", "destination"):
            b.spawn(agent, f"tenant/{agent}")
        b.launch("old", "source", "sev")
        b.launch("new", "destination")
        b.do("send_fd", "source", vm="old", to="destination")
        b.observe("before", {"tenant": 1})
        move = b.invoke("move", "destination", vm="new", source="old")
        b.hold(move)
        b.observe("held", {"tenant": middle}, guests=1)
        b.done(move)
        b.observe("after", {"tenant": 1})
        return b.end()

    assert verdict_of("P1", history(middle=1)).outcome is HELD
    assert verdict_of("P1", history(middle=2)).signature == "overcharged-in-move:sev"


def test_counters_that_were_not_read_show_no_charge_that_stayed() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("enter", "source", cgroup="elsewhere")
    seen = b.observe("went", {"source": 1})
    del seen.misc["source"]
    verdict = verdict_of("P11", b.history())
    assert verdict.outcome is UNKNOWN
    assert verdict.reason == "source went into elsewhere, and no charge of its own was seen after it"
