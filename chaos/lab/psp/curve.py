# SPDX-License-Identifier: Apache-2.0
"""P-384 and AES as the firmware uses them. The only module that needs `cryptography`, and it asks for it late.

Most labs never see a certificate, and the import costs more than the rest of the start together.

Private keys are 48-byte big-endian scalars, points are pairs of numbers. Signatures are deterministic (RFC 6979), so
that the same seed gives the same certificates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SCALAR_SIZE: Final = 48
SEED_SIZE: Final = SCALAR_SIZE + 8  # FIPS 186-4 B.4.1: 64 bits more than the order, so that the rest is unbiased
_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973

CurvePoint = tuple[int, int]


def scalar(seed: bytes) -> bytes:
    """A private key from SEED_SIZE random bytes."""
    return (int.from_bytes(seed, "big") % (_ORDER - 1) + 1).to_bytes(SCALAR_SIZE, "big")


@lru_cache(maxsize=64)
def _private(key: bytes) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(int.from_bytes(key, "big"), ec.SECP384R1())


def _public(point: CurvePoint) -> EllipticCurvePublicKey:
    """ValueError if `point` is not on the curve."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.EllipticCurvePublicNumbers(*point, ec.SECP384R1()).public_key()


def public(key: bytes) -> CurvePoint:
    """The public half of a private key."""
    numbers = _private(key).public_key().public_numbers()
    return numbers.x, numbers.y


def valid(point: CurvePoint) -> bool:
    """Whether `point` is on the curve."""
    try:
        _public(point)
    except ValueError:
        return False
    return True


def sign(key: bytes, message: bytes) -> tuple[int, int]:
    """ECDSA with SHA-256 over `message`."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    signature = _private(key).sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return utils.decode_dss_signature(signature)


def verify(point: CurvePoint, message: bytes, signature: tuple[int, int], *, sha384: bool = False) -> bool:
    """Whether `signature` over `message` is that of the owner of `point`, a valid point."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    digest = hashes.SHA384() if sha384 else hashes.SHA256()
    try:
        _public(point).verify(utils.encode_dss_signature(*signature), message, ec.ECDSA(digest))
    except InvalidSignature:
        return False
    return True


def agree(key: bytes, point: CurvePoint) -> bytes:
    """ECDH: the x coordinate of the shared point, 48 bytes big-endian. `point` is a valid one."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return _private(key).exchange(ec.ECDH(), _public(point))


def aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    """AES-128 in counter mode; its own inverse."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return encryptor.update(data) + encryptor.finalize()
