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
    GuestStatusBuffer,
    Handle,
    InitBuffer,
    InitEx,
    Packet,
    PlatformStatusBuffer,
    Region,
    SendStart,
    StartBuffer,
    TwoBlobs,
)
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.memory import BadAddress
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import CommandRefused


class Use(Enum):
    """What happens to the command buffer."""

    IN = auto()  # read; what the command changed in its copy is not written back
    OUT = auto()  # written on success, never read
    IN_OUT = auto()  # read, and written on success
    LENGTHS = auto()  # read, and written on success and with INVALID_LEN, to tell the length that would do


class CommandEntry(msgspec.Struct, frozen=True):
    """A command's function, the type of its buffer (None: it has none), and how the buffer is used.

    The function takes the firmware and the buffer (None for Use.OUT and without buffer), and returns the buffer to
    write back or None to write back what was read. It raises Refused or BadAddress, and then has changed nothing.
    """

    run: Callable[[SoftwareFirmware, Any], Buffer | None]
    buffer: type[Buffer] | None = None
    use: Use = Use.IN


class CommandOutcome(msgspec.Struct, frozen=True):
    """How a command went. `handle` is the guest it was about, where it was about one. `status` is one of
    `FirmwareStatus`, unless it was made up."""

    status: int
    handle: int | None = None


TABLE: Final[dict[int, CommandEntry]] = {
    FirmwareCommand.INIT: CommandEntry(platform.init, InitBuffer),
    FirmwareCommand.SHUTDOWN: CommandEntry(platform.shutdown),
    FirmwareCommand.FACTORY_RESET: CommandEntry(platform.factory_reset),
    FirmwareCommand.PLATFORM_STATUS: CommandEntry(platform.platform_status, PlatformStatusBuffer, Use.OUT),
    FirmwareCommand.PEK_GEN: CommandEntry(platform.pek_gen),
    FirmwareCommand.PEK_CSR: CommandEntry(platform.pek_csr, Blob, Use.LENGTHS),
    FirmwareCommand.PEK_CERT_IMPORT: CommandEntry(platform.pek_cert_import, TwoBlobs),
    FirmwareCommand.PDH_CERT_EXPORT: CommandEntry(platform.pdh_cert_export, TwoBlobs, Use.LENGTHS),
    FirmwareCommand.PDH_GEN: CommandEntry(platform.pdh_gen),
    FirmwareCommand.DF_FLUSH: CommandEntry(platform.df_flush),
    FirmwareCommand.DOWNLOAD_FIRMWARE: CommandEntry(platform.download_firmware, Blob),
    FirmwareCommand.GET_ID: CommandEntry(platform.get_id, Blob, Use.LENGTHS),
    FirmwareCommand.INIT_EX: CommandEntry(platform.init_ex, InitEx),
    FirmwareCommand.NOP: CommandEntry(platform.nop),
    FirmwareCommand.DECOMMISSION: CommandEntry(guest.decommission, Handle),
    FirmwareCommand.ACTIVATE: CommandEntry(guest.activate, Activate),
    FirmwareCommand.DEACTIVATE: CommandEntry(guest.deactivate, Handle),
    FirmwareCommand.GUEST_STATUS: CommandEntry(guest.guest_status, GuestStatusBuffer, Use.IN_OUT),
    FirmwareCommand.LAUNCH_START: CommandEntry(guest.launch_start, StartBuffer, Use.IN_OUT),
    FirmwareCommand.LAUNCH_UPDATE_DATA: CommandEntry(guest.launch_update_data, Region),
    FirmwareCommand.LAUNCH_UPDATE_VMSA: CommandEntry(guest.launch_update_vmsa, Region),
    FirmwareCommand.LAUNCH_MEASURE: CommandEntry(guest.launch_measure, Region, Use.LENGTHS),
    FirmwareCommand.LAUNCH_UPDATE_SECRET: CommandEntry(transport.launch_secret, Packet),
    FirmwareCommand.LAUNCH_FINISH: CommandEntry(guest.launch_finish, Handle),
    FirmwareCommand.ATTESTATION_REPORT: CommandEntry(guest.attestation_report, Attestation, Use.LENGTHS),
    FirmwareCommand.SEND_START: CommandEntry(transport.send_start, SendStart, Use.LENGTHS),
    FirmwareCommand.SEND_UPDATE_DATA: CommandEntry(transport.send_update_data, Packet, Use.LENGTHS),
    FirmwareCommand.SEND_UPDATE_VMSA: CommandEntry(transport.send_update_vmsa, Packet, Use.LENGTHS),
    FirmwareCommand.SEND_FINISH: CommandEntry(transport.send_finish, Handle),
    FirmwareCommand.SEND_CANCEL: CommandEntry(transport.send_cancel, Handle),
    FirmwareCommand.RECEIVE_START: CommandEntry(transport.receive_start, StartBuffer, Use.IN_OUT),
    FirmwareCommand.RECEIVE_UPDATE_DATA: CommandEntry(transport.receive_update_data, Packet),
    FirmwareCommand.RECEIVE_UPDATE_VMSA: CommandEntry(transport.receive_update_vmsa, Packet),
    FirmwareCommand.RECEIVE_FINISH: CommandEntry(transport.receive_finish, Handle),
    FirmwareCommand.DBG_DECRYPT: CommandEntry(guest.debug_copy, Debug),
    FirmwareCommand.DBG_ENCRYPT: CommandEntry(guest.debug_copy, Debug),
}

UNSUPPORTED: Final = frozenset(
    {
        FirmwareCommand.RING_BUFFER,
        FirmwareCommand.COPY,
        FirmwareCommand.ACTIVATE_EX,
        FirmwareCommand.SWAP_OUT,
        FirmwareCommand.SWAP_IN,
    }
)


_NAMES: Final[dict[int, str]] = {command: command.name for command in FirmwareCommand}


def name(command: int) -> str:
    """The name of a command id, or its number where it has none."""
    return _NAMES.get(command) or f"{command:#05x}"


def buffer_size(command: int) -> int:
    """How many bytes the command register's address points at, 0 for a command without a buffer."""
    entry = TABLE.get(command)
    return entry.buffer.size() if entry and entry.buffer else 0


def execute(firmware: SoftwareFirmware, command: int, address: int) -> CommandOutcome:
    """Carry out `command`, its buffer at `address`. Whatever the guest wrote there, this returns a status."""
    entry = TABLE.get(command)
    if entry is None:
        return CommandOutcome(FirmwareStatus.UNSUPPORTED if command in UNSUPPORTED else FirmwareStatus.INVALID_COMMAND)
    request: Buffer | None = None
    try:
        if entry.buffer and entry.use is not Use.OUT:
            request = entry.buffer.unpack(firmware.read(address, entry.buffer.size()))
        reply = entry.run(firmware, request) or request
        if entry.use is not Use.IN and reply is not None:
            firmware.write(address, reply.pack())
    except BadAddress:
        return CommandOutcome(FirmwareStatus.INVALID_ADDRESS, _handle(request))
    except CommandRefused as refusal:
        if entry.use is Use.LENGTHS and refusal.reply is not None:
            firmware.write(address, refusal.reply.pack())
        return CommandOutcome(refusal.status, _handle(request))
    return CommandOutcome(FirmwareStatus.SUCCESS, _handle(reply))


def subject(firmware: SoftwareFirmware, command: int, address: int) -> int | None:
    """The guest that the command's buffer names as it came, None if it names none."""
    return _handle(_as_it_came(firmware, command, address))


def asked(firmware: SoftwareFirmware, command: int, address: int) -> dict[str, int]:
    """The addresses and lengths in the command's buffer as it came, without the C-bit. Only of those commands whose
    bounds somebody judges; a record of each of the others would say nothing."""
    request = _as_it_came(firmware, command, address)
    if not isinstance(request, Blob | TwoBlobs | Debug):
        return {}
    fields = {name: getattr(request, name) for name in request.__struct_fields__ if name != "handle"}
    return {name: value if "length" in name else firmware.physical(value) for name, value in fields.items()}


def tell_length(firmware: SoftwareFirmware, command: int, address: int, length: int) -> bool:
    """Write `length` over every length in the command's buffer. False if the command is not answered so."""
    entry = TABLE.get(command)
    request = _as_it_came(firmware, command, address)
    if entry is None or entry.use is not Use.LENGTHS or request is None:
        return False
    lengths = {name: length for name in request.__struct_fields__ if name.endswith("length")}
    firmware.write(address, msgspec.structs.replace(request, **lengths).pack())
    return True


def _as_it_came(firmware: SoftwareFirmware, command: int, address: int) -> Buffer | None:
    """The command's buffer before the command was carried out, None if there is none to read."""
    entry = TABLE.get(command)
    if entry is None or entry.buffer is None or entry.use is Use.OUT:
        return None
    try:
        return entry.buffer.unpack(firmware.read(address, entry.buffer.size()))
    except BadAddress:
        return None


def _handle(buffer: Buffer | None) -> int | None:
    return getattr(buffer, "handle", None)
