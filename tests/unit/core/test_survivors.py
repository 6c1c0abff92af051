# SPDX-License-Identifier: Apache-2.0
"""Who outlived a fatal signal, by what he began how long after it."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from chaos.history.records import Fault
from chaos.judge.survivors import ENDS_WITHIN, NS, survivors
from tests.unit.core.build import Builder

LIMIT = round(ENDS_WITHIN * NS)


def later(
    nanoseconds: int, *, outcome: Literal["ok", "fail", "info"] = "ok", exits: str = "", again: bool = False
) -> list[str]:
    """Who is seen to live, of a process that was killed, whose end, or another one's, may be on record; after so long
    one of its name does something, which may be another process `again`."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    killed = Fault(t=b.tick(), fault="kill", event="apply", step=3, target="source", ends=("source",))
    b.add(msgspec.structs.replace(killed, fatal=True))
    if exits:
        b.exited(exits, -9)
    if again:
        b.spawn("source")
    invoke = b.invoke("pause", "source", vm="old")
    b.t = killed.t + nanoseconds
    done = b.done(invoke, outcome)
    b.records[-1] = msgspec.structs.replace(done, began=killed.t + nanoseconds)
    return [survivor.agent for survivor in survivors(b.end())]


def test_who_begins_something_long_after_the_signal_lives() -> None:
    assert later(LIMIT + 1) == ["source"]
    assert later(LIMIT) == [], "it may have been on its way out"


def test_of_what_was_never_answered_nobody_knows_when_it_began() -> None:
    assert later(LIMIT + 1, outcome="fail") == ["source"]
    assert later(LIMIT + 1, outcome="info") == []


@pytest.mark.parametrize(("exits", "lives"), [("source", []), ("destination", ["source"])])
def test_who_has_ended_does_not_and_another_one_s_end_is_none(exits: str, lives: list[str]) -> None:
    assert later(LIMIT + 1, exits=exits) == lives


def test_another_process_of_the_name_is_nobody_s_survival() -> None:
    assert later(LIMIT + 1, again=True) == []
