# SPDX-License-Identifier: Apache-2.0
"""Commands of the PSP, told in the lab's time and laid to the move they came in."""

from __future__ import annotations

from typing import Literal

from chaos.controller.lab_witness import Clock, firmware_records
from chaos.history.records import Done, Invoke, Observation, Record
from chaos.lab.psp.mailbox import CommandRecord

MS = 1_000_000
CLOCK = Clock(ahead=500 * MS, doubt=MS)


def command(name: str, at: int, sequence: int = 0) -> CommandRecord:
    """One that the lab's clock would date to `at`, and the PSP counts as that of this number."""
    start = at - CLOCK.ahead
    return CommandRecord(sequence=sequence, command=name, handle=1, status=0, start_ns=start, end_ns=start + 10_000)


def move(*, outcome: Literal["ok", "info"] = "ok", began: int = 1000 * MS, ended: int = 1010 * MS) -> list[Record]:
    invoke = Invoke(t=990 * MS, op=7, f="move", agent="destination", pid=1, step=0)
    return [invoke, Done(t=1020 * MS, op=7, outcome=outcome, began=began, ended=ended)]


def moves_of(trace: list[CommandRecord], records: list[Record]) -> list[int | None]:
    return [record.move for record in firmware_records(trace, records, CLOCK, before=0)]


def test_time_and_order_are_the_labs() -> None:
    trace = [command("INIT", 5 * MS, 41), command("DF_FLUSH", 6 * MS, 42)]
    told = list(firmware_records(trace, [], CLOCK, before=40))
    assert [(r.order, r.command, r.began, r.move) for r in told] == [
        (0, "INIT", 5 * MS, None),
        (1, "DF_FLUSH", 6 * MS, None),
    ]


def test_a_command_that_was_not_recorded_leaves_a_hole() -> None:
    trace = [command("INIT", 5 * MS, 2), command("DF_FLUSH", 6 * MS, 3), command("LAUNCH_START", 7 * MS, 6)]
    assert [record.order for record in firmware_records(trace, [], CLOCK, before=0)] == [1, 2, 5]


def test_a_command_inside_the_call_belongs_to_the_move() -> None:
    trace = [command("ACTIVATE", at) for at in (995 * MS, 1005 * MS, 1015 * MS)]
    assert moves_of(trace, move()) == [None, 7, None]


def test_the_doubt_of_the_clocks_accuses_and_never_acquits() -> None:
    trace = [command("ACTIVATE", at) for at in (999 * MS, 1011 * MS, 998 * MS, 1012 * MS)]
    assert moves_of(trace, move()) == [7, 7, None, None]


def test_of_a_killed_move_nobody_knows_when_it_was_inside() -> None:
    trace = [command("ACTIVATE", at) for at in (991 * MS, 1019 * MS, 1030 * MS)]
    assert moves_of(trace, move(outcome="info", began=0, ended=0)) == [7, 7, None]


def test_one_question_of_an_observation_is_ours_and_no_more() -> None:
    seen = Observation(t=1004 * MS, until=1006 * MS, label="held", step=0, misc={}, guests=1, dying=0)
    trace = [command("PLATFORM_STATUS", 1005 * MS), command("PLATFORM_STATUS", 1005 * MS), command("INIT", 1005 * MS)]
    assert moves_of(trace, [*move(), seen]) == [None, 7, 7]
    unasked = Observation(t=1004 * MS, until=1006 * MS, label="held", step=0, misc={}, guests=None, dying=0)
    assert moves_of(trace, [*move(), unasked]) == [7, 7, 7]
