# SPDX-License-Identifier: Apache-2.0
"""P10: limits that did not stop a charge, and events that were not counted."""

from __future__ import annotations

from errno import EBUSY

import msgspec

from chaos.history import History, Observation, Record
from tests.unit.core.build import changed, moved
from tests.unit.core.doctored import HELD, UNKNOWN, begun, see, verdict_of


def limited(*, error: int = EBUSY, counted: int = 1, above: int = 1, again: bool = True) -> History:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    see(b, "before", {"source": 1}, limits={"destination": 0})
    b.move("old", "new", "destination", error=error)
    if again:
        where = "source" if error else "destination"
        events = {"destination": counted, ".": above}
        see(b, "after", {where: 1}, limits={"destination": 0}, events=events)
    return b.end()


def test_p10() -> None:
    verdict = verdict_of("P10", limited())
    assert verdict.outcome is HELD, verdict.reason
    assert "the limit of destination stopped move of new" in verdict.reason
    assert verdict_of("P10", limited(counted=0)).signature == "event-missing:sev"
    assert verdict_of("P10", limited(above=3)).signature == "event-unexplained:sev"
    verdict = verdict_of("P10", limited(error=0, counted=0, above=0))
    assert verdict.signature == "over-limit:move"


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
