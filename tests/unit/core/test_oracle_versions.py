# SPDX-License-Identifier: Apache-2.0
"""Which kernels the oracle's differences are those of."""

from __future__ import annotations

import pytest

from chaos.errors import UsageError
from chaos.judge import oracle


def test_every_difference_is_a_rule_with_a_source() -> None:
    assert [d.name for d in oracle.DIFFERENCES] == list(oracle.Rules.__dataclass_fields__)
    assert all("contract" in difference.source for difference in oracle.DIFFERENCES)


@pytest.mark.parametrize("kernel", ["", "six", "6", "6.12.117x", "6.12.117.1"])
def test_no_version(kernel: str) -> None:
    with pytest.raises(UsageError, match="no version") as refused:
        oracle.rules(kernel)
    assert refused.value.remedy == "a version is like 6.12.117"


def test_a_version_may_come_with_its_flavour() -> None:
    assert oracle.rules("6.12.117+deb13-amd64") == oracle.rules("6.12.117")
    assert oracle.rules("6.12").vm_types and not oracle.rules("6.9.12").vm_types
    assert oracle.rules("7.2.1").vmsa_once


@pytest.mark.parametrize(
    ("name", "without", "since"),
    [
        ("mirrored_source_moves", "5.17.15", "5.18"),
        ("second_init_invalid", "6.9.12", "6.10"),
        ("vcpu_creation_busy", "6.1.145", "6.1.146"),
        ("vcpu_creation_busy", "6.12.38", "6.12.39"),
        ("vcpu_creation_busy", "6.14.11", "6.15.7"),  # nothing was taken into 6.14
        ("vcpu_creation_busy", "6.15.6", "6.16"),
        ("vcpu_creation_locked", "7.2.13", "7.3"),
        ("vmsa_once", "6.12.116", "6.12.117"),
        ("irqfd_unique", "6.16.12", "6.17"),
        ("vmsa_once", "7.0.9", "7.1"),  # newer than 6.12.117, and of a series that has not taken it
    ],
)
def test_a_series_has_a_difference_from_its_own_first_version_on(name: str, without: str, since: str) -> None:
    assert not getattr(oracle.rules(without), name)
    assert getattr(oracle.rules(since), name)
