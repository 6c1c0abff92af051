# SPDX-License-Identifier: Apache-2.0
"""The platform: initialisation, identity, certificates, flushing. Each function is one command.

The identity is kept in flash, which survives SHUTDOWN and is what a snapshot calls `flash`, or, after INIT_EX, in 32
KiB of the machine's memory, which the driver keeps in a file. What is in there is this firmware's own business; here:

    "SVCH" | length 4 | identity as JSON | HMAC-SHA-256 of that under the chip's secret

A store whose first four bytes are all ones is empty. Anything else that does not check is SECURE_DATA_INVALID, and
erased, so that the next try finds it empty: the driver counts on it, since its file begins as zeros.
"""

from __future__ import annotations

import hashlib
import hmac
from struct import pack, unpack_from
from typing import Final

import msgspec
from msgspec.structs import replace

from chaos.lab.psp import certs
from chaos.lab.psp.buffers import Blob, InitBuffer, InitEx, PlatformStatusBuffer, TwoBlobs
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.numbers import (
    API_MAJOR,
    API_MINOR,
    BUILD,
    CERT_SIZE,
    CHAIN_SIZE,
    CONFIG_ES,
    ID_SIZE,
    INIT_EX_LENGTH,
    NV_SIZE,
    PAGE_SIZE,
    TMR_SIZE,
    FirmwareStatus,
    PlatformState,
)
from chaos.lab.psp.state import CommandRefused, Identity

_NV_MAGIC: Final = b"SVCH"
_NV_EMPTY: Final = b"\xff\xff\xff\xff"
_IMAGE_HEADER: Final = 0x100


def init(firmware: SoftwareFirmware, request: InitBuffer) -> None:
    firmware.need(PlatformState.UNINIT)
    if request.flags & ~CONFIG_ES or request.reserved:
        raise CommandRefused(FirmwareStatus.INVALID_CONFIG)
    _start(firmware, request, firmware.flash or _fresh(firmware, 0), nv_address=0)


def init_ex(firmware: SoftwareFirmware, request: InitEx) -> None:
    firmware.need(PlatformState.UNINIT)
    if request.flags & ~CONFIG_ES or request.reserved:
        raise CommandRefused(FirmwareStatus.INVALID_CONFIG)
    if request.length != INIT_EX_LENGTH:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    if not request.nv_address:  # 0 means the flash
        _start(firmware, request, firmware.flash or _fresh(firmware, 0), nv_address=0)
        return
    if request.nv_address % PAGE_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    firmware.read(request.nv_address, request.nv_len)  # raises BadAddress
    if request.nv_len != NV_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    nv, tmr = firmware.physical(request.nv_address), firmware.physical(request.tmr_address)
    apart = nv + NV_SIZE <= tmr or nv >= tmr + TMR_SIZE
    if request.flags & CONFIG_ES and not apart:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    stored = _retrieve(firmware, request.nv_address)
    _start(firmware, request, stored or _fresh(firmware, request.nv_address), nv_address=request.nv_address)


def _start(firmware: SoftwareFirmware, request: InitBuffer | InitEx, identity: Identity, *, nv_address: int) -> None:
    """The common end of INIT and INIT_EX: take the TMR, make every ASID dirty, be initialised."""
    if request.flags & CONFIG_ES:
        if request.tmr_address % TMR_SIZE:
            raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
        if request.tmr_len != TMR_SIZE:
            raise CommandRefused(FirmwareStatus.INVALID_LEN)
        start = firmware.physical(request.tmr_address)
        firmware.read(start, TMR_SIZE)  # raises BadAddress
        firmware.tmr = range(start, start + TMR_SIZE)
    firmware.es_enabled = bool(request.flags & CONFIG_ES)
    firmware.identity = identity
    firmware.nv_address = nv_address
    firmware.dirty = set(range(1, firmware.config.max_asid + 1))
    firmware.wbinvd_done = False
    firmware.platform = PlatformState.INIT


def _fresh(firmware: SoftwareFirmware, nv_address: int) -> Identity:
    identity = certs.generate(firmware.rng)
    _store(firmware, identity, nv_address)
    return identity


def _store(firmware: SoftwareFirmware, identity: Identity, nv_address: int) -> None:
    if not nv_address:
        firmware.flash = identity
        return
    body = msgspec.json.encode(identity)
    packed = _NV_MAGIC + pack("<I", len(body)) + body + hmac.digest(firmware.config.chip, body, hashlib.sha256)
    firmware.write(nv_address, packed.ljust(NV_SIZE, b"\xff"))


def _retrieve(firmware: SoftwareFirmware, nv_address: int) -> Identity | None:
    """The identity kept at `nv_address`, None if it is empty."""
    data = firmware.read(nv_address, NV_SIZE)
    if data.startswith(_NV_EMPTY):
        return None
    (length,) = unpack_from("<I", data, 4)
    body, seal = data[8 : 8 + length], data[8 + length : 8 + length + 32]
    good = hmac.compare_digest(seal, hmac.digest(firmware.config.chip, body, hashlib.sha256))
    if not data.startswith(_NV_MAGIC) or not good:
        firmware.write(nv_address, b"\xff" * NV_SIZE)
        raise CommandRefused(FirmwareStatus.SECURE_DATA_INVALID)
    return msgspec.json.decode(body, type=Identity)


def _become(firmware: SoftwareFirmware, identity: Identity) -> None:
    _store(firmware, identity, firmware.nv_address)
    firmware.identity = identity


def shutdown(firmware: SoftwareFirmware, _request: None) -> None:
    """Allowed in every state. All guests go."""
    firmware.reset()


def factory_reset(firmware: SoftwareFirmware, _request: None) -> None:
    """Empties the flash; what INIT_EX keeps in memory is for the host to delete."""
    firmware.need(PlatformState.UNINIT)
    firmware.flash = None


def platform_status(firmware: SoftwareFirmware, _request: None) -> PlatformStatusBuffer:
    """Allowed in every state."""
    identity = firmware.identity
    return PlatformStatusBuffer(
        api_major=API_MAJOR,
        api_minor=API_MINOR,
        state=firmware.platform,
        owner=int(identity is not None and identity.externally_owned),
        config=CONFIG_ES if firmware.es_enabled else 0,
        build=BUILD,
        guest_count=len(firmware.guests),
    )


def pek_gen(firmware: SoftwareFirmware, _request: None) -> None:
    """A new OCA, PEK and PDH; an owner from outside is forgotten."""
    firmware.need(PlatformState.INIT)
    _become(firmware, certs.generate(firmware.rng))


def pdh_gen(firmware: SoftwareFirmware, _request: None) -> None:
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    fresh = certs.generate(firmware.rng).pdh
    _become(firmware, replace(firmware.known_identity(), pdh=fresh))


def pek_csr(firmware: SoftwareFirmware, request: Blob) -> Blob:
    """The PEK's certificate without signatures, for an owner to sign."""
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    if request.length < CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, length=CERT_SIZE))
    pek = certs.pek_certificate(firmware.known_identity(), firmware.config.chip)
    unsigned = replace(pek, signatures=(certs.Signature(), certs.Signature()))
    firmware.write(request.address, unsigned.pack())
    return replace(request, length=CERT_SIZE)


def pek_cert_import(firmware: SoftwareFirmware, request: TwoBlobs) -> None:
    firmware.need(PlatformState.INIT)
    identity = firmware.known_identity()
    if identity.externally_owned:
        raise CommandRefused(FirmwareStatus.ALREADY_OWNED)
    if request.first_length != CERT_SIZE or request.second_length != CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    pek = certs.Certificate.unpack(firmware.read(request.first_address, CERT_SIZE))
    oca = certs.Certificate.unpack(firmware.read(request.second_address, CERT_SIZE))
    _become(firmware, certs.imported(identity, firmware.config.chip, pek, oca, firmware.rng))


def pdh_cert_export(firmware: SoftwareFirmware, request: TwoBlobs) -> TwoBlobs:
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    lengths = replace(request, first_length=CERT_SIZE, second_length=CHAIN_SIZE)
    if request.first_length < CERT_SIZE or request.second_length < CHAIN_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, lengths)
    identity = firmware.known_identity()
    chain = certs.chain(identity, firmware.config.chip)
    firmware.read(request.second_address, CHAIN_SIZE)  # so that nothing is written if either is bad
    firmware.write(request.first_address, certs.pdh_certificate(identity).pack())
    firmware.write(request.second_address, chain)
    return lengths


def get_id(firmware: SoftwareFirmware, request: Blob) -> Blob:
    """64 bytes that tell this chip from others, in every state. A real one gives a point of secp256k1."""
    if request.length < ID_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, length=ID_SIZE))
    firmware.write(request.address, hashlib.sha512(b"id" + firmware.config.chip).digest())
    return replace(request, length=ID_SIZE)


def download_firmware(firmware: SoftwareFirmware, request: Blob) -> None:
    """Every image is refused: none is signed for this firmware. The driver then goes on with what there is."""
    firmware.need(PlatformState.UNINIT)
    if request.address % 32:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    firmware.read(request.address, _IMAGE_HEADER)
    raise CommandRefused(FirmwareStatus.BAD_SIGNATURE)


def df_flush(firmware: SoftwareFirmware, _request: None) -> None:
    """Every dirty ASID is clean again, if the caches were written back since it became dirty. In every state."""
    if not firmware.config.sees_wbinvd:
        firmware.wbinvd_done = True
    if not firmware.wbinvd_done:
        raise CommandRefused(FirmwareStatus.WBINVD_REQUIRED)
    firmware.dirty.clear()


def nop(_firmware: SoftwareFirmware, _request: None) -> None:
    """Does nothing, in every state."""
