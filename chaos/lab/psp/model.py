# SPDX-License-Identifier: Apache-2.0
"""Which commands there are, and how a command goes: fetch its buffer, carry it out, write the answer back.

This is the firmware's dispatch table. A command that is not in it is INVALID_COMMAND, as SNP's are on a firmware of
version 0.24; one of that version which the lab has no use for is UNSUPPORTED.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Final

import msgspec

from chaos.lab.psp import guest_commands as guest
from chaos.lab.psp import platform_commands as platform
from chaos.lab.psp import transport_commands as transport
from chaos.lab.psp.buffers import (
    Activate,
    Attestation,
    Blob,
    Buffer,
    Debug,
    GuestStatus,
    Handle,
    Init,
    InitEx,
    Packet,
    PlatformStatus,
    Region,
    SendStart,
    Start,
    TwoBlobs,
)
from chaos.lab.psp.firmware import Firmware
from chaos.lab.psp.memory import BadAddress
from chaos.lab.psp.numbers import Command, Status
from chaos.lab.psp.state import Refused


class Use(Enum):
    """What happens to the command buffer."""

    IN = auto()  # read; what the command changed in its copy is not written back
    OUT = auto()  # written on success, never read
    IN_OUT = auto()  # read, and written on success
    LENGTHS = auto()  # read, and written on success and with INVALID_LEN, to tell the length that would do


class Entry(msgspec.Struct, frozen=True):
    """A command's function, the type of its buffer (None: it has none), and how the buffer is used.

    The function takes the firmware and the buffer (None for Use.OUT and without buffer), and returns the buffer to
    write back or None to write back what was read. It raises Refused or BadAddress, and then has changed nothing.
    """

    run: Callable[[Firmware, Any], Buffer | None]
    buffer: type[Buffer] | None = None
    use: Use = Use.IN


class Outcome(msgspec.Struct, frozen=True):
    """How a command went. `handle` is the guest it was about, where it was about one. `status` is one of `Status`,
    unless it was made up."""

    status: int
    handle: int | None = None


TABLE: Final[dict[int, Entry]] = {
    Command.INIT: Entry(platform.init, Init),
    Command.SHUTDOWN: Entry(platform.shutdown),
    Command.FACTORY_RESET: Entry(platform.factory_reset),
    Command.PLATFORM_STATUS: Entry(platform.platform_status, PlatformStatus, Use.OUT),
    Command.PEK_GEN: Entry(platform.pek_gen),
    Command.PEK_CSR: Entry(platform.pek_csr, Blob, Use.LENGTHS),
    Command.PEK_CERT_IMPORT: Entry(platform.pek_cert_import, TwoBlobs),
    Command.PDH_CERT_EXPORT: Entry(platform.pdh_cert_export, TwoBlobs, Use.LENGTHS),
    Command.PDH_GEN: Entry(platform.pdh_gen),
    Command.DF_FLUSH: Entry(platform.df_flush),
    Command.DOWNLOAD_FIRMWARE: Entry(platform.download_firmware, Blob),
    Command.GET_ID: Entry(platform.get_id, Blob, Use.LENGTHS),
    Command.INIT_EX: Entry(platform.init_ex, InitEx),
    Command.NOP: Entry(platform.nop),
    Command.DECOMMISSION: Entry(guest.decommission, Handle),
    Command.ACTIVATE: Entry(guest.activate, Activate),
    Command.DEACTIVATE: Entry(guest.deactivate, Handle),
    Command.GUEST_STATUS: Entry(guest.guest_status, GuestStatus, Use.IN_OUT),
    Command.LAUNCH_START: Entry(guest.launch_start, Start, Use.IN_OUT),
    Command.LAUNCH_UPDATE_DATA: Entry(guest.launch_update_data, Region),
    Command.LAUNCH_UPDATE_VMSA: Entry(guest.launch_update_vmsa, Region),
    Command.LAUNCH_MEASURE: Entry(guest.launch_measure, Region, Use.LENGTHS),
    Command.LAUNCH_UPDATE_SECRET: Entry(transport.launch_secret, Packet),
    Command.LAUNCH_FINISH: Entry(guest.launch_finish, Handle),
    Command.ATTESTATION_REPORT: Entry(guest.attestation_report, Attestation, Use.LENGTHS),
    Command.SEND_START: Entry(transport.send_start, SendStart, Use.LENGTHS),
    Command.SEND_UPDATE_DATA: Entry(transport.send_update_data, Packet, Use.LENGTHS),
    Command.SEND_UPDATE_VMSA: Entry(transport.send_update_vmsa, Packet, Use.LENGTHS),
    Command.SEND_FINISH: Entry(transport.send_finish, Handle),
    Command.SEND_CANCEL: Entry(transport.send_cancel, Handle),
    Command.RECEIVE_START: Entry(transport.receive_start, Start, Use.IN_OUT),
    Command.RECEIVE_UPDATE_DATA: Entry(transport.receive_update_data, Packet),
    Command.RECEIVE_UPDATE_VMSA: Entry(transport.receive_update_vmsa, Packet),
    Command.RECEIVE_FINISH: Entry(transport.receive_finish, Handle),
    Command.DBG_DECRYPT: Entry(guest.debug_copy, Debug),
    Command.DBG_ENCRYPT: Entry(guest.debug_copy, Debug),
}

UNSUPPORTED: Final = frozenset(
    {Command.RING_BUFFER, Command.COPY, Command.ACTIVATE_EX, Command.SWAP_OUT, Command.SWAP_IN}
)


_NAMES: Final[dict[int, str]] = {command: command.name for command in Command}


def name(command: int) -> str:
    """The name of a command id, or its number where it has none."""
    return _NAMES.get(command) or f"{command:#05x}"


def buffer_size(command: int) -> int:
    """How many bytes the command register's address points at, 0 for a command without a buffer."""
    entry = TABLE.get(command)
    return entry.buffer.size() if entry and entry.buffer else 0


def execute(firmware: Firmware, command: int, address: int) -> Outcome:
    """Carry out `command`, its buffer at `address`. Whatever the guest wrote there, this returns a status."""
    entry = TABLE.get(command)
    if entry is None:
        return Outcome(Status.UNSUPPORTED if command in UNSUPPORTED else Status.INVALID_COMMAND)
    request: Buffer | None = None
    try:
        if entry.buffer and entry.use is not Use.OUT:
            request = entry.buffer.unpack(firmware.read(address, entry.buffer.size()))
        reply = entry.run(firmware, request) or request
        if entry.use is not Use.IN and reply is not None:
            firmware.write(address, reply.pack())
    except BadAddress:
        return Outcome(Status.INVALID_ADDRESS, _handle(request))
    except Refused as refusal:
        if entry.use is Use.LENGTHS and refusal.reply is not None:
            firmware.write(address, refusal.reply.pack())
        return Outcome(refusal.status, _handle(request))
    return Outcome(Status.SUCCESS, _handle(reply))


def subject(firmware: Firmware, command: int, address: int) -> int | None:
    """The guest that the command's buffer names as it came, None if it names none."""
    entry = TABLE.get(command)
    if entry is None or entry.buffer is None or entry.use is Use.OUT:
        return None
    try:
        return _handle(entry.buffer.unpack(firmware.read(address, entry.buffer.size())))
    except BadAddress:
        return None


def _handle(buffer: Buffer | None) -> int | None:
    return getattr(buffer, "handle", None)
