# SPDX-License-Identifier: Apache-2.0
"""What the checkers ask of a history."""

from __future__ import annotations

import errno
from typing import Literal

import msgspec
import pytest

from chaos.history.records import Done, Invoke, Value
from chaos.judge.evidence import RunEvidence, TriedMove
from tests.unit.core.build import Builder


def tried_in_loop(**told: int) -> list[tuple[str, str, int]]:
    """Source, destination and errno of the moves that are known to have failed in a loop."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    value: dict[str, Value] = {name.replace("_", " "): count for name, count in told.items()}
    b.done(b.invoke("moves", "destination", vm="new", sources=["old"], rounds=9), value={**value, "rounds": "nine"})
    moves = RunEvidence(b.history()).tried
    assert all(move.happened is False and move.done is not None and move.over == move.done.seq for move in moves)
    return [(move.source, move.destination, move.done.errno) for move in moves if move.done is not None]


def test_a_loop_of_moves_has_failed_with_what_most_of_its_moves_were_told() -> None:
    assert tried_in_loop(old_EIO=2, old_EBUSY=7, old_EINVAL=3) == [("old", "new", errno.EBUSY)]
    assert tried_in_loop(old_EIO=2, other_EBUSY=1) == [("old", "new", errno.EIO), ("other", "new", errno.EBUSY)]


def test_moves_of_a_loop_that_succeeded_have_not_failed() -> None:
    assert tried_in_loop(old_ok=9) == []
    assert tried_in_loop(old_ok=9, old_EIO=1) == [("old", "new", errno.EIO)]


@pytest.mark.parametrize(
    ("outcome", "happened", "told"),
    [
        ("ok", True, "succeeded"),
        ("fail", False, "failed with EBUSY"),
        ("fail", True, "failed with EBUSY and took effect"),
        ("info", True, "was killed and took effect"),
        ("info", None, "was killed"),
        (None, None, "is still under way"),
        (None, True, "is still under way and took effect"),
    ],
)
def test_a_move_is_told_with_how_it_ended(
    outcome: Literal["ok", "fail", "info"] | None, happened: bool | None, told: str
) -> None:
    invoke = Invoke(t=1, op=1, f="move", agent="destination", pid=7, step=0, args={"vm": "new", "source": "old"})
    number = errno.EBUSY if outcome == "fail" else 0
    done = None if outcome is None else Done(t=2, op=1, outcome=outcome, errno=number, firmware=0, began=1, ended=2)
    move = TriedMove(invoke, done, happened, 2)
    assert str(move) == f"the move from old to new {told}"
    assert move.records == ((invoke,) if done is None else (invoke, done))
    assert (move.survivor, move.other) == (("new", "old") if happened else ("old", "new"))


def test_a_move_without_a_source_names_the_descriptor() -> None:
    invoke = Invoke(t=1, op=1, f="move", agent="destination", pid=7, step=0, args={"vm": "new", "fd": "/dev/null"})
    assert str(TriedMove(invoke, None, None, None)).startswith("the move from a descriptor that is no VM's (/dev/null)")
    own = msgspec.structs.replace(invoke, args={"vm": "new", "source": "new"})
    assert TriedMove(own, None, True, None).other == ""
