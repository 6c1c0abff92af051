# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a moved mirror has signatures of its own: a finding about mirrors excuses nothing else."""

from __future__ import annotations

import pytest

from chaos.checkers import CHECKERS
from chaos.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, shipped


def verdict(promise: str, moved: str, *, then: str = "") -> Verdict:
    """An owner and its mirror; `moved` is moved to the destination, which pays and goes on paying."""
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
    b.observe("moved", {"source": 2, "destination": 2}, guests=1)
    b.exit("source")
    b.exit("destination")
    b.observe("end", {"destination": 1}, guests=0)
    return CHECKERS[promise](shipped("move-a-mirror"), b.history())


@pytest.mark.parametrize(
    ("moved", "then", "after"),
    [("mirror", "", "after-mirror-move"), ("owner", "", "after-move"), ("owner", "mirror", "after-move")],
)
def test_the_signature_says_whether_only_mirrors_moved(moved: str, then: str, after: str) -> None:
    found = verdict("P1", moved, then=then)
    assert found.outcome is Outcome.DEVIATED
    assert f"overcharged-{after}:sev" in found.signature.split("+")


def test_a_charge_that_is_left_by_a_mirror_says_so() -> None:
    assert "charge-left-after-mirror-move:sev" in verdict("P9", "mirror").signature
    assert "charge-left:sev" in verdict("P9", "owner").signature
