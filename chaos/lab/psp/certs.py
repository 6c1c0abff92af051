# SPDX-License-Identifier: Apache-2.0
"""SEV certificates: 0x824 bytes, a public key and up to two signatures over the first 0x414 of them.

    0x000 version 4 | API major 1, minor 1, reserved 2 | usage 4 | algorithm 4
    0x010 key, 0x404: curve 4, x 72, y 72, zeros
    0x414 first signature: usage 4, algorithm 4, 0x200: r 72, s 72, zeros
    0x61C second signature

Numbers and coordinates are little-endian. Source: API 55766, appendix on certificates, and `sev_cert.h` of AMD-ASPFW.

The chain is PDH, signed by PEK, signed by the owner's OCA (which signs itself) and by the chip's CEK. A real CEK is
signed by AMD's ASK; the lab's is signed by nobody, so a chain of the lab ends there.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from struct import Struct
from typing import Final, Self

import msgspec

from chaos.lab.psp import curve
from chaos.lab.psp.numbers import API_MAJOR, API_MINOR, CERT_SIZE, FirmwareStatus
from chaos.lab.psp.state import CommandRefused, Identity, Rng

VERSION: Final = 1
CURVE_P384: Final = 2
BODY_SIZE: Final = 0x414

_BODY: Final = Struct("<IBB2xIII72s72s880x")
_SIGNATURE: Final = Struct("<II72s72s368x")
assert _BODY.size == BODY_SIZE
assert BODY_SIZE + 2 * _SIGNATURE.size == CERT_SIZE


class Usage(IntEnum):
    ARK = 0x0000
    ASK = 0x0013
    INVALID = 0x1000
    OCA = 0x1001
    PEK = 0x1002
    PDH = 0x1003
    CEK = 0x1004


class Algorithm(IntEnum):
    INVALID = 0x000
    ECDSA_SHA256 = 0x002
    ECDH_SHA256 = 0x003
    ECDSA_SHA384 = 0x102
    ECDH_SHA384 = 0x103


_SIGNERS: Final = {  # who may have signed what
    Usage.PDH: (Usage.PEK,),
    Usage.PEK: (Usage.OCA, Usage.CEK),
    Usage.OCA: (Usage.OCA,),
    Usage.CEK: (Usage.ASK,),
}


class Signature(msgspec.Struct, frozen=True):
    """One of the two places for a signature; empty with usage and algorithm INVALID."""

    usage: int = Usage.INVALID
    algorithm: int = Algorithm.INVALID
    r: int = 0
    s: int = 0

    def pack(self) -> bytes:
        return _SIGNATURE.pack(self.usage, self.algorithm, _little(self.r), _little(self.s))

    @property
    def malformed(self) -> bool:
        return (self.usage == Usage.INVALID) != (self.algorithm == Algorithm.INVALID)


class Certificate(msgspec.Struct, frozen=True):
    """A certificate taken apart. `body` is what is signed, as bytes; the other fields are what it says."""

    body: bytes
    usage: int
    algorithm: int
    curve_id: int
    point: curve.CurvePoint
    version: int
    signatures: tuple[Signature, Signature]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The certificate in CERT_SIZE bytes, whatever they are: nothing is judged here."""
        version, _major, _minor, usage, algorithm, curve_id, x, y = _BODY.unpack_from(data)
        first, second = (
            Signature(usage, algorithm, int.from_bytes(r, "little"), int.from_bytes(s, "little"))
            for usage, algorithm, r, s in (
                _SIGNATURE.unpack_from(data, offset) for offset in (BODY_SIZE, BODY_SIZE + _SIGNATURE.size)
            )
        )
        return cls(
            body=data[:BODY_SIZE],
            usage=usage,
            algorithm=algorithm,
            curve_id=curve_id,
            point=(int.from_bytes(x, "little"), int.from_bytes(y, "little")),
            version=version,
            signatures=(first, second),
        )

    def pack(self) -> bytes:
        """CERT_SIZE bytes."""
        return self.body + b"".join(signature.pack() for signature in self.signatures)

    @property
    def has_key(self) -> bool:
        """Whether there is a public key of use in it."""
        known = self.usage in (Usage.OCA, Usage.PEK, Usage.PDH, Usage.CEK) and self.algorithm in (
            Algorithm.ECDSA_SHA256,
            Algorithm.ECDH_SHA256,
            Algorithm.ECDSA_SHA384,
            Algorithm.ECDH_SHA384,
        )
        return known and self.curve_id == CURVE_P384 and curve.valid(self.point)


def _little(number: int) -> bytes:
    return number.to_bytes(72, "little")


def make(usage: Usage, key: bytes, *signers: tuple[Usage, bytes]) -> Certificate:
    """The certificate of the public half of `key`, signed by each of up to two `signers` (usage and private key)."""
    algorithm = Algorithm.ECDH_SHA256 if usage is Usage.PDH else Algorithm.ECDSA_SHA256
    x, y = curve.public(key)
    body = _BODY.pack(VERSION, API_MAJOR, API_MINOR, usage, algorithm, CURVE_P384, _little(x), _little(y))
    signed = [Signature(signer, Algorithm.ECDSA_SHA256, *curve.sign(private, body)) for signer, private in signers]
    first, second = (*signed, Signature(), Signature())[:2]
    return Certificate(body, usage, algorithm, CURVE_P384, (x, y), VERSION, (first, second))


def validate(certificate: Certificate, signer: Certificate) -> None:
    """Refuse unless `certificate` is well formed and bears a good signature of `signer`, who may sign such."""
    if not signer.has_key:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)
    _check_signature(certificate, signer)
    if certificate.version != VERSION or not certificate.has_key:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)
    if signer.usage not in _SIGNERS[Usage(certificate.usage)]:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)


def _check_signature(certificate: Certificate, signer: Certificate) -> None:
    if any(signature.malformed for signature in certificate.signatures):
        raise CommandRefused(FirmwareStatus.BAD_SIGNATURE)
    mine = [
        signature
        for signature in certificate.signatures
        if (signature.usage, signature.algorithm) == (signer.usage, signer.algorithm)
    ]
    if not mine:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)
    if signer.algorithm not in (Algorithm.ECDSA_SHA256, Algorithm.ECDSA_SHA384):
        raise CommandRefused(FirmwareStatus.UNSUPPORTED)
    sha384 = signer.algorithm == Algorithm.ECDSA_SHA384
    if not any(
        curve.verify(signer.point, certificate.body, (signature.r, signature.s), sha384=sha384) for signature in mine
    ):
        raise CommandRefused(FirmwareStatus.BAD_SIGNATURE)


# -- the platform's own


def generate(rng: Rng) -> Identity:
    """New OCA, PEK and PDH; the platform owns itself."""
    oca, pek, pdh = (curve.scalar(rng.take(curve.SEED_SIZE)) for _ in range(3))
    return Identity(oca=oca, pek=pek, pdh=pdh)


@lru_cache(maxsize=8)
def cek(chip: bytes) -> bytes:
    """The chip endorsement key: the chip's own for life."""
    return curve.scalar(Rng(chip).take(curve.SEED_SIZE))


@lru_cache(maxsize=8)
def pek_certificate(identity: Identity, chip: bytes) -> Certificate:
    """The PEK's: the owner's after an import, else signed by the OCA and the CEK, in this order."""
    if identity.externally_owned:
        return Certificate.unpack(identity.pek_cert)
    return make(Usage.PEK, identity.pek, (Usage.OCA, identity.oca), (Usage.CEK, cek(chip)))


@lru_cache(maxsize=8)
def oca_certificate(identity: Identity) -> Certificate:
    """The OCA's, signed by itself: the owner's after an import."""
    if identity.externally_owned:
        return Certificate.unpack(identity.oca_cert)
    return make(Usage.OCA, identity.oca, (Usage.OCA, identity.oca))


@lru_cache(maxsize=8)
def pdh_certificate(identity: Identity) -> Certificate:
    """The PDH's, signed by the PEK."""
    return make(Usage.PDH, identity.pdh, (Usage.PEK, identity.pek))


@lru_cache(maxsize=8)
def chain(identity: Identity, chip: bytes) -> bytes:
    """PEK, OCA and CEK, the last one unsigned: signing it is AMD's part."""
    certificates = (
        pek_certificate(identity, chip),
        oca_certificate(identity),
        make(Usage.CEK, cek(chip)),
    )
    return b"".join(certificate.pack() for certificate in certificates)


def imported(identity: Identity, chip: bytes, pek: Certificate, oca: Certificate, rng: Rng) -> Identity:
    """`identity` owned from outside: `pek` is our PEK signed by `oca`. A new PDH comes with it.

    Refused unless `oca` signs itself and `pek`, and `pek` is to the byte the key and body we gave out.
    """
    validate(oca, oca)
    validate(pek, oca)
    current = pek_certificate(identity, chip)
    if pek.body != current.body:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)
    endorsement = next(signature for signature in current.signatures if signature.usage == Usage.CEK)
    places = list(pek.signatures)
    try:
        places[places.index(Signature())] = endorsement
    except ValueError:
        raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE) from None
    full = Certificate(pek.body, pek.usage, pek.algorithm, pek.curve_id, pek.point, pek.version, (places[0], places[1]))
    return Identity(
        oca=b"",
        pek=identity.pek,
        pdh=curve.scalar(rng.take(curve.SEED_SIZE)),
        pek_cert=full.pack(),
        oca_cert=oca.pack(),
    )
