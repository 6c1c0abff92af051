# SPDX-License-Identifier: Apache-2.0
"""P13: what the firmware was sent, by the word of whoever watched it."""

from __future__ import annotations

import msgspec

from chaos.history.records import Firmware, Header, History, Invoke, Note, Record
from tests.unit.core.build import changed, moved
from tests.unit.core.doctored import DEVIATED, HELD, SKIPPED, UNKNOWN, again, begun, verdict_of


def watched(
    *, in_move: str = "", times: int = 1, twice: bool = False, ends: bool = True, gap: int = 0, look: bool = False,
    before: bool = True, look_before: bool = False,
) -> History:  # fmt: skip
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
    if look_before:
        b.observe("just-before", {"source": 1})
    invoke = b.invoke("move", "destination", vm="new", source="old")
    if look:
        b.observe("in", {"source": 1})
    for _ in range(times if in_move else 0):
        sent(in_move, 1 if in_move != "PLATFORM_STATUS" else None, move=invoke)
    b.done(invoke)
    sent("PLATFORM_STATUS")
    for agent in ("source", "destination"):
        b.exit(agent)
    for repeated in range(int(ends) + int(twice)):
        sent("DECOMMISSION", 1, status=16 if repeated else 0)
    sent("PLATFORM_STATUS")
    return b.finish()


def test_p13() -> None:
    verdict = verdict_of("P13", watched())
    assert verdict.outcome is HELD and "each context was decommissioned once: 1" in verdict.reason
    assert verdict_of("P13", watched(in_move="DEACTIVATE")).signature == "sent-in-move:DEACTIVATE"
    assert verdict_of("P13", watched(in_move="PLATFORM_STATUS", look=True)).outcome is HELD
    assert verdict_of("P13", watched(in_move="PLATFORM_STATUS")).outcome is DEVIATED
    assert verdict_of("P13", watched(in_move="PLATFORM_STATUS", times=2, look=True)).outcome is DEVIATED
    assert verdict_of("P13", watched(twice=True)).signature == "decommissioned-twice"
    assert verdict_of("P13", watched(ends=False)).signature == "never-decommissioned"


def test_p13_without_its_witness() -> None:
    assert verdict_of("P13", again().history()).reason == "nobody watched what the firmware was sent"

    def on_hardware(record: Record) -> Record:
        return msgspec.structs.replace(record, host="local") if isinstance(record, Header) else record

    assert verdict_of("P13", changed(again().history(), on_hardware)).outcome is SKIPPED
    assert verdict_of("P13", changed(watched(in_move="DEACTIVATE"), on_hardware)).outcome is DEVIATED
    assert "missing between" in verdict_of("P13", watched(gap=1)).reason
    assert "the first 2 records of the firmware are missing" in verdict_of("P13", watched(before=False, gap=2)).reason
    noted = watched()
    note = Note(
        seq=len(noted.records) - 1, t=noted.records[-1].t, topic="witness", text="3 commands …", witness="firmware"
    )
    end = msgspec.structs.replace(noted.records[-1], seq=len(noted.records))
    verdict = verdict_of("P13", History((*noted.records[:-1], note, end)))
    assert verdict.outcome is UNKNOWN and "a witness was lost: 3 commands" in verdict.reason
    assert "before it" in verdict_of("P13", watched(before=False, ends=False)).reason
    b = begun()
    b.add(Firmware(t=b.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    assert "no move was tried" in verdict_of("P13", b.end()).reason
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.add(Firmware(t=b.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    invoke = b.invoke("move", "destination", vm="new", source="old")
    assert "nobody can say" in verdict_of("P13", b.end()).reason
    b.records.pop()
    b.status("old", "source")
    b.add(Firmware(t=b.tick(), order=1, command="GUEST_STATUS", status=0, handle=1, move=invoke.op))
    b.done(invoke)
    # The one command that was asked for is not the move's; of a second one nobody can say whose it is.
    assert "perhaps by" not in verdict_of("P13", b.end()).reason
    b.records.pop()
    b.add(Firmware(t=b.tick(), order=2, command="GUEST_STATUS", status=0, handle=1, move=invoke.op))
    verdict = verdict_of("P13", b.end())
    assert verdict.outcome is UNKNOWN and "perhaps by guest_status" in verdict.reason


def test_p13_a_look_at_the_guest_count_before_a_move_excuses_no_command_in_it() -> None:
    assert verdict_of("P13", watched(in_move="PLATFORM_STATUS", look_before=True)).outcome is DEVIATED


def test_p13_what_is_missing_came_before_the_first_command_that_is_on_record() -> None:
    history = watched(before=False, gap=2, ends=False)
    first, *others = (record.seq for record in history.records if isinstance(record, Firmware))
    verdict = verdict_of("P13", history)
    assert "the first 2 records of the firmware are missing" in verdict.reason
    assert first in verdict.records and not {*others} & {*verdict.records}


def test_p13_that_each_context_was_decommissioned_once_rests_on_those_commands() -> None:
    history = moved()
    ends = [r.seq for r in history.records if isinstance(r, Firmware) and r.command == "DECOMMISSION"]
    verdict = verdict_of("P13", history)
    assert verdict.outcome is HELD and "each context was decommissioned once: 1" in verdict.reason
    assert ends and set(ends) <= set(verdict.records)
