# SPDX-License-Identifier: Apache-2.0
"""P3 in a storm: one instant of death, inside the move; doctored storms in which there is none."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY
from errno import EIO as EIO_NUMBER

import msgspec
import pytest

from chaos.history.records import Call, Done, History, Record, Stormed, StormThread
from chaos.judge.verdict import Verdict
from tests.unit.core.build import Builder, changed
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, verdict_of

EIO = "EIO"


def answered(began: int, ended: int) -> Call:
    return Call(ioctl="KVM_GET_REGS", began=began, ended=ended, errno=0)


def refused(began: int, ended: int) -> Call:
    return Call(ioctl="KVM_RUN", began=began, ended=ended, errno=EIO_NUMBER)


def thread(last: Call | None, first: Call | None, *, lost: bool = False, clock_error: int = 0) -> StormThread:
    errnos = {"ok": 90 if last else 0, "EINTR": 10 if last else 0, EIO: 100 if first else 0}
    return StormThread(
        began=1, ended=2, calls=sum(errnos.values()), errnos={name: n for name, n in errnos.items() if n},
        answered=last, refused=first, lost=lost, clock_error=clock_error,
    )  # fmt: skip


def stormed(*threads: StormThread, vm: str = "old") -> Stormed:
    return Stormed(t=0, agent="source", vm=vm, step=4, calls=("KVM_GET_REGS", "KVM_RUN"), threads=threads)


Threads = Callable[[Done], tuple[StormThread, ...]]


def through(threads: Threads, *, error: int = 0, ask: bool = True) -> Verdict:
    """The verdict on a move with a storm on its source; `threads` is given the move's answer, for its times."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("storm", "source", vm="old", threads=2, calls=["KVM_GET_REGS", "KVM_RUN"])
    moved = b.move("old", "new", "destination", error=error)
    b.do("calm", "source", vm="old")
    b.add(msgspec.structs.replace(stormed(*threads(moved)), t=b.tick()))
    if ask:
        b.ask("old", "source", dead=not error)
    return verdict_of("P3", b.finish())


def at_one_instant(done: Done) -> tuple[StormThread, ...]:
    """Two threads; the second is in a call when the source dies, which is answered."""
    middle = (done.began + done.ended) // 2
    return (
        thread(answered(middle - 50, middle - 20), refused(middle + 10, middle + 30)),
        thread(answered(middle - 40, done.ended + 500), refused(done.ended + 500, done.ended + 600)),
    )


def test_all_died_at_one_instant() -> None:
    verdict = through(at_one_instant)
    assert verdict.outcome is HELD
    assert "in a storm of 400 calls by 2 threads on old 200 were answered before and 200 failed with EIO" in (
        verdict.reason
    )


def test_a_call_answered_after_another_had_failed() -> None:
    def threads(done: Done) -> tuple[StormThread, ...]:
        middle = (done.began + done.ended) // 2
        return (
            thread(answered(middle - 50, middle - 20), refused(middle - 10, middle)),
            thread(answered(middle + 1, middle + 30), refused(middle + 30, middle + 50)),
        )

    verdict = through(threads)
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "source-in-storm:answered-after-eio")
    assert (verdict.expected, verdict.seen) == ("one instant of death", "answered after eio")


def test_a_thread_that_was_answered_again() -> None:
    def threads(done: Done) -> tuple[StormThread, ...]:
        return (thread(answered(done.began + 70, done.began + 90), refused(done.began + 40, done.began + 60)),)

    assert through(threads).signature == "source-in-storm:answered-after-eio"


def test_a_call_answered_after_the_move() -> None:
    def threads(done: Done) -> tuple[StormThread, ...]:
        return (thread(answered(done.ended + 1, done.ended + 9), refused(done.ended + 9, done.ended + 20)),)

    assert through(threads).signature == "source-in-storm:answered-after-move"


def test_a_call_that_failed_before_the_move() -> None:
    def threads(done: Done) -> tuple[StormThread, ...]:
        return (thread(answered(done.began - 90, done.began - 60), refused(done.began - 50, done.began - 1)),)

    assert through(threads).signature == "source-in-storm:eio-before-move"


def test_times_may_be_off_by_as_much_as_the_clock_was() -> None:
    def threads(off: int) -> Threads:
        return lambda done: (
            thread(
                answered(done.began - 90, done.began - 60), refused(done.began - 50, done.began - 5), clock_error=off
            ),
        )

    assert through(threads(4)).outcome is DEVIATED
    assert through(threads(5)).outcome is HELD


def test_after_a_failed_move_none_may_fail() -> None:
    def alive(done: Done) -> tuple[StormThread, ...]:
        return (thread(answered(done.ended + 10, done.ended + 20), None),)

    verdict = through(alive, error=EBUSY)
    assert verdict.outcome is HELD and "in a storm of 100 calls by 1 threads on old none failed" in verdict.reason
    verdict = through(at_one_instant, error=EBUSY)
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "source-in-storm:eio-after-failed-move")
    assert verdict.expected == "no EIO"


def test_without_any_move_none_may_fail() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.add(stormed(thread(None, refused(5, 6))))
    verdict = verdict_of("P3", b.finish())
    assert verdict.signature == "part-unknown+source-in-storm:eio-without-move"  # that no move was tried is said too


def test_a_destination_is_not_dead() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    done = b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    b.add(stormed(thread(answered(done.ended, done.ended + 5), refused(done.ended + 5, done.ended + 6)), vm="new"))
    assert verdict_of("P3", b.finish()).signature == "source-in-storm:eio-without-move"


@pytest.mark.parametrize(
    ("doctored", "reason"),
    [
        (lambda t: msgspec.structs.replace(t, lost=True), "is not on record any more"),
        (lambda t: msgspec.structs.replace(t, refused=None), "do not agree"),
        (lambda t: msgspec.structs.replace(t, errnos={"ok": 200}), "do not agree"),
        (lambda t: msgspec.structs.replace(t, calls=0, errnos={}, answered=None, refused=None), "made no call"),
    ],
)
def test_a_storm_that_does_not_say_when_is_unknown(doctored: Callable[[StormThread], StormThread], reason: str) -> None:
    verdict = through(lambda done: tuple(doctored(t) for t in at_one_instant(done)))
    assert verdict.outcome is UNKNOWN and reason in verdict.reason


def test_a_contradiction_counts_though_something_is_lost() -> None:
    def threads(done: Done) -> tuple[StormThread, ...]:
        return (thread(answered(done.ended + 1, done.ended + 9), None, lost=True),)

    assert through(threads).outcome is DEVIATED


@pytest.mark.parametrize("lasted", [True, False])
def test_a_storm_that_saw_nothing_of_the_instant_was_over_before_or_says_nothing(lasted: bool) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    storm = stormed(thread(answered(b.t - 50, b.t - 20), None))
    if not lasted:
        b.add(msgspec.structs.replace(storm, t=b.tick()))
    b.move("old", "new", "destination")
    b.ask("old", "source", dead=True)
    if lasted:
        b.add(msgspec.structs.replace(storm, t=b.tick()))
    verdict = verdict_of("P3", b.finish())
    assert verdict.outcome is (UNKNOWN if lasted else HELD)
    told = "none of its calls was made after that" if lasted else "which was over before that, none failed with EIO"
    assert told in verdict.reason


def test_a_storm_is_no_substitute_for_asking() -> None:
    verdict = through(at_one_instant, ask=False)
    assert verdict.outcome is UNKNOWN and "old was not asked afterwards" in verdict.reason


def killed(history: History) -> History:
    """The same with a move whose caller was killed."""

    def change(record: Record) -> Record | None:
        if isinstance(record, Done) and record.op == move.op:
            return msgspec.structs.replace(record, outcome="info", began=0, ended=0)
        return record

    move = next(invoke for invoke, _ in history.operations() if invoke.f == "move")
    return changed(history, change)


@pytest.mark.parametrize("asked", [True, False])
def test_of_a_move_that_was_killed_the_times_are_those_of_its_process(asked: bool) -> None:
    b = Builder()
    b.begin()
    b.spawn("source")
    b.spawn("destination")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    moved = b.move("old", "new", "destination")
    b.exited("destination", -9)
    b.add(msgspec.structs.replace(stormed(*at_one_instant(moved)), t=b.tick()))
    if asked:
        b.ask("old", "source", dead=True)
    verdict = verdict_of("P3", killed(b.finish()))
    assert verdict.outcome is (HELD if asked else UNKNOWN), verdict.reason
