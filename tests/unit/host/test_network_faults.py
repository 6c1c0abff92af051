# SPDX-License-Identifier: Apache-2.0
"""Faults of the network: what they are told, and what they take for proof. That they strike is for the lab's tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

from chaos.errors import UsageError
from chaos.fault import find
from chaos.netns import netem
from chaos.netns.netem import Impairment, Reading
from chaos.runner.fault_context import RunContext
from faults import network
from faults.network import LinkFlap, Netem


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("netem", {}, "nothing is impaired"),
        ("netem", {"loss": 101}, "loss"),
        ("netem", {"reordering": 5}, "reordering does nothing without a delay"),
        ("netem", {"delay": 1, "way": "up"}, "way"),
        ("netem", {"delai": 1}, "has no option 'delai'"),
        ("link-flap", {"times": 0}, "times is 1 to 100"),
        ("partition", {"loss": 3}, "has no option 'loss'"),
        ("partition", {"by": "hand"}, "by"),
        ("netem", {"delay": 1, "by": "kernel"}, "by"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        find(name, options)


class Someone:
    pid = os.getpid()


class Context:
    """One link, on which `readings` are what netem says of each end, one after the other."""

    def chance(self) -> int:
        return 7

    @property
    def vmms(self) -> dict[str, Someone]:
        return {"source": Someone()}

    def links(self, vmm: str) -> tuple[Any, ...]:
        return (("own", "other", Someone()),)


def reading(asked: Impairment, passed: int = 0, dropped: int = 0) -> Reading:
    return Reading(impairment=asked, passed=passed, octets=0, dropped=dropped, reordered=0, waiting=0)


def seen(monkeypatch: pytest.MonkeyPatch, fault: Netem, counts: tuple[int, int, int], **after: int) -> bool | None:
    """The evidence when netem has counted `after`, and the IP layers what was sent, came and was wrong meanwhile."""
    asked: list[Impairment] = []

    def apply(end: object, impairment: Impairment) -> Reading:
        asked.append(impairment)
        return reading(impairment)

    snmp = iter([network._Counts(0, 0, 0)] * len(("out", "in")) + [network._Counts(*counts)] * 2)
    monkeypatch.setattr(netem, "apply", apply)
    monkeypatch.setattr(netem, "read", lambda end: reading(asked[0], **after))
    monkeypatch.setattr(network, "_counts", lambda sender, receiver: next(snmp))
    fault.apply(Context(), "source")  # type: ignore[arg-type]
    return fault.evidence(Context(), "source").struck  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "counts", "after", "expected"),
    [
        ({"loss": 10}, (9, 9, 0), {"passed": 9}, None),  # nothing was dropped: not yet
        ({"loss": 10}, (9, 8, 0), {"passed": 9, "dropped": 1}, True),
        ({"delay": 5}, (0, 0, 0), {}, None),  # nobody has sent anything
        ({"delay": 5}, (1, 1, 0), {"passed": 1}, True),
        ({"duplication": 10}, (9, 9, 0), {"passed": 9}, None),
        ({"duplication": 10}, (9, 10, 0), {"passed": 10}, True),
        ({"corruption": 10}, (9, 9, 0), {"passed": 9}, None),
        ({"corruption": 10}, (9, 9, 2), {"passed": 9}, True),
        ({"corruption": 10, "loss": 10}, (9, 9, 2), {"passed": 9}, None),  # each effect must be met
    ],
)
def test_only_what_packets_have_met_is_proof(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], counts: tuple[int, int, int], after: dict[str, int],
    expected: bool | None,
) -> None:  # fmt: skip
    assert seen(monkeypatch, Netem(**options), counts, **after) is expected


def test_what_was_never_applied_has_no_proof() -> None:
    assert Netem(loss=5).evidence(Context(), "source").struck is None  # type: ignore[arg-type]
    assert LinkFlap().evidence(Context(), "source").struck is False  # type: ignore[arg-type]


def test_the_ip_layers_counters_are_read() -> None:
    counts = network._counts(os.getpid(), os.getpid())
    assert counts is not None and counts.sent >= 0
    assert network._counts(os.getpid(), 0x3FFFFFFF) is None


def test_what_is_left_to_chance_follows_from_the_runs_seed() -> None:
    def drawn(seed: int) -> list[int]:
        ctx = RunContext(None, None, None, None, None, None, None, None, None, seed=seed)  # type: ignore[arg-type]
        return [ctx.chance() for _ in range(3)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert len({*drawn(5), *drawn(6)}) == 6
