# SPDX-License-Identifier: Apache-2.0
"""Guests: activation, status, launch, attestation, debugging. Each function is one command.

The order of checks in every one of them is that of AMD's firmware (platform, then handle, then guest state, then the
rest, with the few exceptions it has), because the order decides which status code a doubly wrong request gets.

The lab encrypts nothing, so LAUNCH_UPDATE_* leaves the memory as it is and DBG_* copies it. What SEV-ES adds to a
VMSA (its checksum in the TMR) is not modelled either.
"""

from __future__ import annotations

import hashlib
from struct import pack

from msgspec.structs import replace

from chaos.lab.psp import certs, curve, sessions
from chaos.lab.psp.buffers import Activate, Attestation, Debug, GuestStatusBuffer, Handle, Region, StartBuffer
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.numbers import (
    API_MAJOR,
    API_MINOR,
    BUILD,
    MEASUREMENT_SIZE,
    PAGE_SIZE,
    REPORT_SIZE,
    FirmwareStatus,
    GuestPolicy,
    GuestState,
    PlatformState,
)
from chaos.lab.psp.state import ZERO_KEY, CommandRefused, FirmwareGuest
from chaos.lab.psp.transport_commands import session_channel


def decommission(firmware: SoftwareFirmware, request: Handle) -> None:
    firmware.need(PlatformState.WORKING)
    if firmware.guest(request.handle).asid:
        raise CommandRefused(FirmwareStatus.ACTIVE)
    del firmware.guests[request.handle]
    if not firmware.guests:
        firmware.platform = PlatformState.INIT


def activate(firmware: SoftwareFirmware, request: Activate) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle)
    config = firmware.config
    if not 1 <= request.asid <= config.max_asid:
        raise CommandRefused(FirmwareStatus.INVALID_ASID)
    if firmware.owner(request.asid):
        raise CommandRefused(FirmwareStatus.ASID_OWNED)
    if guest.asid:
        raise CommandRefused(FirmwareStatus.ACTIVE)
    if guest.state is GuestState.SENT:
        raise CommandRefused(FirmwareStatus.INVALID_GUEST_STATE)
    if request.asid in firmware.dirty:
        raise CommandRefused(FirmwareStatus.DFFLUSH_REQUIRED)
    if bool(guest.policy & GuestPolicy.ES) != (request.asid < config.min_sev_asid):
        raise CommandRefused(FirmwareStatus.INVALID_ASID)
    firmware.guests[guest.handle] = replace(guest, asid=request.asid)


def deactivate(firmware: SoftwareFirmware, request: Handle) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle)
    if not guest.asid:
        raise CommandRefused(FirmwareStatus.INACTIVE)
    firmware.deactivate(guest)


def guest_status(firmware: SoftwareFirmware, request: GuestStatusBuffer) -> GuestStatusBuffer:
    """A handle nobody has is no error: the answer is state UNINIT, and the other fields stay as they came."""
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    guest = firmware.guests.get(request.handle)
    if guest is None:
        return replace(request, state=GuestState.UNINIT)
    return GuestStatusBuffer(handle=guest.handle, policy=guest.policy, asid=guest.asid, state=guest.state)


def launch_start(firmware: SoftwareFirmware, request: StartBuffer) -> StartBuffer:
    firmware.need(PlatformState.INIT, PlatformState.WORKING)
    channel = sessions.SessionKeys(ZERO_KEY, ZERO_KEY)
    if request.cert_address:
        channel = session_channel(firmware, request)
    guest = FirmwareGuest(
        handle=0, policy=request.policy, state=GuestState.LAUNCH_UPDATE, tek=channel.tek, tik=channel.tik
    )
    return replace(request, handle=firmware.admit(guest, request.handle))


def launch_update_data(firmware: SoftwareFirmware, request: Region) -> None:
    _launch_update(firmware, request, vmsa=False)


def launch_update_vmsa(firmware: SoftwareFirmware, request: Region) -> None:
    if request.length != PAGE_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    _launch_update(firmware, request, vmsa=True)


def _launch_update(firmware: SoftwareFirmware, request: Region, *, vmsa: bool) -> None:
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, GuestState.LAUNCH_UPDATE)
    if vmsa and not guest.policy & GuestPolicy.ES:
        raise CommandRefused(FirmwareStatus.UNSUPPORTED)
    if not guest.asid:
        raise CommandRefused(FirmwareStatus.INACTIVE)
    if request.address % 16:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    if request.length % 16 or not request.length:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    data = firmware.read(request.address, request.length)
    firmware.guests[guest.handle] = replace(guest, measured=(*guest.measured, data))


def launch_measure(firmware: SoftwareFirmware, request: Region) -> None:
    """Writes 32 bytes of HMAC-SHA-256 under the TIK, then the 16 of the nonce that went into it."""
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, GuestState.LAUNCH_UPDATE)
    if request.length < MEASUREMENT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, length=MEASUREMENT_SIZE))
    digest = hashlib.sha256(b"".join(guest.measured)).digest()
    nonce = firmware.rng.take(16)
    version = (API_MAJOR, API_MINOR, BUILD)
    measurement = sessions.measurement(guest.tik, version, guest.policy, digest, nonce)
    firmware.write(request.address, measurement + nonce)
    firmware.guests[guest.handle] = replace(
        guest, state=GuestState.LAUNCH_SECRET, measured=(), digest=digest, measurement=measurement
    )


def launch_finish(firmware: SoftwareFirmware, request: Handle) -> None:
    """The channel to the owner is closed for good: no secrets after this."""
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(request.handle, GuestState.LAUNCH_SECRET)
    firmware.guests[guest.handle] = replace(
        guest, state=GuestState.RUNNING, tek=ZERO_KEY, tik=ZERO_KEY, measurement=bytes(32)
    )


def attestation_report(firmware: SoftwareFirmware, request: Attestation) -> Attestation:
    """Nonce 16, launch digest 32, policy 4, and over these an ECDSA signature of the PEK: REPORT_SIZE bytes."""
    firmware.need(PlatformState.WORKING)
    guest = firmware.guest(
        request.handle, GuestState.LAUNCH_SECRET, GuestState.RUNNING, GuestState.SEND_UPDATE, GuestState.SENT
    )
    if request.length < REPORT_SIZE:
        raise CommandRefused(FirmwareStatus.INVALID_LEN, replace(request, length=REPORT_SIZE))
    signed = request.nonce + guest.digest + pack("<I", guest.policy)
    r, s = curve.sign(firmware.known_identity().pek, signed)
    signature = pack("<III", certs.Usage.PEK, certs.Algorithm.ECDSA_SHA256, 0)
    firmware.write(request.address, signed + signature + r.to_bytes(72, "little") + s.to_bytes(72, "little"))
    return replace(request, length=REPORT_SIZE)


def debug_copy(firmware: SoftwareFirmware, request: Debug) -> None:
    """DBG_DECRYPT and DBG_ENCRYPT. Nothing is encrypted in the lab, so both copy, and both honour the policy."""
    firmware.need(PlatformState.WORKING)
    if request.source % 16 or request.destination % 16:
        raise CommandRefused(FirmwareStatus.INVALID_ADDRESS)
    if request.length % 16:
        raise CommandRefused(FirmwareStatus.INVALID_LEN)
    guest = firmware.guest(request.handle)
    if guest.policy & GuestPolicy.NODBG:
        raise CommandRefused(FirmwareStatus.POLICY_FAILURE)
    if not guest.asid:
        raise CommandRefused(FirmwareStatus.INACTIVE)
    data = firmware.read(request.source, request.length)
    firmware.write(request.destination, data)
