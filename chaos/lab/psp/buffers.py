# SPDX-License-Identifier: Apache-2.0
"""The buffers a command register points at, packed and little-endian, as typed values.

One frozen struct a buffer; its fields are in the order of the bytes, and `LAYOUT` says how wide each one is, with `x`
for reserved bytes nobody looks at. Sizes are checked at import against section 5.4 of the kernel contract. They are
msgspec's structs because those are made much faster than dataclasses, and every lab waits for this import.
"""

from __future__ import annotations

from struct import Struct
from typing import ClassVar, Final, Self

import msgspec


class Buffer(msgspec.Struct, frozen=True):
    """Base of all. `pack` and `unpack` are exact inverses but for reserved bytes, which pack as zero."""

    LAYOUT: ClassVar[Struct] = Struct("<")

    @classmethod
    def size(cls) -> int:
        """Length in bytes."""
        return cls.LAYOUT.size

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The value in `data`, which is exactly `size()` bytes long (struct.error otherwise)."""
        return cls(*cls.LAYOUT.unpack(data))

    def pack(self) -> bytes:
        """The bytes of this value, `size()` of them."""
        return self.LAYOUT.pack(*msgspec.structs.astuple(self))


class InitBuffer(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<IIQI")
    flags: int
    reserved: int
    tmr_address: int
    tmr_len: int


class InitEx(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<IIQIIQI")
    length: int
    flags: int
    tmr_address: int
    tmr_len: int
    reserved: int
    nv_address: int
    nv_len: int


class PlatformStatusBuffer(Buffer, frozen=True):
    """`owner` is bit 0 of byte 3 and `config` bits 15:0 from byte 4, which the kernel reads as one 32-bit `flags`."""

    LAYOUT: ClassVar[Struct] = Struct("<BBBBHxBI")
    api_major: int
    api_minor: int
    state: int
    owner: int
    config: int
    build: int
    guest_count: int


class Blob(Buffer, frozen=True):
    """PEK_CSR, GET_ID and DOWNLOAD_FIRMWARE."""

    LAYOUT: ClassVar[Struct] = Struct("<QI")
    address: int
    length: int


class TwoBlobs(Buffer, frozen=True):
    """PEK_CERT_IMPORT (PEK, OCA) and PDH_CERT_EXPORT (PDH, chain)."""

    LAYOUT: ClassVar[Struct] = Struct("<QI4xQI")
    first_address: int
    first_length: int
    second_address: int
    second_length: int


class Handle(Buffer, frozen=True):
    """DECOMMISSION, DEACTIVATE, LAUNCH_FINISH, SEND_FINISH, SEND_CANCEL, RECEIVE_FINISH."""

    LAYOUT: ClassVar[Struct] = Struct("<I")
    handle: int


class Activate(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<II")
    handle: int
    asid: int


class GuestStatusBuffer(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<IIIB")
    handle: int
    policy: int
    asid: int
    state: int


class StartBuffer(Buffer, frozen=True):
    """LAUNCH_START and RECEIVE_START. `handle` goes in as the guest to share a key with (0: none)."""

    LAYOUT: ClassVar[Struct] = Struct("<IIQI4xQI")
    handle: int
    policy: int
    cert_address: int
    cert_length: int
    session_address: int
    session_length: int


class Region(Buffer, frozen=True):
    """LAUNCH_UPDATE_DATA, LAUNCH_UPDATE_VMSA and LAUNCH_MEASURE."""

    LAYOUT: ClassVar[Struct] = Struct("<I4xQI")
    handle: int
    address: int
    length: int


class Packet(Buffer, frozen=True):
    """LAUNCH_UPDATE_SECRET, and SEND_ and RECEIVE_UPDATE_DATA and _VMSA."""

    LAYOUT: ClassVar[Struct] = Struct("<I4xQI4xQI4xQI")
    handle: int
    header_address: int
    header_length: int
    guest_address: int
    guest_length: int
    transport_address: int
    transport_length: int


class SendStart(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<IIQI4xQI4xQI4xQI")
    handle: int
    policy: int
    pdh_address: int
    pdh_length: int
    platform_address: int
    platform_length: int
    amd_address: int
    amd_length: int
    session_address: int
    session_length: int


class Debug(Buffer, frozen=True):
    """DBG_DECRYPT and DBG_ENCRYPT."""

    LAYOUT: ClassVar[Struct] = Struct("<I4xQQI")
    handle: int
    source: int
    destination: int
    length: int


class Attestation(Buffer, frozen=True):
    LAYOUT: ClassVar[Struct] = Struct("<I4xQ16sI")
    handle: int
    address: int
    nonce: bytes
    length: int


_SIZES: Final[dict[type[Buffer], int]] = {
    InitBuffer: 20,
    InitEx: 36,
    PlatformStatusBuffer: 12,
    Blob: 12,
    TwoBlobs: 28,
    Handle: 4,
    Activate: 8,
    GuestStatusBuffer: 13,
    StartBuffer: 36,
    Region: 20,
    Packet: 52,
    SendStart: 68,
    Debug: 28,
    Attestation: 36,
}
for _kind, _size in _SIZES.items():
    assert _kind.size() == _size, f"{_kind.__name__} is {_kind.size()} bytes, the contract says {_size}"
