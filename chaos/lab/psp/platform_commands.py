# SPDX-License-Identifier: Apache-2.0
"""The platform: initialisation, status, flushing. Each function is one command."""

from __future__ import annotations

from chaos.lab.psp.buffers import Init, PlatformStatus
from chaos.lab.psp.firmware import Firmware
from chaos.lab.psp.numbers import (
    API_MAJOR,
    API_MINOR,
    BUILD,
    CONFIG_ES,
    TMR_SIZE,
    PlatformState,
    Status,
)
from chaos.lab.psp.state import Refused


def init(firmware: Firmware, request: Init) -> None:
    firmware.need(PlatformState.UNINIT)
    if request.flags & ~CONFIG_ES or request.reserved:
        raise Refused(Status.INVALID_CONFIG)
    _start(firmware, flags=request.flags, tmr_address=request.tmr_address, tmr_len=request.tmr_len)


def _start(firmware: Firmware, *, flags: int, tmr_address: int, tmr_len: int) -> None:
    """The common end of INIT and INIT_EX: take the TMR, forget every ASID, be initialised."""
    if flags & CONFIG_ES:
        if tmr_address % TMR_SIZE:
            raise Refused(Status.INVALID_ADDRESS)
        if tmr_len != TMR_SIZE:
            raise Refused(Status.INVALID_LEN)
        firmware.memory.read(tmr_address, TMR_SIZE)  # raises BadAddress
        firmware.tmr = range(tmr_address, tmr_address + TMR_SIZE)
    firmware.es_enabled = bool(flags & CONFIG_ES)
    firmware.dirty = set(range(1, firmware.config.max_asid + 1))
    firmware.wbinvd_done = False
    firmware.platform = PlatformState.INIT


def shutdown(firmware: Firmware, _request: None) -> None:
    """Allowed in every state. All guests go."""
    firmware.reset()


def platform_status(firmware: Firmware, _request: None) -> PlatformStatus:
    """Allowed in every state."""
    return PlatformStatus(
        api_major=API_MAJOR,
        api_minor=API_MINOR,
        state=firmware.platform,
        owner=0,
        config=CONFIG_ES if firmware.es_enabled else 0,
        build=BUILD,
        guest_count=len(firmware.guests),
    )


def df_flush(firmware: Firmware, _request: None) -> None:
    """Every dirty ASID is clean again, if the caches were written back since it became dirty."""
    if not firmware.config.sees_wbinvd:
        firmware.wbinvd_done = True
    if not firmware.wbinvd_done:
        raise Refused(Status.WBINVD_REQUIRED)
    firmware.dirty.clear()


def nop(_firmware: Firmware, _request: None) -> None:
    """Does nothing, in every state."""
