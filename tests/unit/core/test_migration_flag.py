# SPDX-License-Identifier: Apache-2.0
"""Who held the migration flag: of moves that are under way together on one source one gets in."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Done, Value
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder
from tests.unit.core.doctored import begun, see, verdict_of


def heirs() -> Builder:
    b = begun()
    for agent in ("first", "second", "dying"):
        b.spawn(agent)
    b.launch("old", "source", "sev")
    b.launch("one", "first")
    b.launch("two", "second")
    b.launch("lost", "dying")
    see(b, "before", {"source": 1})
    for agent in ("first", "second", "dying"):
        b.do("send_fd", "source", vm="old", to=agent)
    return b


def loop(b: Builder, answers: dict[str, dict[str, Value]], *, end: int = 100, threads: int = 1) -> None:
    """Loops from now on, together; each goes on for `end` times a millisecond."""
    invokes = {
        vm: b.invoke("moves", agent, vm=vm, sources=[vm, "old"], rounds=1000, threads=threads)
        for vm, agent in (("one", "first"), ("two", "second"))
        if vm in answers
    }
    began = b.t
    b.t += end * 1_000_000
    for vm, invoke in invokes.items():
        done = b.done(invoke, value=answers[vm])
        b.records[-1] = msgspec.structs.replace(done, began=began, ended=began + end * 1_000_000)


def p7(b: Builder) -> Verdict:
    return verdict_of("P7", b.history())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("together", [True, False])
def test_loops_on_one_source_that_are_told_ebusy_only(together: bool, threads: int) -> None:
    """Nobody has the guest, and nobody held the flag for which they were refused."""
    b = heirs()
    answers: dict[str, dict[str, Value]] = {"one": {"one EINVAL": 1000, "old EBUSY": 1000}}
    if together:
        answers["two"] = {"two EINVAL": 1000, "old EBUSY": 1000}
    loop(b, answers, threads=threads)
    verdict = p7(b)
    assert verdict.outcome is Outcome.BROKEN
    if together:  # of one alone the oracle says so
        assert verdict.signature == "move:EBUSY-of-nobody"
        assert "no other move or mirror held the migration flag" in verdict.reason


def test_a_loop_that_gets_past_the_flags_explains_the_other() -> None:
    b = heirs()
    loop(b, {"one": {"one EINVAL": 1000, "old EBUSY": 1000}, "two": {"two EINVAL": 1000, "old EINVAL": 1000}})
    assert "EBUSY-of-nobody" not in p7(b).signature


@pytest.mark.parametrize(("killed_at", "outcome"), [(10, Outcome.BROKEN), (80, Outcome.UNKNOWN), (100, Outcome.KEPT)])
def test_a_killed_move_explains_what_was_refused_until_it_was_gone(killed_at: int, outcome: Outcome) -> None:
    """It leaves the flag of its source set for ever. A loop that outlasts it must get in."""
    b = heirs()
    held = b.invoke("move", "dying", vm="lost", source="old")
    loops = [
        b.invoke("moves", agent, vm=vm, sources=[vm, "old"], rounds=1000, threads=1)
        for vm, agent in (("one", "first"), ("two", "second"))
    ]
    began = b.t
    b.t = began + killed_at * 1_000_000
    b.kill("dying")
    b.done(held, "info")
    b.t = max(b.t, began + 100_000_000)
    for vm, invoke in zip(("one", "two"), loops, strict=True):
        done = b.done(invoke, value={f"{vm} EINVAL": 1000, "old EBUSY": 1000})
        b.records[-1] = msgspec.structs.replace(done, began=began, ended=began + 100_000_000)
    assert p7(b).outcome is outcome


def crossing(b: Builder, *, first: tuple[str, str], second: tuple[str, str]) -> tuple[Done, Done]:
    """Two moves, destination and source, that are under way together and are both told EBUSY."""
    agents = {"a": "source", "b": "destination", "c": "source"}
    one, two = (b.invoke("move", agents[vm], vm=vm, source=source) for vm, source in (first, second))
    began = b.t
    dones = [b.done(invoke, "fail", error=errno.EBUSY) for invoke in (one, two)]
    for number, done in enumerate(dones, start=len(b.records) - 2):
        b.records[number] = msgspec.structs.replace(done, began=began, ended=b.t)
    return dones[0], dones[1]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (("a", "b"), ("b", "a"), Outcome.KEPT),  # each has its own flag, and fails on the other's
        (("a", "c"), ("b", "c"), Outcome.BROKEN),  # one of them must get the flag of c
        (("a", "b"), ("c", "b"), Outcome.BROKEN),
        (("a", "b"), ("c", "a"), Outcome.BROKEN),  # the first explains the second, and nothing the first
    ],
)
def test_two_moves_that_are_both_refused(first: tuple[str, str], second: tuple[str, str], outcome: Outcome) -> None:
    b = begun()
    b.launch("a", "source", "sev")
    b.launch("b", "destination", "sev")
    b.launch("c", "source", "sev")
    for vm, agent in (("a", "source"), ("b", "destination"), ("c", "source")):
        b.do("send_fd", agent, vm=vm, to="destination" if agent == "source" else "source")
    see(b, "before", {"source": 2, "destination": 1})
    crossing(b, first=first, second=second)
    verdict = p7(b)
    assert verdict.outcome is outcome
    assert ("EBUSY-of-nobody" in verdict.signature) == (outcome is Outcome.BROKEN)


@pytest.mark.parametrize(("threads", "signature"), [(1, "move:EBUSY-of-nobody"), (2, "")])
def test_a_loop_s_success_is_in_the_way_of_its_other_threads_only(threads: int, signature: str) -> None:
    b = heirs()
    began = b.t
    loop = b.invoke("moves", "first", vm="one", sources=["old"], rounds=3, threads=threads)
    b.done(b.invoke("move", "first", vm="one", source="old", of=loop.op))
    done = b.done(loop, value={"old EBUSY": 1, "old EINVAL": 1})
    b.records[-1] = msgspec.structs.replace(done, began=began)
    see(b, "after", {"first": 1})
    assert p7(b).signature == signature


@pytest.mark.parametrize("beside", [True, False])
def test_a_call_that_the_kernel_began_later_explains_nothing(beside: bool) -> None:
    """However early its process was told to make it."""
    b = begun()
    b.launch("a", "source", "sev")
    b.launch("b", "destination")
    b.launch("c", "source")
    b.do("send_fd", "source", vm="a", to="destination")
    see(b, "before", {"source": 1})
    other = b.invoke("mirror", "source", vm="c", source="a")
    refused = b.do("move", "destination", vm="b", source="a", error=errno.EBUSY)
    b.t = refused.ended + 10_000_000
    done = b.done(other, "fail", error=errno.EINVAL)  # which is past the flags
    assert other.t < refused.began and done.began > refused.ended
    if beside:
        b.records[-1] = msgspec.structs.replace(done, began=refused.began)
    assert ("EBUSY-of-nobody" in p7(b).signature) is not beside, p7(b).reason
