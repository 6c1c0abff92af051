# SPDX-License-Identifier: Apache-2.0
"""The channel between a guest's owner (or another platform) and the firmware: keys, sessions and packets.

Both sides do ECDH on P-384; the x coordinate of the result gives, by the KDF of NIST SP 800-108 in counter mode, a
master secret, and that the two keys that wrap the transport keys TEK (encryption) and TIK (integrity). All keys are
16 bytes. The session, 128 bytes, is what the initiator hands over:

    nonce 16 | TEK and TIK under the KEK 32 | IV of that 16 | HMAC of those 32 under the KIK | HMAC of the policy 32

Sources: API 55766, "Trusted channels"; what it leaves open (byte order of counter and length in the KDF, 16 bytes of
KIK, x in big-endian) from AMD-ASPFW and `AMDESE/sev-tool`, which agree.
"""

from __future__ import annotations

import hashlib
import hmac
from struct import Struct, pack
from typing import Final

import msgspec

from chaos.lab.psp import curve
from chaos.lab.psp.certs import VERSION, Algorithm, Certificate, Usage
from chaos.lab.psp.numbers import (
    API_MAJOR,
    API_MINOR,
    PACKET_HEADER_SIZE,
    POLICY_RESERVED,
    SESSION_SIZE,
    FirmwareStatus,
)
from chaos.lab.psp.state import CommandRefused, Rng

SECRET: Final = 0x01
DATA: Final = 0x02  # VMSAs are sent under the same, although the API lists 0x03 for them
MEASURE: Final = 0x04
COMPRESSED: Final = 1 << 0

_SESSION: Final = Struct("<16s32s16s32s32s")
_HEADER: Final = Struct("<I16s32s")
assert _SESSION.size == SESSION_SIZE
assert _HEADER.size == PACKET_HEADER_SIZE


class SessionKeys(msgspec.Struct, frozen=True):
    """Transport keys, 16 bytes each."""

    tek: bytes
    tik: bytes


class PacketHeader(msgspec.Struct, frozen=True):
    """What goes before a packet: flags, IV of the encryption, and the MAC over it all."""

    flags: int
    iv: bytes
    mac: bytes

    @classmethod
    def unpack(cls, data: bytes) -> PacketHeader:
        return cls(*_HEADER.unpack(data))

    def pack(self) -> bytes:
        return _HEADER.pack(self.flags, self.iv, self.mac)


def kdf(key: bytes, label: bytes, context: bytes = b"", length: int = 16) -> bytes:
    """`length` bytes, by SP 800-108 in counter mode over HMAC-SHA-256, numbers in 32 bits little-endian."""
    out = b""
    for index in range(1, (length + 31) // 32 + 1):
        message = pack("<I", index) + label + b"\0" + context + pack("<I", length * 8)
        out += hmac.digest(key, message, hashlib.sha256)
    return out[:length]


def _master(private: bytes, peer: Certificate, nonce: bytes) -> bytes:
    known = peer.version == VERSION and peer.usage == Usage.PDH and peer.algorithm == Algorithm.ECDH_SHA256
    if not known or not peer.has_key:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)
    return kdf(curve.agree(private, peer.point), b"sev-master-secret", nonce)


def mac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-256."""
    return hmac.digest(key, message, hashlib.sha256)


def _check_mac(key: bytes, message: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(mac(key, message), expected):
        raise CommandRefused(FirmwareStatus.BAD_MEASUREMENT)


def accept(private: bytes, peer: Certificate, session: bytes, policy: int) -> SessionKeys:
    """The channel that `session` opens between us (`private`, the PDH) and `peer`, for a guest with `policy`."""
    nonce, wrapped, iv, wrap_mac, policy_mac = _SESSION.unpack(session)
    master = _master(private, peer, nonce)
    _check_mac(kdf(master, b"sev-kik"), wrapped, wrap_mac)
    keys = curve.aes_ctr(kdf(master, b"sev-kek"), iv, wrapped)
    channel = SessionKeys(tek=keys[:16], tik=keys[16:])
    _check_mac(channel.tik, pack("<I", policy), policy_mac)
    major, minor = policy >> 16 & 0xFF, policy >> 24 & 0xFF
    if (major, minor) > (API_MAJOR, API_MINOR) or policy & POLICY_RESERVED:
        raise CommandRefused(FirmwareStatus.POLICY_FAILURE)
    return channel


def initiate(private: bytes, peer: Certificate, policy: int, rng: Rng) -> tuple[SessionKeys, bytes]:
    """A new channel from us to `peer`, and the session that lets it in."""
    channel = SessionKeys(tek=rng.take(16), tik=rng.take(16))
    nonce, iv = rng.take(16), rng.take(16)
    master = _master(private, peer, nonce)
    wrapped = curve.aes_ctr(kdf(master, b"sev-kek"), iv, channel.tek + channel.tik)
    session = _SESSION.pack(
        nonce,
        wrapped,
        iv,
        mac(kdf(master, b"sev-kik"), wrapped),
        mac(channel.tik, pack("<I", policy)),
    )
    return channel, session


def measurement(tik: bytes, version: tuple[int, int, int], policy: int, digest: bytes, nonce: bytes) -> bytes:
    """What LAUNCH_MEASURE vouches for, under the TIK. `version` is API major and minor, and build."""
    return mac(tik, pack("<BBBBI", MEASURE, *version, policy) + digest + nonce)


def packet_message(context: int, flags: int, iv: bytes, data: bytes, measurement: bytes = b"") -> bytes:
    """What a packet's MAC is over. `data` is encrypted, and as long as what it decrypts to: nothing compresses."""
    return pack("<BI16sII", context, flags, iv, len(data), len(data)) + data + measurement


def seal(channel: SessionKeys, data: bytes, rng: Rng) -> tuple[PacketHeader, bytes]:
    """`data` as a packet: header and ciphertext."""
    iv = rng.take(16)
    ciphertext = curve.aes_ctr(channel.tek, iv, data)
    return PacketHeader(0, iv, mac(channel.tik, packet_message(DATA, 0, iv, ciphertext))), ciphertext


def unseal(channel: SessionKeys, header: PacketHeader, data: bytes, *, context: int, measurement: bytes = b"") -> bytes:
    """The plaintext of a packet, refused if its MAC is wrong or it is compressed."""
    _check_mac(channel.tik, packet_message(context, header.flags, header.iv, data, measurement), header.mac)
    if header.flags & COMPRESSED:
        raise CommandRefused(FirmwareStatus.UNSUPPORTED)
    return curve.aes_ctr(channel.tek, header.iv, data)
