# SPDX-License-Identifier: Apache-2.0
"""What belongs to which operation: by thread and time, and by time alone."""

from __future__ import annotations

import msgspec

from chaos.history.records import Done, History, Traced
from chaos.judge.timeline import During, named, told
from tests.unit.core.build import Builder

MOVER = 333  # the thread of a move; the processes are 100 and 101


def moved() -> tuple[Builder, Done]:
    """A move aside, by the thread MOVER of "destination", whose first thread is 101."""
    b = Builder()
    b.spawn("source")
    b.spawn("destination")
    b.launch("old", "source", "sev")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    done = b.done(invoke)
    return b, b_replaced(b, msgspec.structs.replace(done, tid=MOVER))


def b_replaced(b: Builder, done: Done) -> Done:
    b.records[done.seq] = done
    return done


def made(b: Builder, tid: int, t: int) -> str:
    invoke = During(b.history()).made(Traced(t=t, event="enter", function="misc_cg_try_charge", tid=tid))
    return "" if invoke is None else named(invoke)


def test_an_event_is_of_the_operation_of_its_thread_and_its_time() -> None:
    b, move = moved()
    init = next(d for i, d in b.history().operations() if i.f == "init" and d is not None)
    assert made(b, MOVER, move.began) == made(b, MOVER, move.ended) == "move of new"
    assert made(b, 100, init.ended) == "init of old"
    assert made(b, MOVER, init.ended) == ""  # not yet
    assert made(b, 101, move.ended) == ""  # the first thread makes no move
    assert made(b, 100, move.ended) == ""  # between two operations
    assert made(b, 999, move.ended) == ""  # a stranger


def test_the_tracer_rounds_to_microseconds() -> None:
    b, move = moved()
    assert made(b, MOVER, move.began - 1_000) == made(b, MOVER, move.ended + 1_000) == "move of new"
    assert made(b, MOVER, move.began - 1_001) == made(b, MOVER, move.ended + 1_001) == ""


def test_of_a_move_that_never_answered_the_thread_is_whoevers_it_can_only_be() -> None:
    b, _ = moved()
    b.invoke("move", "source", vm="newer", source="new")
    assert made(b, 777, b.t + 1) == "move of newer"
    assert made(b, 100, b.t + 1) == ""  # its process's first thread, which makes no move
    b.invoke("move", "source", vm="newest", source="new")
    assert made(b, 777, b.t + 1) == ""  # one of two


def test_of_another_that_never_answered_it_is_the_first_of_its_process() -> None:
    b, _ = moved()
    b.invoke("launch_measure", "source", vm="old")
    assert made(b, 100, b.t + 1) == "launch_measure of old"
    assert made(b, 101, b.t + 1) == ""


def test_one_that_was_killed_lies_between_its_records() -> None:
    b = Builder()
    b.spawn("destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b_replaced(b, msgspec.structs.replace(b.done(invoke, "info"), tid=MOVER))
    assert made(b, MOVER, invoke.t + 1) == "move of new"
    assert made(b, MOVER, b.t + 10_000) == ""


def test_events_by_operation_stand_in_the_order_of_their_times() -> None:
    b, move = moved()
    later = b.traced(MOVER, "misc_cg_uncharge", t=move.ended)
    earlier = b.traced(MOVER, "misc_cg_try_charge", t=move.began)
    b.traced(999, "misc_cg_uncharge", t=move.ended)
    assert During(b.history()).events == {move.op: (earlier, later)}


def test_what_was_under_way() -> None:
    b, move = moved()
    history: History = b.history()
    during = During(history)
    assert [named(invoke) for invoke in during.at(move.began)] == ["move of new"]
    assert during.at(move.t + 1) == ()
    b.invoke("exit", "source")
    b.invoke("exit", "destination")
    assert [named(invoke) for invoke in During(b.history()).at(b.t + 1)] == ["exit of source", "exit of destination"]


def test_an_operation_is_under_way_from_its_first_record_to_its_last() -> None:
    b, move = moved()
    invoke = next(invoke for invoke, _ in b.history().operations() if invoke.op == move.op)
    during = During(b.history())
    assert [len(during.at(t)) for t in (invoke.t - 1, invoke.t, move.t, move.t + 1)] == [0, 1, 1, 0]


def test_an_event_from_before_an_operation_is_not_of_it_though_it_never_answered() -> None:
    b, _ = moved()
    before = b.t
    invoke = b.invoke("move", "source", vm="newer", source="new")
    assert made(b, 777, invoke.t) == "move of newer"
    assert made(b, 777, before) == ""


def test_a_thread_that_has_answered_for_another_operation_did_not_make_the_one_that_never_did() -> None:
    b, _ = moved()
    b.invoke("move", "source", vm="newer", source="new")
    assert made(b, MOVER, b.t + 1) == made(b, 101, b.t + 1) == ""


def test_a_function_is_left_by_the_thread_that_had_entered_it_and_later() -> None:
    b = Builder()
    b.traced(MOVER, "misc_cg_try_charge", "leave")  # of an earlier call
    entered = b.traced(MOVER, "misc_cg_try_charge")
    b.traced(MOVER, "misc_cg_uncharge", "leave")
    b.traced(999, "misc_cg_try_charge", "leave")
    b.traced(MOVER, "misc_cg_try_charge")
    assert During(b.history()).left(entered) is None
    later = b.tick()
    b.traced(MOVER, "misc_cg_try_charge", "leave", t=b.tick(), returned=0)
    first = b.traced(MOVER, "misc_cg_try_charge", "leave", t=later, returned=-16)
    assert During(b.history()).left(entered) == first
    at_once = b.traced(MOVER, "misc_cg_try_charge", "leave", t=entered.t)
    assert During(b.history()).left(entered) == at_once, "the tracer's clock is no finer"


def test_events_and_operations_in_words() -> None:
    b = Builder()
    assert (
        told(b.traced(MOVER, "misc_cg_uncharge", key="sev", amount=1)) == "entered misc_cg_uncharge (key sev, amount 1)"
    )
    assert told(b.traced(MOVER, "sev_lock_two_vms", "leave")) == "left sev_lock_two_vms"
    assert named(b.invoke("move", "source", vm="new")) == "move of new"
    assert named(b.invoke("exit", "source")) == "exit of source"
