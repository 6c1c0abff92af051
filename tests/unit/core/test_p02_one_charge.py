# SPDX-License-Identifier: Apache-2.0
"""P2: a mirror that pays is named, moved or not."""

from __future__ import annotations

from errno import EBUSY, EINVAL

import pytest

from chaos.history.records import Observation, Record
from tests.unit.core.build import Builder, changed, moved
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, begun, verdict_of


def mirrored(*, charged: int = 0) -> Builder:
    b = begun()
    b.launch("owner", "source", "sev")
    mirror(b)
    b.observe("mirrored", {"source": 1, "destination": charged}, guests=1)
    return b


def mirror(b: Builder, *, error: int = 0) -> None:
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="other")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", error=error, vm="mirror", source="owner")


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


def test_a_moved_mirror_that_is_charged_more_than_once_is_not_the_known_finding() -> None:
    """Finding 0004 charges it one unit; whatever comes on top must not be excused with that."""
    verdict = verdict_of("P2", moved_mirror(charged=2).finish())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "moved-mirror-and-more-is-charged:sev")
    assert verdict.expected == ". sev 1; source sev 1"


@pytest.mark.parametrize(("charged", "guests"), [(0, 1), (1, 2)])
def test_a_mirror_is_blamed_for_no_charge_too_few_and_no_guest_too_many(charged: int, guests: int) -> None:
    b = mirrored()
    b.observe("wrong", {"source": charged, "destination": 0}, guests=guests)
    assert verdict_of("P2", b.finish()).outcome is not DEVIATED


def test_only_what_is_wrong_once_a_mirror_is_there_is_put_down_to_it() -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    b.observe("before", {"source": 1, "destination": 1}, guests=1)
    mirror(b)
    assert verdict_of("P2", b.finish()).outcome is not DEVIATED


def test_a_charge_that_is_the_mirror_s_instead_of_its_owner_s_is_named() -> None:
    b = mirrored()
    b.observe("wrong", {"source": 0, "destination": 1}, guests=1)
    assert verdict_of("P2", b.finish()).signature == "mirror-is-charged:sev"


def test_what_others_did_in_the_cgroup_does_not_make_a_mirror_a_moved_one() -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    mirror(b, error=EINVAL)
    mirror(b)
    b.launch("other", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="other", to="destination")
    b.move("other", "new", "destination")
    b.observe("mirrored", {"source": 1, "destination": 2})
    assert verdict_of("P2", b.finish()).signature == "mirror-is-charged:sev"


@pytest.mark.parametrize(("vm", "error"), [("mirror", EBUSY), ("other", 0)])
def test_only_a_mirror_that_was_moved_has_to_be_seen_again(vm: str, error: int) -> None:
    b = begun()
    b.launch("owner", "source", "sev")
    mirror(b)
    b.launch("other", "destination", "sev")
    b.observe("mirrored", {"source": 1, "destination": 1})
    b.launch("new", "source")
    b.do("send_fd", "destination", vm=vm, to="source")
    b.move(vm, "new", "source", error=error)
    assert verdict_of("P2", b.finish()).outcome is HELD


def test_p2_without_its_witness() -> None:
    assert "not read while it lived on" in verdict_of("P2", moved_mirror(look=False).finish()).reason

    def unread(record: Record) -> Record | None:
        return None if isinstance(record, Observation) and record.label == "mirrored" else record

    verdict = verdict_of("P2", changed(mirrored().finish(), unread))
    assert (verdict.outcome, verdict.reason) == (UNKNOWN, "the counters were not read while a mirror lived")
    b = mirrored()
    b.do("mirror", "destination", vm="mirror", source="owner")
    assert "cannot be told" in verdict_of("P2", b.finish()).reason
