# SPDX-License-Identifier: Apache-2.0
"""Sessions, secrets, SEND_ and RECEIVE_ through the mailbox."""

from __future__ import annotations

import hmac
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import Config
from tests.unit.psp import owner
from tests.unit.psp.host import ES_POLICY, RAM_SIZE, SCRATCH, Host
from tests.unit.psp.owner import CERT, Owner

CHAIN = 3 * CERT
PAGE = 4096
SESSION, HEADER = 128, 52
START = "IIQI4xQI"
PACKET = "I4xQI4xQI4xQI"
SEND_START = "IIQI4xQI4xQI4xQI"
C_BIT = 1 << 51
AT_CERT, AT_CHAIN, AT_SESSION, AT_HEADER, AT_DATA, AT_GUEST = (SCRATCH + n * 0x2000 for n in range(6))


@pytest.fixture
def host() -> Host:
    host = Host()
    host.init()
    return host


def export(host: Host) -> tuple[bytes, bytes]:
    """PDH and the chain above it."""
    host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [AT_CERT, CERT, AT_CHAIN, CHAIN])
    return host.peek(AT_CERT, CERT), host.peek(AT_CHAIN, CHAIN)


def start(
    host: Host,
    certificate: bytes,
    session: bytes,
    policy: int,
    command: FirmwareCommand = FirmwareCommand.LAUNCH_START,
    lengths: tuple[int, int] = (CERT, SESSION),
) -> tuple[FirmwareStatus, int]:
    host.poke(AT_CERT, certificate)
    host.poke(AT_SESSION, session)
    status, values = host.call(command, START, [0, policy, AT_CERT, lengths[0], AT_SESSION, lengths[1]])
    return status, values[0]


# -- sessions


def test_the_owner_can_check_the_measurement(host: Host) -> None:
    guest_owner = Owner.make()
    pdh, _ = export(host)
    status, handle = start(host, guest_owner.certificate(), guest_owner.session(pdh, 5), 5)
    assert (status, handle) == (FirmwareStatus.SUCCESS, 1)
    _, blob = host.measure(handle)
    digest = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    message = bytes([4, 0, 24, 15, 5, 0, 0, 0]) + digest + blob[32:]
    assert blob[:32] == hmac.new(guest_owner.tik, message, "sha256").digest()


def test_sessions_that_are_refused(host: Host) -> None:
    guest_owner = Owner.make()
    pdh, _ = export(host)
    good, session = guest_owner.certificate(), guest_owner.session(pdh, 0)

    def flip(data: bytes, offset: int) -> bytes:
        return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]

    assert start(host, good, session, 0, lengths=(CERT, SESSION - 1))[0] is FirmwareStatus.INVALID_LEN
    assert start(host, good, session, 0, lengths=(CERT + 1, SESSION))[0] is FirmwareStatus.INVALID_LEN
    assert start(host, good, session, 1)[0] is FirmwareStatus.BAD_MEASUREMENT, "another policy than the owner's"
    for offset in (0, 16, 48, 64, 96):  # nonce, keys, IV, either MAC
        assert start(host, good, flip(session, offset), 0)[0] is FirmwareStatus.BAD_MEASUREMENT, offset
    for offset in (0, 8, 12, 16, 20, 92, 160):  # version, usage, algorithm, curve, x, y, beyond y's 48 bytes
        assert start(host, flip(good, offset), session, 0)[0] is FirmwareStatus.INVALID_CERTIFICATE, offset
    assert start(host, b"\xff" * CERT, session, 0)[0] is FirmwareStatus.INVALID_CERTIFICATE
    assert host.platform()[2] == 0
    host.call(FirmwareCommand.PDH_GEN)
    assert start(host, good, session, 0)[0] is FirmwareStatus.BAD_MEASUREMENT, "for a PDH that is gone"


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (0x18_00_0000, FirmwareStatus.SUCCESS),  # API 0.24
        (0x19_00_0000, FirmwareStatus.POLICY_FAILURE),
        (0x00_01_0000, FirmwareStatus.POLICY_FAILURE),
        (0x0040, FirmwareStatus.POLICY_FAILURE),
        (0x8000, FirmwareStatus.POLICY_FAILURE),
        (0x003F, FirmwareStatus.SUCCESS),
    ],
)
def test_the_policy_of_a_session(host: Host, policy: int, status: FirmwareStatus) -> None:
    guest_owner = Owner.make()
    pdh, _ = export(host)
    assert start(host, guest_owner.certificate(), guest_owner.session(pdh, policy), policy)[0] is status


# -- secrets


def secret(host: Host, handle: int, header: bytes, data: bytes, *, guest: int = AT_GUEST) -> FirmwareStatus:
    host.poke(AT_HEADER, header)
    host.poke(AT_DATA, data)
    return host.call(
        FirmwareCommand.LAUNCH_UPDATE_SECRET,
        PACKET,
        [handle, AT_HEADER, len(header), guest, len(data), AT_DATA, len(data)],
    )[0]


def waiting_for_secrets(host: Host) -> tuple[Owner, int, bytes]:
    """A guest after LAUNCH_MEASURE: its owner, handle and measurement."""
    guest_owner = Owner.make()
    pdh, _ = export(host)
    _, handle = start(host, guest_owner.certificate(), guest_owner.session(pdh, 0), 0)
    host.activate(handle, 4)
    _, blob = host.measure(handle)
    return guest_owner, handle, blob[:32]


def test_a_secret(host: Host) -> None:
    guest_owner, handle, measurement = waiting_for_secrets(host)
    header, data = guest_owner.secret(b"disk passphrase!" * 2, measurement)
    assert secret(host, handle, header, data) is FirmwareStatus.SUCCESS
    assert host.peek(AT_GUEST, 48) == b"disk passphrase!" * 2 + bytes(16)
    host.on(FirmwareCommand.LAUNCH_FINISH, handle)
    assert secret(host, handle, header, data) is FirmwareStatus.INVALID_GUEST_STATE


def test_secrets_that_are_refused(host: Host) -> None:
    guest_owner, handle, measurement = waiting_for_secrets(host)
    header, data = guest_owner.secret(b"x" * 32, measurement)
    assert secret(host, 9, header, data) is FirmwareStatus.INVALID_GUEST
    assert secret(host, handle, header, data, guest=AT_GUEST + 8) is FirmwareStatus.INVALID_ADDRESS
    assert secret(host, handle, header, data, guest=RAM_SIZE) is FirmwareStatus.INVALID_ADDRESS
    assert secret(host, handle, header + b"x", data) is FirmwareStatus.INVALID_LEN
    assert secret(host, handle, header, data[:24]) is FirmwareStatus.INVALID_LEN
    assert secret(host, handle, header, b"") is FirmwareStatus.INVALID_LEN
    assert secret(host, handle, header, bytes(16 * 1024 + 16)) is FirmwareStatus.INVALID_LEN
    assert secret(host, handle, header, data[:16]) is FirmwareStatus.BAD_MEASUREMENT
    assert secret(host, handle, *guest_owner.secret(b"x" * 32, bytes(32))) is FirmwareStatus.BAD_MEASUREMENT
    assert secret(host, handle, *guest_owner.secret(b"x" * 32, measurement, 1)) is FirmwareStatus.UNSUPPORTED
    values = [handle, AT_HEADER, HEADER, AT_GUEST, 32, AT_DATA, 48]
    assert host.call(FirmwareCommand.LAUNCH_UPDATE_SECRET, PACKET, values)[0] is FirmwareStatus.INVALID_LEN
    assert host.peek(AT_GUEST, 32) == bytes(32)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    assert secret(host, handle, header, data) is FirmwareStatus.INACTIVE


# -- migration over the network


def send_start(
    host: Host, handle: int, pdh: bytes, chain: bytes = b"", *, session: int = SESSION, amd: int = 0
) -> tuple[FirmwareStatus, tuple[int, ...]]:
    host.poke(AT_CERT, pdh)
    host.poke(AT_CHAIN, chain)
    values = [handle, 0, AT_CERT, len(pdh), AT_CHAIN, len(chain), AT_DATA, amd, AT_SESSION, session]
    return host.call(FirmwareCommand.SEND_START, SEND_START, values)


def send(host: Host, handle: int, plain: bytes, *, vmsa: bool = False) -> tuple[FirmwareStatus, bytes, bytes]:
    """SEND_UPDATE_; status, header and packet. The guest's address bears the C-bit, as KVM gives it."""
    host.poke(AT_GUEST, plain)
    command = FirmwareCommand.SEND_UPDATE_VMSA if vmsa else FirmwareCommand.SEND_UPDATE_DATA
    values = [handle, AT_HEADER, HEADER, AT_GUEST | C_BIT, len(plain), AT_DATA, len(plain)]
    status, _ = host.call(command, PACKET, values)
    return status, host.peek(AT_HEADER, HEADER), host.peek(AT_DATA, len(plain))


def receive(host: Host, handle: int, header: bytes, data: bytes, *, vmsa: bool = False) -> FirmwareStatus:
    host.poke(AT_HEADER, header)
    host.poke(AT_DATA, data)
    command = FirmwareCommand.RECEIVE_UPDATE_VMSA if vmsa else FirmwareCommand.RECEIVE_UPDATE_DATA
    values = [handle, AT_HEADER, HEADER, AT_GUEST | C_BIT, len(data), AT_DATA, len(data)]
    return host.call(command, PACKET, values)[0]


def migrating(policy: int = 0, asid: int = 4) -> tuple[Host, int, Host, int]:
    """Two machines, and a guest half-way between them."""
    here, there = Host(), Host(Config(es_asids=3, sev_asids=4, seed=1))
    here.init()
    there.init()
    handle = here.running(asid, policy)
    pdh_there, _ = export(there)
    pdh_here, _ = export(here)
    status, values = send_start(here, handle, pdh_there)
    assert (status, values[1], values[9]) == (FirmwareStatus.SUCCESS, policy, SESSION)
    session = here.peek(AT_SESSION, SESSION)
    status, arriving = start(there, pdh_here, session, policy, FirmwareCommand.RECEIVE_START)
    assert status is FirmwareStatus.SUCCESS
    return here, handle, there, arriving


def test_a_guest_goes_to_another_machine() -> None:
    here, handle, there, arriving = migrating()
    assert here.guest_status(handle)[3] == 4
    assert there.guest_status(arriving)[3] == 5
    plain = bytes(range(256)) * 16
    status, header, data = send(here, handle, plain)
    assert status is FirmwareStatus.SUCCESS
    assert data != plain
    assert receive(there, arriving, header, data) is FirmwareStatus.INACTIVE
    there.activate(arriving, 4)
    there.poke(AT_GUEST, bytes(PAGE))
    assert receive(there, arriving, header, data) is FirmwareStatus.SUCCESS
    assert there.peek(AT_GUEST, PAGE) == plain
    assert here.on(FirmwareCommand.SEND_FINISH, handle) is FirmwareStatus.SUCCESS
    assert there.on(FirmwareCommand.RECEIVE_FINISH, arriving) is FirmwareStatus.SUCCESS
    assert here.guest_status(handle)[3] == 6
    assert there.guest_status(arriving) == (FirmwareStatus.SUCCESS, 0, 4, 3)
    here.on(FirmwareCommand.DEACTIVATE, handle)
    here.call(FirmwareCommand.DF_FLUSH)
    assert here.activate(handle, 4) is FirmwareStatus.INVALID_GUEST_STATE, "a guest that was sent stays down"
    assert here.on(FirmwareCommand.DECOMMISSION, handle) is FirmwareStatus.SUCCESS


def test_an_es_guest_goes_with_its_vmsa() -> None:
    here, handle, there, arriving = migrating(ES_POLICY, 1)
    there.activate(arriving, 1)
    status, header, data = send(here, handle, b"V" * PAGE, vmsa=True)
    assert status is FirmwareStatus.SUCCESS
    assert receive(there, arriving, header, data, vmsa=True) is FirmwareStatus.SUCCESS
    assert there.peek(AT_GUEST, PAGE) == b"V" * PAGE


def test_the_wrong_packets() -> None:
    here, handle, there, arriving = migrating()
    there.activate(arriving, 4)
    _, header, data = send(here, handle, b"p" * 32)
    assert receive(there, arriving, header, data[:16]) is FirmwareStatus.BAD_MEASUREMENT
    assert receive(there, arriving, header, bytes(32)) is FirmwareStatus.BAD_MEASUREMENT
    assert receive(there, arriving, b"\1" + header[1:], data) is FirmwareStatus.UNSUPPORTED
    assert receive(there, arriving, header, data[:8]) is FirmwareStatus.INVALID_LEN
    assert receive(there, 9, header, data) is FirmwareStatus.INVALID_GUEST
    assert receive(there, arriving, header, data, vmsa=True) is FirmwareStatus.UNSUPPORTED
    assert there.on(FirmwareCommand.SEND_FINISH, arriving) is FirmwareStatus.INVALID_GUEST_STATE
    assert send(there, arriving, bytes(16))[0] is FirmwareStatus.INVALID_GUEST_STATE
    assert receive(there, arriving, header, data) is FirmwareStatus.SUCCESS


def test_sending_can_be_cancelled() -> None:
    here, handle, _, _ = migrating()
    assert here.on(FirmwareCommand.SEND_CANCEL, handle) is FirmwareStatus.SUCCESS
    assert here.guest_status(handle)[3] == 3
    assert here.on(FirmwareCommand.SEND_CANCEL, handle) is FirmwareStatus.INVALID_GUEST_STATE
    assert send(here, handle, bytes(16))[0] is FirmwareStatus.INVALID_GUEST_STATE


def test_send_start_refusals(host: Host) -> None:
    pdh, chain = export(host)
    _, launching = host.start()
    assert send_start(host, 9, pdh)[0] is FirmwareStatus.INVALID_GUEST
    status, values = send_start(host, launching, b"", session=0)
    assert (status, values[9]) == (FirmwareStatus.INVALID_LEN, SESSION), "the length before the state"
    assert send_start(host, launching, pdh)[0] is FirmwareStatus.INVALID_GUEST_STATE
    nosend = host.running(4, policy=1 << 3)
    assert send_start(host, nosend, pdh)[0] is FirmwareStatus.POLICY_FAILURE
    plain = host.running(5)
    assert send_start(host, plain, pdh[:-1])[0] is FirmwareStatus.INVALID_LEN
    assert send_start(host, plain, bytes(CERT))[0] is FirmwareStatus.INVALID_CERTIFICATE
    amd_only = host.running(6, policy=1 << 5)
    assert send_start(host, amd_only, pdh, chain, amd=1)[0] is FirmwareStatus.INVALID_LEN
    assert send_start(host, amd_only, pdh[:-1], chain, amd=3200)[0] is FirmwareStatus.INVALID_LEN
    assert send_start(host, amd_only, pdh, chain[:-1], amd=3200)[0] is FirmwareStatus.INVALID_LEN
    assert send_start(host, amd_only, pdh, chain, amd=3200)[0] is FirmwareStatus.INVALID_CERTIFICATE
    good = [amd_only, 0, AT_CERT, CERT, AT_CHAIN, CHAIN, AT_DATA, 3200, AT_SESSION, SESSION]
    for place in (2, 4, 6):
        wrong = [*good[:place], RAM_SIZE, *good[place + 1 :]]
        assert host.call(FirmwareCommand.SEND_START, SEND_START, wrong)[0] is FirmwareStatus.INVALID_ADDRESS
    assert host.guest_status(plain)[3] == 3


def test_domain_guests_go_to_the_same_owner_only(host: Host) -> None:
    pdh, chain = export(host)
    stranger = Host(Config(es_asids=3, sev_asids=4, seed=9))
    stranger.init()
    their_pdh, their_chain = export(stranger)
    handle = host.running(4, policy=1 << 4)
    assert send_start(host, handle, pdh)[0] is FirmwareStatus.INVALID_LEN
    assert send_start(host, handle, their_pdh, their_chain)[0] is FirmwareStatus.POLICY_FAILURE
    assert send_start(host, handle, their_pdh, chain)[0] is FirmwareStatus.BAD_SIGNATURE
    broken = bytearray(chain)
    broken[CERT + owner.BODY + 16] ^= 1
    assert send_start(host, handle, pdh, bytes(broken))[0] is FirmwareStatus.BAD_SIGNATURE
    assert send_start(host, handle, pdh, chain)[0] is FirmwareStatus.SUCCESS


def test_the_length_of_a_header_can_be_asked(host: Host) -> None:
    """Before anything else but the platform is looked at: even a handle nobody has gets the length."""
    host.start()
    status, values = host.call(FirmwareCommand.SEND_UPDATE_DATA, PACKET, [77, 0, 0, 0, 0, 0, 0])
    assert (status, values[2]) == (FirmwareStatus.INVALID_LEN, HEADER)


@pytest.mark.parametrize(
    ("guest", "length", "room", "status"),
    [
        (AT_GUEST, 16, 16, FirmwareStatus.SUCCESS),
        (AT_GUEST, 16, 4096, FirmwareStatus.SUCCESS),
        (AT_GUEST, 16, 15, FirmwareStatus.INVALID_LEN),
        (AT_GUEST, 0, 16, FirmwareStatus.INVALID_LEN),
        (AT_GUEST, 20, 32, FirmwareStatus.INVALID_LEN),
        (AT_GUEST + 4, 16, 16, FirmwareStatus.INVALID_ADDRESS),
        (RAM_SIZE, 16, 16, FirmwareStatus.INVALID_ADDRESS),
    ],
)
def test_send_update_checks(guest: int, length: int, room: int, status: FirmwareStatus) -> None:
    here, handle, _, _ = migrating()
    values = [handle, AT_HEADER, HEADER, guest, length, AT_DATA, room]
    assert here.call(FirmwareCommand.SEND_UPDATE_DATA, PACKET, values)[0] is status


@pytest.mark.parametrize("place", [1, 5])
def test_a_packet_is_written_whole_or_not_at_all(place: int) -> None:
    here, handle, _, _ = migrating()
    here.poke(AT_HEADER, bytes(HEADER))
    here.poke(AT_DATA, bytes(16))
    values = [handle, AT_HEADER, HEADER, AT_GUEST, 16, AT_DATA, 16]
    values[place] = RAM_SIZE
    assert here.call(FirmwareCommand.SEND_UPDATE_DATA, PACKET, values)[0] is FirmwareStatus.INVALID_ADDRESS
    assert here.peek(AT_HEADER, HEADER) == bytes(HEADER)
    assert here.peek(AT_DATA, 16) == bytes(16)


@pytest.mark.parametrize(
    ("place", "value", "status"),
    [
        (1, RAM_SIZE, FirmwareStatus.INVALID_ADDRESS),
        (2, HEADER - 1, FirmwareStatus.INVALID_LEN),
        (3, AT_GUEST + 4, FirmwareStatus.INVALID_ADDRESS),
        (3, RAM_SIZE, FirmwareStatus.INVALID_ADDRESS),
        (4, 16, FirmwareStatus.INVALID_LEN),
        (5, RAM_SIZE, FirmwareStatus.INVALID_ADDRESS),
    ],
)
def test_receive_update_checks(place: int, value: int, status: FirmwareStatus) -> None:
    here, handle, there, arriving = migrating()
    there.activate(arriving, 4)
    _, header, data = send(here, handle, b"p" * 32)
    there.poke(AT_HEADER, header)
    there.poke(AT_DATA, data)
    values = [arriving, AT_HEADER, HEADER, AT_GUEST, 32, AT_DATA, 32]
    values[place] = value
    assert there.call(FirmwareCommand.RECEIVE_UPDATE_DATA, PACKET, values)[0] is status
    there.poke(AT_HEADER, header)
    values = [arriving, AT_HEADER, HEADER, AT_GUEST, 32, AT_DATA, 32]
    assert there.call(FirmwareCommand.RECEIVE_UPDATE_DATA, PACKET, values)[0] is FirmwareStatus.SUCCESS


def test_a_short_vmsa_is_none() -> None:
    here, handle, there, arriving = migrating(ES_POLICY, 1)
    there.activate(arriving, 1)
    _, header, data = send(here, handle, b"V" * 2048, vmsa=True)
    assert receive(there, arriving, header, data, vmsa=True) is FirmwareStatus.INVALID_LEN


def test_a_shared_key_on_arrival(host: Host) -> None:
    """RECEIVE_START takes a handle to share with, like LAUNCH_START."""
    handle = host.running(4)
    pdh, _ = export(host)
    send_start(host, handle, pdh)  # leaves PDH and session in their places
    for share, status in ((99, FirmwareStatus.INVALID_GUEST), (handle, FirmwareStatus.SUCCESS)):
        values = [share, 0, AT_CERT, CERT, AT_SESSION, SESSION]
        assert host.call(FirmwareCommand.RECEIVE_START, START, values)[0] is status


def test_an_own_session_is_laid_out_as_the_owner_lays_out_his(host: Host) -> None:
    """What SEND_START writes opens with the owner's arithmetic."""
    receiver = Owner.make()
    handle = host.running(4)
    pdh, _ = export(host)
    assert send_start(host, handle, receiver.certificate())[0] is FirmwareStatus.SUCCESS
    session = host.peek(AT_SESSION, SESSION)
    nonce, wrapped, iv = session[:16], session[16:48], session[48:64]
    secret_x = receiver.private.exchange(ec.ECDH(), owner.public_key(pdh))
    master = owner.kdf(secret_x, b"sev-master-secret", nonce)
    assert session[64:96] == hmac.new(owner.kdf(master, b"sev-kik"), wrapped, "sha256").digest()
    keys = owner.aes_ctr(owner.kdf(master, b"sev-kek"), iv, wrapped)
    tek, tik = keys[:16], keys[16:]
    assert session[96:] == hmac.new(tik, bytes(4), "sha256").digest()
    _, header, data = send(host, handle, b"hello, receiver!")
    message = b"\2" + header[:20] + struct.pack("<II", 16, 16) + data
    assert header[20:] == hmac.new(tik, message, "sha256").digest()
    assert owner.aes_ctr(tek, header[4:20], data) == b"hello, receiver!"
