# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from chaos.lab.psp.memory import FOUR_GIB, BadAddress, Ram


def test_below_and_above_the_hole() -> None:
    ram = bytearray(b"low!high")
    memory = Ram(ram, below_4g=4)
    assert memory.read(0, 4) == b"low!"
    assert memory.read(FOUR_GIB, 4) == b"high"
    memory.write(FOUR_GIB + 1, b"AY")
    assert bytes(ram) == b"low!hAYh"


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (4, 1),
        (3, 2),
        (0, 5),
        (FOUR_GIB - 1, 1),
        (FOUR_GIB - 1, 2),
        (FOUR_GIB + 4, 1),
        (FOUR_GIB + 3, 2),
        (1 << 63, 1),
        ((1 << 64) - 1, 1),
        (0, -1),
    ],
)
def test_what_is_not_memory(address: int, length: int) -> None:
    memory = Ram(bytearray(8), below_4g=4)
    with pytest.raises(BadAddress):
        memory.read(address, length)
    if length >= 0:
        with pytest.raises(BadAddress):
            memory.write(address, bytes(length))


def test_all_of_it_below_by_default() -> None:
    memory = Ram(bytearray(8))
    assert memory.read(4, 4) == bytes(4)
    with pytest.raises(BadAddress):
        memory.read(FOUR_GIB, 1)
