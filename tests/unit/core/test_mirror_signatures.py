# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a moved mirror has signatures of its own: a finding about mirrors excuses nothing else."""

from __future__ import annotations

import pytest

from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped


def verdict(promise: str, moved: str, *, then: str = "", source: int, destination: int) -> Verdict:
    """An owner and its mirror; `moved` is moved to the destination. Then the two cgroups are charged so much, and the
    destination goes on paying."""
    b = Builder()
    b.begin()
    b.launch("owner", "source", "sev")
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("send_fd", "source", vm="owner", to="source")
    b.do("mirror", "source", vm="mirror", source="owner")
    b.observe("mirrored", {"source": 1}, guests=1)
    for number, vm in enumerate((moved, then) if then else (moved,)):
        b.launch(f"new-{number}", "destination")
        b.do("send_fd", "source", vm=vm, to="destination")
        b.move(vm, f"new-{number}", "destination")
    b.observe("moved", {"source": source, "destination": destination}, guests=1)
    b.exit("source")
    b.exit("destination")
    b.observe("end", {"destination": 1}, guests=0)
    return CHECKERS[promise](shipped("move-a-mirror"), b.history())


@pytest.mark.parametrize(
    ("moved", "then", "source", "destination", "after"),
    [
        ("mirror", "", 1, 1, "after-mirror-move"),
        ("mirror", "", 1, 2, "after-move"),  # more than the mirror
        ("mirror", "", 2, 0, "after-move"),  # not where the mirror went
        ("owner", "", 1, 1, "after-move"),
        ("owner", "mirror", 0, 2, "after-mirror-move"),
        ("owner", "mirror", 1, 2, "after-move"),
    ],
)
def test_the_signature_says_whether_it_is_the_mirror(
    moved: str, then: str, source: int, destination: int, after: str
) -> None:
    found = verdict("P1", moved, then=then, source=source, destination=destination)
    assert found.outcome is Outcome.BROKEN
    assert found.signature.split("+") == [f"overcharged-{after}:sev"]


def test_a_charge_that_is_left_by_a_mirror_says_so() -> None:
    assert "charge-left-after-mirror-move:sev" in verdict("P9", "mirror", source=1, destination=1).signature
    assert "charge-left-after-mirror-move" not in verdict("P9", "owner", source=1, destination=1).signature


@pytest.mark.parametrize(
    ("key", "signature"),
    [("sev", "overcharged-after-mirror-move:sev"), ("sev_es", "overcharged-after-move:sev_es")],
)
def test_a_moved_mirror_of_sev_es_is_charged_under_the_key_of_sev(key: str, signature: str) -> None:
    """Which is what finding 0004 says of it, and of no other key."""
    b = Builder()
    b.begin()
    b.launch("owner", "source", "sev_es")
    b.do("create", "source", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("mirror", "source", vm="mirror", source="owner")
    b.observe("mirrored", {"source": 1}, key="sev_es", guests=1)
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="mirror", to="destination")
    b.move("mirror", "new", "destination")
    seen = b.observe("moved", {"source": 1}, key="sev_es", guests=1)
    for cgroup in (".", "destination"):
        seen.misc[cgroup]["current"][key] += 1
    assert CHECKERS["P1"](shipped("move-a-mirror"), b.history()).signature == signature
