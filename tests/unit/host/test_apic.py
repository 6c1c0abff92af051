# SPDX-License-Identifier: Apache-2.0
"""What the page of a local APIC says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chaos.kvm.structs import Lapic
from chaos.kvm.vcpu import KvmVcpu


class Vcpu(KvmVcpu):
    """A vCPU that is nothing but its APIC. Bit n of a register of 256 bits is bit n % 32 of its word n // 32."""

    def __init__(self) -> None:
        self.page = Lapic()
        self.page.bytes[0xF0] = 0xFF  # as after a reset
        self.set = 0

    def lapic(self) -> Lapic:
        return Lapic.from_buffer_copy(self.page)

    def set_lapic(self, lapic: Lapic) -> None:
        self.page, self.set = lapic, self.set + 1

    def raise_(self, register: int, vector: int) -> None:
        word = register + 0x10 * (vector // 32)
        value = int.from_bytes(self.page.bytes[word : word + 4], "little") | 1 << vector % 32
        self.page.bytes[word : word + 4] = value.to_bytes(4, "little")


@pytest.fixture
def vcpu() -> Iterator[Any]:
    yield Vcpu()


def test_vectors_that_are_requested_or_in_service_are_told(vcpu: Any) -> None:
    assert vcpu.requested() == ()
    for register, vector in ((0x200, 32), (0x200, 71), (0x200, 255), (0x100, 48), (0x180, 50)):
        vcpu.raise_(register, vector)
    assert vcpu.requested() == (32, 48, 71, 255)  # 0x180 is of the trigger modes


def test_an_apic_is_enabled_once(vcpu: Any) -> None:
    vcpu.enable_apic()
    vcpu.enable_apic()
    assert bytes(vcpu.page.bytes[0xF0:0xF4]) == b"\xff\x01\0\0" and vcpu.set == 1
