# SPDX-License-Identifier: Apache-2.0
"""P1: each counter that is wrong is named, and where nobody looked nothing held."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import History, Observation, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, shipped
from tests.unit.core.doctored import KILL_SOURCE, MOVE, begun, charge, check, move_unanswered, verdict_of, without


def test_p1_a_source_that_stays_charged() -> None:
    def both(record: Record) -> Record | None:
        return charge("after", ".", 2)(charge("after", "source", 1)(record))  # type: ignore[arg-type]

    verdict = check("P1", MOVE, both)
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.signature == "overcharged-after-move:sev"
    assert "source: misc.current sev = 1, expected 0" in verdict.reason
    assert verdict.reason.startswith(".: misc.current sev = 2, expected 1 (observation 'after', after the move)")
    assert "more" not in verdict.reason
    assert verdict.expected == ". sev 1; source sev 0"
    assert verdict.seen == ". sev 2; source sev 1"


def test_p1_names_the_kernels_charges_of_a_cgroup_that_is_wrong() -> None:
    """And they change nothing else: neither the verdict nor its signature, nor a verdict that holds."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    moved = b.move("old", "new", "destination")
    names = ("misc_cg_try_charge", "misc_cg_uncharge")
    asked = b.traced(333, names[0], t=moved.began, key="sev", amount=1, cgroup="destination")
    b.traced(333, names[1], t=moved.ended, key="sev", amount=1, cgroup="source")  # its counter is right
    got = b.traced(333, names[0], "leave", t=moved.began + 1_000, returned=0)
    wrong = b.observe("after", {"source": 0, "destination": 2, ".": 1})
    b.traced(333, names[0], key="sev", amount=1, cgroup="destination")  # later
    verdict = verdict_of("P1", b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "overcharged-after-move:sev")
    assert verdict.records == (asked.seq, got.seq, wrong.seq)


@pytest.mark.parametrize(
    ("label", "cgroup", "value", "key", "signature"),
    [
        ("before", "source", 0, "sev", "undercharged-before-move:sev"),
        ("after", "destination", 2, "sev", "overcharged-after-move:sev"),
        ("after", "destination", 1, "sev_es", "overcharged-after-move:sev_es"),
        ("after", "source", -1, "sev", "below-zero-after-move:sev"),
        ("end", "source", 1, "sev", "overcharged-after-close:sev"),
        ("start", "source", 1, "sev", "overcharged-before-move:sev"),
    ],
)
def test_p1_a_wrong_counter(label: str, cgroup: str, value: int, key: str, signature: str) -> None:
    verdict = check("P1", MOVE, charge(label, cgroup, value, key))
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)
    assert verdict.records


def test_p1_a_counter_wrong_in_the_middle() -> None:
    verdict = check("P1", KILL_SOURCE, charge("held", "source", 0))
    assert verdict.signature == "undercharged-in-move:sev"


def test_p1_many_wrong_counters_are_summed_up() -> None:
    def change(record: Record) -> Record:
        for cgroup in ("source", "destination", "."):
            record = charge("after", cgroup, 5, "sev_es")(record) or record
            record = charge("before", cgroup, 5, "sev_es")(record) or record
        return record

    verdict = check("P1", MOVE, change)
    assert verdict.reason.endswith("and 3 more")
    assert verdict.signature == "overcharged-before-move:sev_es"  # where it is first seen


def test_p1_of_four_wrong_counters_three_are_told() -> None:
    def change(record: Record) -> Record:
        for cgroup in ("source", "destination"):
            for key in ("sev", "sev_es"):
                record = charge("after", cgroup, 5, key)(record) or record
        return record

    assert check("P1", MOVE, change).reason.endswith(", and 1 more")


def test_p1_a_counter_below_zero_is_printed_without_its_sign() -> None:
    verdict = check("P1", MOVE, charge("after", "source", (1 << 64) - 1))
    assert (verdict.signature, verdict.seen) == ("below-zero-after-move:sev", "source sev -1")


def test_p1_counters_impossible_together() -> None:
    verdict = check("P1", KILL_SOURCE, charge("held", "destination", 0))
    assert verdict.signature == "undercharged-in-move:sev"
    assert verdict.outcome is Outcome.BROKEN


@pytest.mark.parametrize("label", ["before", "after"])
def test_p1_needs_a_charge_on_either_side(label: str) -> None:
    verdict = check("P1", MOVE, without(Observation, label=label))
    assert verdict.outcome is Outcome.UNKNOWN
    assert f"no observation shows a charge {label} the move" in verdict.reason


def test_p1_a_cgroup_that_was_not_read_is_no_witness() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == "after":
            misc = {cgroup: files for cgroup, files in record.misc.items() if cgroup != "destination"}
            return msgspec.structs.replace(record, misc=misc)
        return record

    assert check("P1", MOVE, change).outcome is Outcome.UNKNOWN


def test_p1_a_move_that_never_ended() -> None:
    verdict = check("P1", MOVE, move_unanswered())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "is still under way" in verdict.reason


def test_p1_a_ledger_that_is_lost() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("nothing", "new", "destination")
    verdict = CHECKERS["P1"](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "what must be charged cannot be told: move of new succeeded" in verdict.reason
    assert "who owns what cannot be told" in CHECKERS["P4"](shipped(MOVE), b.history()).reason


def test_p1_a_failure_that_had_happened() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.status("old", "source", error=errno.ENOTTY)
    b.done(invoke, "fail", error=errno.EBUSY)
    verdict = CHECKERS["P1"](shipped(MOVE), b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, "failed-but-charged:move")


def test_p1_without_a_move_in_the_script() -> None:
    experiment = msgspec.structs.replace(shipped(MOVE), script=())
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.observe("one", {"source": 1})
    assert CHECKERS["P1"](experiment, b.history()).outcome is Outcome.UNKNOWN
    b.observe("two", {"source": 1})
    assert CHECKERS["P1"](experiment, b.history()).outcome is Outcome.KEPT


def both_killed(*, left: int = 0, killed: bool = True) -> History:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="old", to="destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold(move)
    b.observe("held", {"source": 1, "destination": 1}, guests=1)
    for agent in ("source", "destination"):
        b.kill(agent) if killed else b.exited(agent)
    b.done(move, "info")
    b.observe("after", {"destination": left}, guests=0)
    return b.finish()


def test_p1_after_both_sides_were_killed_nothing_is_due() -> None:
    verdict = CHECKERS["P1"](shipped(MOVE), both_killed())
    assert verdict.outcome is Outcome.KEPT
    assert "source sev 1 before, nothing after" in verdict.reason
    assert CHECKERS["P1"](shipped(MOVE), both_killed(killed=False)).outcome is Outcome.UNKNOWN
    assert CHECKERS["P1"](shipped(MOVE), both_killed(left=1)).signature.startswith("overcharged")


@pytest.mark.parametrize("killed", ["source", "destination"])
def test_p1_while_one_side_of_a_killed_move_lives_a_charge_is_due(killed: str) -> None:
    """With nothing charged afterwards, the promise is not shown by who is gone."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    move = b.invoke("move", "destination", vm="new", source="old")
    b.kill(killed)
    b.done(move, "info") if killed == "destination" else b.done(move)
    assert "no observation shows a charge after the move" in CHECKERS["P1"](shipped(MOVE), b.finish()).reason


def test_p1_in_a_script_without_a_move_one_observation_of_a_charge_is_not_enough() -> None:
    experiment = msgspec.structs.replace(shipped(MOVE), script=())
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    first = b.observe("one", {"source": 1})
    assert "1 observations show a charge, and two are needed" in CHECKERS["P1"](experiment, b.history()).reason
    b.launch("more", "source", "sev")
    second = b.observe("two", {"source": 2})
    verdict = CHECKERS["P1"](experiment, b.history())
    assert {first.seq, second.seq} <= set(verdict.records)
    assert "source sev 1 before, source sev 2 after" in verdict.reason


def test_p1_what_was_wrong_before_the_move_and_in_it_and_after_it_is_named_once() -> None:
    def change(record: Record) -> Record:
        for label in ("before", "held", "after"):
            record = charge(label, "destination", 3)(record) or record
        return record

    assert check("P1", KILL_SOURCE, change).signature == "overcharged-before-move:sev"
    assert check("P1", KILL_SOURCE, charge("held", "destination", 3)).signature == "overcharged-in-move:sev"
