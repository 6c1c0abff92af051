# SPDX-License-Identifier: Apache-2.0
"""Offsets and sizes of the command buffers against section 5.4 of the kernel contract."""

from __future__ import annotations

import msgspec
import pytest

from chaos.lab.psp import buffers
from chaos.lab.psp.buffers import Buffer

# Class: total size, then for each field its offset and width, as the contract gives them.
CONTRACT: dict[type[Buffer], tuple[int, list[tuple[int, int]]]] = {
    buffers.InitBuffer: (20, [(0, 4), (4, 4), (8, 8), (16, 4)]),
    buffers.InitEx: (36, [(0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4)]),
    buffers.PlatformStatusBuffer: (12, [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (7, 1), (8, 4)]),
    buffers.Blob: (12, [(0, 8), (8, 4)]),
    buffers.TwoBlobs: (28, [(0, 8), (8, 4), (16, 8), (24, 4)]),
    buffers.Handle: (4, [(0, 4)]),
    buffers.Activate: (8, [(0, 4), (4, 4)]),
    buffers.GuestStatusBuffer: (13, [(0, 4), (4, 4), (8, 4), (12, 1)]),
    buffers.StartBuffer: (36, [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4)]),
    buffers.Region: (20, [(0, 4), (8, 8), (16, 4)]),
    buffers.Packet: (52, [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4)]),
    buffers.SendStart: (
        68,
        [(0, 4), (4, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 4), (56, 8), (64, 4)],
    ),
    buffers.Debug: (28, [(0, 4), (8, 8), (16, 8), (24, 4)]),
    buffers.Attestation: (36, [(0, 4), (8, 8), (16, 16), (32, 4)]),
}


def test_every_buffer_is_in_the_table() -> None:
    kinds = {kind for kind in vars(buffers).values() if isinstance(kind, type) and issubclass(kind, Buffer)}
    assert kinds - {Buffer} == set(CONTRACT)


@pytest.mark.parametrize("kind", CONTRACT, ids=lambda kind: kind.__name__)
def test_layout(kind: type[Buffer]) -> None:
    """Each field is read from its own bytes and from no others."""
    size, places = CONTRACT[kind]
    assert kind.size() == size
    fields = msgspec.structs.fields(kind)
    assert len(fields) == len(places)
    data = bytes(range(1, size + 1))
    value = kind.unpack(data)
    for field, (offset, width) in zip(fields, places, strict=True):
        raw = data[offset : offset + width]
        found = getattr(value, field.name)
        assert found == (raw if isinstance(found, bytes) else int.from_bytes(raw, "little")), field.name


@pytest.mark.parametrize("kind", CONTRACT, ids=lambda kind: kind.__name__)
def test_pack_is_the_inverse_but_for_reserved_bytes(kind: type[Buffer]) -> None:
    size, places = CONTRACT[kind]
    data = bytes(range(1, size + 1))
    packed = kind.unpack(data).pack()
    used = {offset + n for offset, width in places for n in range(width)}
    assert packed == bytes(byte if index in used else 0 for index, byte in enumerate(data))
