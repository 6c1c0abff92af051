# SPDX-License-Identifier: Apache-2.0
"""Secrets and migration over the network: what goes through a trusted channel. Each function is one command.

SEND_ and RECEIVE_ work between labs, and within one, from its own PDH to itself. A guest whose policy demands an AMD
platform at the other end (bit SEV) cannot be sent: no chain of the lab ends at AMD, and the lab knows none that does.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from chaos.lab.psp import certs, sessions
from chaos.lab.psp.buffers import Handle, Packet, SendStart, StartBuffer
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.numbers import (
    CERT_SIZE,
    CHAIN_SIZE,
    PACKET_HEADER_SIZE,
    PACKET_MAX,
    PAGE_SIZE,
    SESSION_SIZE,
    FirmwareStatus,
    GuestPolicy,
    GuestState,
    PlatformState,
)
from chaos.lab.psp.state import ZERO_KEY, CommandRefused, FirmwareGuest

# ASK and ARK together: each 64 bytes and three numbers of RSA with 2048 or 4096 bits.
_AMD_LENGTHS: Final = (2 * (64 + 3 * 256), 2 * (64 + 3 * 512))


def session_channel(firmware: SoftwareFirmware, request: StartBuffer) -> sessions.SessionKeys:
    """The channel that LAUNCH_START or RECEIVE_START asks for with a certificate and a session."""
    if request.session_length != SESSION_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    session = firmware.read(request.session_address, SESSION_SIZE)
    if request.cert_length != CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    peer = certs.Certificate.unpack(firmware.read(request.cert_address, CERT_SIZE))
    return sessions.accept(firmware.known_identity().pdh, peer, session, request.policy)


def launch_secret(firmware: SoftwareFirmware, request: Packet) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle)
    if request.guest_address % 16:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    length = request.guest_length
    if (
        request.header_length != PACKET_HEADER_SIZE
        or length % 16
        or not 0 < length <= PACKET_MAX
        or length != request.transport_length
    ):
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    firmware.guest(request.handle, GuestState.LAUNCH_SECRET)
    if not guest.asid:
        raise CommandRefused(FirmwareStatus.INACTIVE)
    header = sessions.PacketHeader.unpack(firmware.read(request.header_address, PACKET_HEADER_SIZE))
    data = firmware.read(request.transport_address, length)
    channel = sessions.SessionKeys(guest.tek, guest.tik)
    secret = sessions.unseal(channel, header, data, context=sessions.SECRET, measurement=guest.measurement)
    firmware.write(request.guest_address, secret)


def send_start(firmware: SoftwareFirmware, request: SendStart) -> SendStart:
    """Open a channel to the platform whose certificates are given, and write the session it needs."""
    firmware.need(PlatformState.WORKING)
    firmware.guest(request.handle)
    if request.session_length != SESSION_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, session_length=SESSION_SIZE))
    guest = firmware.guest(request.handle, GuestState.RUNNING)
    if guest.policy & GuestPolicy.NOSEND:
        raise CommandRefused(FirmwareStatus.POLICY_FAILURE)
    if guest.policy & GuestPolicy.SEV:
        _check_amd_chain(firmware, request)
    if guest.policy & GuestPolicy.DOMAIN:
        _check_domain(firmware, request)
    if request.pdh_length != CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    peer = certs.Certificate.unpack(firmware.read(request.pdh_address, CERT_SIZE))
    identity = firmware.known_identity()
    channel, session = sessions.initiate(identity.pdh, peer, guest.policy, firmware.rng)
    firmware.write(request.session_address, session)
    firmware.guests[guest.handle] = replace(guest, state=GuestState.SEND_UPDATE, tek=channel.tek, tik=channel.tik)
    return replace(request, policy=guest.policy)


def _check_amd_chain(firmware: SoftwareFirmware, request: SendStart) -> None:
    if request.platform_length != CHAIN_SIZE or request.pdh_length != CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    if request.amd_length not in _AMD_LENGTHS:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    firmware.read(request.platform_address, CHAIN_SIZE)
    firmware.read(request.pdh_address, CERT_SIZE)
    firmware.read(request.amd_address, request.amd_length)
    raise CommandRefused(FirmwareStatus.INVALID_CERTIFICATE)


def _check_domain(firmware: SoftwareFirmware, request: SendStart) -> None:
    """The other platform must have our owner."""
    if request.platform_length != CHAIN_SIZE or request.pdh_length != CERT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    chain = firmware.read(request.platform_address, CHAIN_SIZE)
    pek, oca = (certs.Certificate.unpack(chain[n * CERT_SIZE : (n + 1) * CERT_SIZE]) for n in (0, 1))
    pdh = certs.Certificate.unpack(firmware.read(request.pdh_address, CERT_SIZE))
    certs.validate(oca, oca)
    certs.validate(pek, oca)
    certs.validate(pdh, pek)
    if oca.pack() != certs.oca_certificate(firmware.known_identity()).pack():
        raise CommandRefused(FirmwareStatus.POLICY_FAILURE)


def send_update_data(firmware: SoftwareFirmware, request: Packet) -> Packet:
    return _send_update(firmware, request, vmsa=False)


def send_update_vmsa(firmware: SoftwareFirmware, request: Packet) -> Packet:
    return _send_update(firmware, request, vmsa=True)


def _send_update(firmware: SoftwareFirmware, request: Packet, *, vmsa: bool) -> Packet:
    """Only the header's length is ever told: a packet is as long as the data in it."""
    firmware.need(PlatformState.WORKING)
    if request.header_length < PACKET_HEADER_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, header_length=PACKET_HEADER_SIZE))
    guest = firmware.guest(request.handle, GuestState.SEND_UPDATE)
    _check_vmsa(guest, vmsa)
    length = request.guest_length
    if not 0 < length <= PACKET_MAX or length % 16 or request.transport_length < length:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    if request.guest_address % 16:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    data = firmware.read(request.guest_address, length)
    firmware.read(request.header_address, PACKET_HEADER_SIZE)  # so that nothing is written if either is bad
    header, ciphertext = sessions.seal(sessions.SessionKeys(guest.tek, guest.tik), data, firmware.rng)
    firmware.write(request.transport_address, ciphertext)
    firmware.write(request.header_address, header.pack())
    return replace(request, header_length=PACKET_HEADER_SIZE)


def _check_vmsa(guest: FirmwareGuest, vmsa: bool) -> None:
    if vmsa and not guest.policy & GuestPolicy.ES:
        raise CommandRefused(FirmwareStatus.UNSUPPORTED)
    if not guest.asid:
        raise CommandRefused(FirmwareStatus.INACTIVE)


def send_finish(firmware: SoftwareFirmware, request: Handle) -> None:
    _end(firmware, request, GuestState.SEND_UPDATE, GuestState.SENT)


def send_cancel(firmware: SoftwareFirmware, request: Handle) -> None:
    _end(firmware, request, GuestState.SEND_UPDATE, GuestState.RUNNING)


def receive_finish(firmware: SoftwareFirmware, request: Handle) -> None:
    _end(firmware, request, GuestState.RECEIVE_UPDATE, GuestState.RUNNING)


def _end(firmware: SoftwareFirmware, request: Handle, before: GuestState, after: GuestState) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, before)
    firmware.guests[guest.handle] = replace(guest, state=after, tek=ZERO_KEY, tik=ZERO_KEY)


def receive_start(firmware: SoftwareFirmware, request: StartBuffer) -> StartBuffer:
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    channel = session_channel(firmware, request)
    guest = FirmwareGuest(
        handle=0, policy=request.policy, state=GuestState.RECEIVE_UPDATE, tek=channel.tek, tik=channel.tik
    )
    return replace(request, handle=firmware.admit(guest, request.handle))


def receive_update_data(firmware: SoftwareFirmware, request: Packet) -> None:
    _receive_update(firmware, request, vmsa=False)


def receive_update_vmsa(firmware: SoftwareFirmware, request: Packet) -> None:
    _receive_update(firmware, request, vmsa=True)


def _receive_update(firmware: SoftwareFirmware, request: Packet, *, vmsa: bool) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, GuestState.RECEIVE_UPDATE)
    _check_vmsa(guest, vmsa)
    length = request.guest_length
    if (
        not 0 < length <= PACKET_MAX
        or length != request.transport_length
        or length % 16
        or request.header_length < PACKET_HEADER_SIZE
    ):
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    if request.guest_address % 16:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    header = sessions.PacketHeader.unpack(firmware.read(request.header_address, PACKET_HEADER_SIZE))
    if header.flags & sessions.COMPRESSED:
        raise CommandRefused(FirmwareStatus.UNSUPPORTED)
    data = firmware.read(request.transport_address, length)
    plain = sessions.unseal(sessions.SessionKeys(guest.tek, guest.tik), header, data, context=sessions.DATA)
    if vmsa and length < PAGE_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    firmware.write(request.guest_address, plain)
