# SPDX-License-Identifier: Apache-2.0
"""A guest's owner: what stands at the other end of a trusted channel. Written apart from the firmware, on purpose.

It uses `cryptography` and the layouts of API 55766 directly, and nothing of `chaos.lab.psp`.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CERT = 0x824
BODY = 0x414
PEK, OCA, PDH, CEK, NOBODY = 0x1002, 0x1001, 0x1003, 0x1004, 0x1000
ECDSA, ECDH, NO_ALGORITHM = 2, 3, 0


def little(number: int) -> bytes:
    return number.to_bytes(72, "little")


def body(usage: int, algorithm: int, key: ec.EllipticCurvePublicKey) -> bytes:
    """The signed part of a certificate."""
    numbers = key.public_numbers()
    head = struct.pack("<IBBHIII", 1, 0, 24, 0, usage, algorithm, 2)
    return (head + little(numbers.x) + little(numbers.y)).ljust(BODY, b"\0")


def signature(usage: int, key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """One place for a signature, filled."""
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return (struct.pack("<II", usage, ECDSA) + little(r) + little(s)).ljust(0x208, b"\0")


UNSIGNED = struct.pack("<II", NOBODY, NO_ALGORITHM).ljust(0x208, b"\0")


def public_key(certificate: bytes) -> ec.EllipticCurvePublicKey:
    x = int.from_bytes(certificate[0x14:0x5C], "little")
    y = int.from_bytes(certificate[0x5C:0xA4], "little")
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()


def verify(certificate: bytes, place: int, signer: bytes) -> None:
    """Raises InvalidSignature unless signature `place` (0 or 1) is by the key in `signer`, and says so."""
    offset = BODY + 0x208 * place
    usage, algorithm = struct.unpack_from("<II", certificate, offset)
    assert (usage, algorithm) == struct.unpack_from("<II", signer, 8)
    r = int.from_bytes(certificate[offset + 8 : offset + 80], "little")
    s = int.from_bytes(certificate[offset + 80 : offset + 152], "little")
    assert not any(certificate[offset + 152 : offset + 0x208])
    encoded = utils.encode_dss_signature(r, s)
    public_key(signer).verify(encoded, certificate[:BODY], ec.ECDSA(hashes.SHA256()))


def kdf(key: bytes, label: bytes, context: bytes = b"") -> bytes:
    message = struct.pack("<I", 1) + label + b"\0" + context + struct.pack("<I", 128)
    return hmac.new(key, message, "sha256").digest()[:16]


def aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()


@dataclass
class Owner:
    """Keys of one guest, and how to hand them over."""

    private: ec.EllipticCurvePrivateKey
    tek: bytes = b"T" * 16
    tik: bytes = b"I" * 16

    @classmethod
    def make(cls) -> Owner:
        return cls(ec.derive_private_key(0xC0FFEE, ec.SECP384R1()))

    def certificate(self) -> bytes:
        return body(PDH, ECDH, self.private.public_key()) + UNSIGNED + UNSIGNED

    def session(self, platform_pdh: bytes, policy: int) -> bytes:
        """128 bytes for LAUNCH_START."""
        nonce, iv = b"N" * 16, b"V" * 16
        secret = self.private.exchange(ec.ECDH(), public_key(platform_pdh))
        master = kdf(secret, b"sev-master-secret", nonce)
        wrapped = aes_ctr(kdf(master, b"sev-kek"), iv, self.tek + self.tik)
        wrap_mac = hmac.new(kdf(master, b"sev-kik"), wrapped, "sha256").digest()
        policy_mac = hmac.new(self.tik, struct.pack("<I", policy), "sha256").digest()
        return nonce + wrapped + iv + wrap_mac + policy_mac

    def secret(self, plain: bytes, measurement: bytes, flags: int = 0) -> tuple[bytes, bytes]:
        """Header and packet for LAUNCH_UPDATE_SECRET."""
        iv = b"W" * 16
        data = aes_ctr(self.tek, iv, plain)
        message = b"\1" + struct.pack("<I", flags) + iv + struct.pack("<II", len(plain), len(data))
        mac = hmac.new(self.tik, message + data + measurement, "sha256").digest()
        return struct.pack("<I", flags) + iv + mac, data
