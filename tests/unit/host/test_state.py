# SPDX-License-Identifier: Apache-2.0
"""What is said of a vCPU that is not what it was given to be."""

from __future__ import annotations

import struct

import pytest

from chaos.kvm.structs import Regs, Sregs
from chaos.vmm.state import differences


def msrs(**values: int) -> bytes:
    return b"".join(struct.pack("<IQ", int(name[1:], 16), value) for name, value in values.items())


def state(**parts: bytes) -> dict[str, bytes]:
    whole = {"regs": bytes(Regs(rax=1, rip=0x1000)), "sregs": bytes(Sregs(cr0=1)), "xsave": bytes(4096)}
    whole |= {"msrs": msrs(x10=1000, x174=7, x6e0=8000), "lapic": lapic(), "tsc_offset": bytes(8)}
    return whole | parts


def lapic(*, count: int = 8000, initial: int = 10_000) -> bytes:
    """An APIC whose timer runs."""
    page = bytearray(1024)
    struct.pack_into("<I", page, 0x380, initial)
    struct.pack_into("<I", page, 0x390, count)
    return bytes(page)


def test_what_is_as_it_was_given_differs_in_nothing() -> None:
    assert list(differences(state(), state())) == []


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (state(regs=bytes(Regs(rax=2, rip=0x1000))), ["regs rax"]),
        (state(regs=bytes(Regs(rax=1, rip=0x1001))), ["regs rip"]),
        (state(sregs=bytes(Sregs(cr0=1, cr4=1))), ["sregs cr4"]),
        (state(xsave=bytes(512) + b"\1" + bytes(3583)), ["xsave at 512"]),
        (state(xsave=bytes(100)), ["xsave at 100"]),
        (state(msrs=msrs(x10=1000, x174=8, x6e0=8000)), ["msr 0x174"]),
        (state(msrs=msrs(x10=1000, x6e0=8000)), ["msr 0x174"]),
        (state(msrs=msrs(x10=5000, x174=7, x6e0=8000)), []),  # time goes on
        (state(msrs=msrs(x10=999, x174=7, x6e0=8000)), ["msr 0x10"]),  # and never back
        (state(tsc_offset=bytes(7) + b"\1"), ["tsc_offset at 7"]),
        (state(msrs=msrs(x10=1000, x174=7, x6e0=0)), []),  # the deadline has passed
        (state(msrs=msrs(x10=1000, x174=7, x6e0=8001)), ["msr 0x6e0"]),
        (state(lapic=lapic(count=4000)), []),  # the timer counts down, or begins anew
        (state(lapic=lapic(count=9000)), []),
        (state(lapic=lapic(count=8000, initial=1)), ["lapic at 896"]),
    ],
)
def test_a_difference_is_named(found: dict[str, bytes], named: list[str]) -> None:
    assert list(differences(state(), found)) == named


def test_a_part_that_is_missing_differs() -> None:
    found = state()
    del found["xsave"]
    assert list(differences(state(), found)) == ["xsave at 0"]
