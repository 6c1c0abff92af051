# SPDX-License-Identifier: Apache-2.0
"""Identity and certificates through the mailbox, checked with `cryptography` and offsets written down again."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from chaos.lab.psp import certs
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import CommandRefused
from tests.unit.psp import owner
from tests.unit.psp.host import RAM_SIZE, SCRATCH, Host

CERT = owner.CERT
CHAIN = 3 * CERT
AT_PDH, AT_CHAIN = SCRATCH, SCRATCH + 0x1000


@pytest.fixture
def host() -> Host:
    host = Host()
    host.init()
    return host


def export(host: Host) -> tuple[bytes, bytes, bytes, bytes]:
    """PDH, PEK, OCA, CEK."""
    status, values = host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [AT_PDH, CERT, AT_CHAIN, CHAIN])
    assert (status, values) == (FirmwareStatus.SUCCESS, (AT_PDH, CERT, AT_CHAIN, CHAIN))
    chain = host.peek(AT_CHAIN, CHAIN)
    return host.peek(AT_PDH, CERT), *(chain[n * CERT : (n + 1) * CERT] for n in range(3))  # type: ignore[return-value]


def test_the_chain_holds(host: Host) -> None:
    pdh, pek, oca, cek = export(host)
    owner.verify(pdh, 0, pek)
    owner.verify(pek, 0, oca)
    owner.verify(pek, 1, cek)
    owner.verify(oca, 0, oca)
    for certificate in (pdh, oca):
        assert certificate[owner.BODY + 0x208 :] == owner.UNSIGNED
    assert cek[owner.BODY :] == owner.UNSIGNED * 2, "nobody signs the lab's CEK"


@pytest.mark.parametrize(
    ("place", "usage", "algorithm"),
    [(0, owner.PDH, 3), (1, owner.PEK, 2), (2, owner.OCA, 2), (3, owner.CEK, 2)],
)
def test_bodies(host: Host, place: int, usage: int, algorithm: int) -> None:
    certificate = export(host)[place]
    head = struct.unpack_from("<IBBHIII", certificate)
    assert head == (1, 0, 24, 0, usage, algorithm, 2)
    key = owner.public_key(certificate)
    assert certificate[: owner.BODY] == owner.body(usage, algorithm, key)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (CERT - 1, CHAIN), (CERT, CHAIN - 1)])
def test_the_lengths_of_an_export_can_be_asked(host: Host, first: int, second: int) -> None:
    status, values = host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [0, first, 0, second])
    assert (status, values) == (FirmwareStatus.INVALID_LEN, (0, CERT, 0, CHAIN))


@pytest.mark.parametrize(("first", "second"), [(RAM_SIZE, AT_CHAIN), (AT_PDH, RAM_SIZE - 16)])
def test_an_export_writes_both_or_none(host: Host, first: int, second: int) -> None:
    assert (
        host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [first, CERT, second, CHAIN])[0]
        is FirmwareStatus.INVALID_ADDRESS
    )
    assert host.peek(AT_PDH, CERT) == bytes(CERT)
    assert host.peek(AT_CHAIN, CHAIN) == bytes(CHAIN)


def test_pek_gen_changes_all_but_the_chip(host: Host) -> None:
    before = export(host)
    assert host.call(FirmwareCommand.PEK_GEN)[0] is FirmwareStatus.SUCCESS
    after = export(host)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, False, True]
    owner.verify(after[0], 0, after[1])
    owner.verify(after[1], 1, after[3])


def test_pdh_gen_changes_the_pdh_only(host: Host) -> None:
    before = export(host)
    assert host.call(FirmwareCommand.PDH_GEN)[0] is FirmwareStatus.SUCCESS
    after = export(host)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True, True]


def test_pek_csr(host: Host) -> None:
    assert host.call(FirmwareCommand.PEK_CSR, "QI", [0, 0]) == (FirmwareStatus.INVALID_LEN, (0, CERT))
    assert host.call(FirmwareCommand.PEK_CSR, "QI", [SCRATCH, CERT + 8]) == (FirmwareStatus.SUCCESS, (SCRATCH, CERT))
    csr = host.peek(SCRATCH, CERT)
    assert csr[owner.BODY :] == owner.UNSIGNED * 2
    assert csr[: owner.BODY] == export(host)[1][: owner.BODY]


def import_pek(host: Host, pek: bytes, oca: bytes, *, length: int = CERT) -> FirmwareStatus:
    host.poke(SCRATCH, pek)
    host.poke(SCRATCH + 0x1000, oca)
    return host.call(FirmwareCommand.PEK_CERT_IMPORT, "QI4xQI", [SCRATCH, length, SCRATCH + 0x1000, CERT])[0]


def signed_by_an_owner(host: Host) -> tuple[bytes, bytes]:
    """Our PEK with an outside owner's signature, and that owner's certificate."""
    key = ec.derive_private_key(0x0CA, ec.SECP384R1())
    oca = owner.body(owner.OCA, owner.ECDSA, key.public_key())
    oca += owner.signature(owner.OCA, key, oca) + owner.UNSIGNED
    host.call(FirmwareCommand.PEK_CSR, "QI", [SCRATCH, CERT])
    csr = host.peek(SCRATCH, CERT)
    body = csr[: owner.BODY]
    return body + owner.signature(owner.OCA, key, body) + owner.UNSIGNED, oca


def test_an_owner_from_outside(host: Host) -> None:
    pdh, _, _, cek = export(host)
    pek, oca = signed_by_an_owner(host)
    assert host.platform()[1] == 0x100
    assert import_pek(host, pek, oca) is FirmwareStatus.SUCCESS
    assert host.platform()[1] == 0x101, "bit 0: externally owned"
    new_pdh, new_pek, new_oca, _ = export(host)
    assert new_oca == oca
    assert new_pdh != pdh
    owner.verify(new_pdh, 0, new_pek)
    owner.verify(new_pek, 0, oca)
    owner.verify(new_pek, 1, cek)
    assert import_pek(host, pek, oca) is FirmwareStatus.ALREADY_OWNED

    host.call(FirmwareCommand.SHUTDOWN)
    assert host.platform()[1] == 0
    host.init()
    assert host.platform()[1] == 0x101, "kept in flash"
    host.call(FirmwareCommand.PEK_GEN)
    assert host.platform()[1] == 0x100, "its own again"


def test_imports_that_are_refused(host: Host) -> None:
    pek, oca = signed_by_an_owner(host)
    stranger = ec.derive_private_key(7, ec.SECP384R1())
    other = owner.body(owner.PEK, owner.ECDSA, stranger.public_key())
    key = ec.derive_private_key(0x0CA, ec.SECP384R1())
    not_ours = other + owner.signature(owner.OCA, key, other) + owner.UNSIGNED
    body = pek[: owner.BODY]
    full = body + owner.signature(owner.OCA, key, body) * 2
    malformed = pek[: owner.BODY + 0x208] + struct.pack("<II", 0x1004, 0).ljust(0x208, b"\0")
    flipped = bytearray(pek)
    flipped[owner.BODY + 20] ^= 1
    assert import_pek(host, pek, oca, length=CERT - 1) is FirmwareStatus.INVALID_LEN
    assert import_pek(host, bytes(flipped), oca) is FirmwareStatus.BAD_SIGNATURE
    assert import_pek(host, pek, export(host)[2]) is FirmwareStatus.BAD_SIGNATURE
    assert import_pek(host, oca, oca) is FirmwareStatus.INVALID_CERTIFICATE
    assert import_pek(host, pek, pek) is FirmwareStatus.INVALID_CERTIFICATE
    assert import_pek(host, not_ours, oca) is FirmwareStatus.INVALID_CERTIFICATE
    assert import_pek(host, full, oca) is FirmwareStatus.INVALID_CERTIFICATE, "no room for the chip's signature"
    assert import_pek(host, malformed, oca) is FirmwareStatus.BAD_SIGNATURE
    assert import_pek(host, pek, bytes(CERT)) is FirmwareStatus.INVALID_CERTIFICATE
    assert host.platform()[1] == 0x100
    assert import_pek(host, pek, oca) is FirmwareStatus.SUCCESS


@pytest.mark.parametrize(
    ("version", "usage", "algorithm", "off_curve", "status"),
    [
        (1, owner.OCA, owner.ECDSA, False, FirmwareStatus.SUCCESS),
        (2, owner.OCA, owner.ECDSA, False, FirmwareStatus.INVALID_CERTIFICATE),
        (1, owner.OCA, owner.ECDSA, True, FirmwareStatus.INVALID_CERTIFICATE),
        (1, owner.OCA, owner.ECDH, False, FirmwareStatus.UNSUPPORTED),
        (1, owner.OCA, 1, False, FirmwareStatus.INVALID_CERTIFICATE),
        (1, owner.PEK, owner.ECDSA, False, FirmwareStatus.INVALID_CERTIFICATE),
        (1, 0x13, owner.ECDSA, False, FirmwareStatus.INVALID_CERTIFICATE),
    ],
)
def test_an_owner_must_have_a_proper_certificate(
    host: Host, version: int, usage: int, algorithm: int, off_curve: bool, status: FirmwareStatus
) -> None:
    """Signed well in every case: it is what the certificate says that is wrong."""
    pek, _ = signed_by_an_owner(host)
    key = ec.derive_private_key(0x0CA, ec.SECP384R1())
    body = bytearray(owner.body(usage, algorithm, key.public_key()))
    body[0] = version
    body[20] ^= off_curve
    signature = bytearray(owner.signature(usage, key, bytes(body)))
    signature[4] = algorithm
    assert import_pek(host, pek, bytes(body + signature) + owner.UNSIGNED) is status


def test_who_may_sign_what() -> None:
    """A good signature by the wrong kind of key is none: an OCA may sign PEKs and itself, not a PDH."""
    key = ec.derive_private_key(5, ec.SECP384R1())
    oca_body = owner.body(owner.OCA, owner.ECDSA, key.public_key())
    oca = certs.Certificate.unpack(oca_body + owner.signature(owner.OCA, key, oca_body) + owner.UNSIGNED)
    certs.validate(oca, oca)
    pdh_body = owner.body(owner.PDH, owner.ECDH, key.public_key())
    pdh = certs.Certificate.unpack(pdh_body + owner.signature(owner.OCA, key, pdh_body) + owner.UNSIGNED)
    with pytest.raises(CommandRefused, match="INVALID_CERTIFICATE"):
        certs.validate(pdh, oca)


def test_sha384_signatures_count_too() -> None:
    """No key of this firmware makes them, but the format has them."""
    key = ec.derive_private_key(5, ec.SECP384R1())
    body = owner.body(owner.OCA, 0x102, key.public_key())
    r, s = utils.decode_dss_signature(key.sign(body, ec.ECDSA(hashes.SHA384())))
    place = (struct.pack("<II", owner.OCA, 0x102) + owner.little(r) + owner.little(s)).ljust(0x208, b"\0")
    certificate = certs.Certificate.unpack(body + place + owner.UNSIGNED)
    certs.validate(certificate, certificate)
    wrong = certs.Certificate.unpack(body + place[:8] + bytes(0x200) + owner.UNSIGNED)
    with pytest.raises(CommandRefused, match="BAD_SIGNATURE"):
        certs.validate(wrong, wrong)


@pytest.mark.parametrize("launched", ["secret", "running"])
def test_attestation_report(host: Host, launched: str) -> None:
    _, handle = host.start(0x20)
    host.activate(handle, 4)
    host.update(handle, b"image".ljust(4096, b"\0"))
    host.measure(handle)
    if launched == "running":
        host.on(FirmwareCommand.LAUNCH_FINISH, handle)
    pek = export(host)[1]
    nonce = bytes(range(16))
    status, values = host.call(FirmwareCommand.ATTESTATION_REPORT, "I4xQ16sI", [handle, SCRATCH, nonce, 4096])
    assert (status, values[3]) == (FirmwareStatus.SUCCESS, 0xD0)
    report = host.peek(SCRATCH, 0xD0)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"image".ljust(4096, b"\0"))
    assert report[:16] == nonce
    assert report[16:48] == digest.finalize()
    assert struct.unpack_from("<IIII", report, 48) == (0x20, owner.PEK, 2, 0)
    r, s = (int.from_bytes(report[at : at + 72], "little") for at in (64, 136))
    encoded = utils.encode_dss_signature(r, s)
    owner.public_key(pek).verify(encoded, report[:52], ec.ECDSA(hashes.SHA256()))


def test_attestation_refusals(host: Host) -> None:
    _, handle = host.start()
    values: list[int | bytes] = [handle, SCRATCH, bytes(16), 0]
    assert host.call(FirmwareCommand.ATTESTATION_REPORT, "I4xQ16sI", values)[0] is FirmwareStatus.INVALID_GUEST_STATE
    host.measure(handle)
    status, after = host.call(FirmwareCommand.ATTESTATION_REPORT, "I4xQ16sI", values)
    assert (status, after[3]) == (FirmwareStatus.INVALID_LEN, 0xD0)
    values[0] = 9
    assert host.call(FirmwareCommand.ATTESTATION_REPORT, "I4xQ16sI", values)[0] is FirmwareStatus.INVALID_GUEST
