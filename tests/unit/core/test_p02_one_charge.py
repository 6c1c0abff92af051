# SPDX-License-Identifier: Apache-2.0
"""P2: a mirror that pays is named, moved or not."""

from __future__ import annotations

from chaos.history.records import Observation, Record
from tests.unit.core.build import Builder, changed, moved
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, begun, verdict_of


def mirrored(*, charged: int = 0) -> Builder:
    b = begun()
    b.launch("owner", "source", "sev")
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="other")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", vm="mirror", source="owner")
    b.observe("mirrored", {"source": 1, "destination": charged}, guests=1)
    return b


def moved_mirror(*, charged: int = 0, look: bool = True) -> Builder:
    b = mirrored()
    b.launch("new", "source")
    b.do("send_fd", "destination", vm="mirror", to="source")
    b.move("mirror", "new", "source")
    if look:
        b.observe("moved", {"source": 1 + charged}, guests=1)
    return b


def test_p2() -> None:
    assert verdict_of("P2", mirrored().finish()).outcome is HELD
    assert verdict_of("P2", moved_mirror().finish()).outcome is HELD
    assert verdict_of("P2", moved()).outcome is UNKNOWN
    verdict = verdict_of("P2", mirrored(charged=1).finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "mirror-is-charged:sev")
    verdict = verdict_of("P2", moved_mirror(charged=1).finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "moved-mirror-is-charged:sev")
    assert verdict.seen == ". sev 2; source sev 2"


def test_p2_without_its_witness() -> None:
    assert "not read while it lived on" in verdict_of("P2", moved_mirror(look=False).finish()).reason

    def unread(record: Record) -> Record | None:
        return None if isinstance(record, Observation) and record.label == "mirrored" else record

    verdict = verdict_of("P2", changed(mirrored().finish(), unread))
    assert (verdict.outcome, verdict.reason) == (UNKNOWN, "the counters were not read while a mirror lived")
    b = mirrored()
    b.do("mirror", "destination", vm="mirror", source="owner")
    assert "cannot be told" in verdict_of("P2", b.finish()).reason
