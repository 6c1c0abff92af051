# SPDX-License-Identifier: Apache-2.0
"""Secrets and migration over the network: what goes through a trusted channel. Each function is one command.

SEND_ and RECEIVE_ work between labs, and within one, from its own PDH to itself. A guest whose policy demands an AMD
platform at the other end (bit SEV) cannot be sent: no chain of the lab ends at AMD, and the lab knows none that does.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from chaos.lab.psp import certs, sessions
from chaos.lab.psp.buffers import Handle, Packet, SendStart, Start
from chaos.lab.psp.firmware import Firmware
from chaos.lab.psp.numbers import (
    CERT_SIZE,
    CHAIN_SIZE,
    PACKET_HEADER_SIZE,
    PACKET_MAX,
    PAGE_SIZE,
    SESSION_SIZE,
    GuestState,
    PlatformState,
    Policy,
    Status,
)
from chaos.lab.psp.state import ZERO_KEY, Guest, Refused

# ASK and ARK together: each 64 bytes and three numbers of RSA with 2048 or 4096 bits.
_AMD_LENGTHS: Final = (2 * (64 + 3 * 256), 2 * (64 + 3 * 512))


def session_channel(firmware: Firmware, request: Start) -> sessions.Channel:
    """The channel that LAUNCH_START or RECEIVE_START asks for with a certificate and a session."""
    if request.session_length != SESSION_SIZE:
        raise Refused(Status.INVALID_LEN)
    session = firmware.read(request.session_address, SESSION_SIZE)
    if request.cert_length != CERT_SIZE:
        raise Refused(Status.INVALID_LEN)
    peer = certs.Certificate.unpack(firmware.read(request.cert_address, CERT_SIZE))
    return sessions.accept(firmware.known_identity().pdh, peer, session, request.policy)


def launch_secret(firmware: Firmware, request: Packet) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle)
    if request.guest_address % 16:
        raise Refused(Status.INVALID_ADDRESS)
    length = request.guest_length
    if (
        request.header_length != PACKET_HEADER_SIZE
        or length % 16
        or not 0 < length <= PACKET_MAX
        or length != request.transport_length
    ):
        raise Refused(Status.INVALID_LEN)
    firmware.guest(request.handle, GuestState.LAUNCH_SECRET)
    if not guest.asid:
        raise Refused(Status.INACTIVE)
    header = sessions.Header.unpack(firmware.read(request.header_address, PACKET_HEADER_SIZE))
    data = firmware.read(request.transport_address, length)
    channel = sessions.Channel(guest.tek, guest.tik)
    secret = sessions.unseal(channel, header, data, context=sessions.SECRET, measurement=guest.measurement)
    firmware.write(request.guest_address, secret)


def send_start(firmware: Firmware, request: SendStart) -> SendStart:
    """Open a channel to the platform whose certificates are given, and write the session it needs."""
    firmware.need(PlatformState.WORKING)
    firmware.guest(request.handle)
    if request.session_length != SESSION_SIZE:
        raise Refused(Status.INVALID_LEN, replace(request, session_length=SESSION_SIZE))
    guest = firmware.guest(request.handle, GuestState.RUNNING)
    if guest.policy & Policy.NOSEND:
        raise Refused(Status.POLICY_FAILURE)
    if guest.policy & Policy.SEV:
        _check_amd_chain(firmware, request)
    if guest.policy & Policy.DOMAIN:
        _check_domain(firmware, request)
    if request.pdh_length != CERT_SIZE:
        raise Refused(Status.INVALID_LEN)
    peer = certs.Certificate.unpack(firmware.read(request.pdh_address, CERT_SIZE))
    identity = firmware.known_identity()
    channel, session = sessions.initiate(identity.pdh, peer, guest.policy, firmware.rng)
    firmware.write(request.session_address, session)
    firmware.guests[guest.handle] = replace(guest, state=GuestState.SEND_UPDATE, tek=channel.tek, tik=channel.tik)
    return replace(request, policy=guest.policy)


def _check_amd_chain(firmware: Firmware, request: SendStart) -> None:
    if request.platform_length != CHAIN_SIZE or request.pdh_length != CERT_SIZE:
        raise Refused(Status.INVALID_LEN)
    if request.amd_length not in _AMD_LENGTHS:
        raise Refused(Status.INVALID_LEN)
    firmware.read(request.platform_address, CHAIN_SIZE)
    firmware.read(request.pdh_address, CERT_SIZE)
    firmware.read(request.amd_address, request.amd_length)
    raise Refused(Status.INVALID_CERTIFICATE)


def _check_domain(firmware: Firmware, request: SendStart) -> None:
    """The other platform must have our owner."""
    if request.platform_length != CHAIN_SIZE or request.pdh_length != CERT_SIZE:
        raise Refused(Status.INVALID_LEN)
    chain = firmware.read(request.platform_address, CHAIN_SIZE)
    pek, oca = (certs.Certificate.unpack(chain[n * CERT_SIZE : (n + 1) * CERT_SIZE]) for n in (0, 1))
    pdh = certs.Certificate.unpack(firmware.read(request.pdh_address, CERT_SIZE))
    certs.validate(oca, oca)
    certs.validate(pek, oca)
    certs.validate(pdh, pek)
    if oca.pack() != certs.oca_certificate(firmware.known_identity()).pack():
        raise Refused(Status.POLICY_FAILURE)


def send_update_data(firmware: Firmware, request: Packet) -> Packet:
    return _send_update(firmware, request, vmsa=False)


def send_update_vmsa(firmware: Firmware, request: Packet) -> Packet:
    return _send_update(firmware, request, vmsa=True)


def _send_update(firmware: Firmware, request: Packet, *, vmsa: bool) -> Packet:
    """Only the header's length is ever told: a packet is as long as the data in it."""
    firmware.need(PlatformState.WORKING)
    if request.header_length < PACKET_HEADER_SIZE:
        raise Refused(Status.INVALID_LEN, replace(request, header_length=PACKET_HEADER_SIZE))
    guest = firmware.guest(request.handle, GuestState.SEND_UPDATE)
    _check_vmsa(guest, vmsa)
    length = request.guest_length
    if not 0 < length <= PACKET_MAX or length % 16 or request.transport_length < length:
        raise Refused(Status.INVALID_LEN)
    if request.guest_address % 16:
        raise Refused(Status.INVALID_ADDRESS)
    data = firmware.read(request.guest_address, length)
    firmware.read(request.header_address, PACKET_HEADER_SIZE)  # so that nothing is written if either is bad
    header, ciphertext = sessions.seal(sessions.Channel(guest.tek, guest.tik), data, firmware.rng)
    firmware.write(request.transport_address, ciphertext)
    firmware.write(request.header_address, header.pack())
    return replace(request, header_length=PACKET_HEADER_SIZE)


def _check_vmsa(guest: Guest, vmsa: bool) -> None:
    if vmsa and not guest.policy & Policy.ES:
        raise Refused(Status.UNSUPPORTED)
    if not guest.asid:
        raise Refused(Status.INACTIVE)


def send_finish(firmware: Firmware, request: Handle) -> None:
    _end(firmware, request, GuestState.SEND_UPDATE, GuestState.SENT)


def send_cancel(firmware: Firmware, request: Handle) -> None:
    _end(firmware, request, GuestState.SEND_UPDATE, GuestState.RUNNING)


def receive_finish(firmware: Firmware, request: Handle) -> None:
    _end(firmware, request, GuestState.RECEIVE_UPDATE, GuestState.RUNNING)


def _end(firmware: Firmware, request: Handle, before: GuestState, after: GuestState) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, before)
    firmware.guests[guest.handle] = replace(guest, state=after, tek=ZERO_KEY, tik=ZERO_KEY)


def receive_start(firmware: Firmware, request: Start) -> Start:
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    channel = session_channel(firmware, request)
    guest = Guest(handle=0, policy=request.policy, state=GuestState.RECEIVE_UPDATE, tek=channel.tek, tik=channel.tik)
    return replace(request, handle=firmware.admit(guest, request.handle))


def receive_update_data(firmware: Firmware, request: Packet) -> None:
    _receive_update(firmware, request, vmsa=False)


def receive_update_vmsa(firmware: Firmware, request: Packet) -> None:
    _receive_update(firmware, request, vmsa=True)


def _receive_update(firmware: Firmware, request: Packet, *, vmsa: bool) -> None:
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
        raise Refused(Status.INVALID_LEN)
    if request.guest_address % 16:
        raise Refused(Status.INVALID_ADDRESS)
    header = sessions.Header.unpack(firmware.read(request.header_address, PACKET_HEADER_SIZE))
    if header.flags & sessions.COMPRESSED:
        raise Refused(Status.UNSUPPORTED)
    data = firmware.read(request.transport_address, length)
    plain = sessions.unseal(sessions.Channel(guest.tek, guest.tik), header, data, context=sessions.DATA)
    if vmsa and length < PAGE_SIZE:
        raise Refused(Status.INVALID_LEN)
    firmware.write(request.guest_address, plain)
