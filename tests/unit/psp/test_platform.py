# SPDX-License-Identifier: Apache-2.0
"""Platform commands through the mailbox: states, lengths, the TMR, flushing, INIT_EX."""

from __future__ import annotations

import pytest

from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import Config
from tests.unit.psp.host import BUFFER, ES_POLICY, MIB, RAM_SIZE, SCRATCH, TMR, Host

UNINIT, INIT, WORKING = 0, 1, 2
NV = 3 * MIB
NV_SIZE = 32 * 1024
INIT_EX = "IIQIIQI"
CERT = 0x824


def test_states_of_the_platform() -> None:
    host = Host()
    assert host.platform() == (UNINIT, 0, 0)
    host.init()
    assert host.platform() == (INIT, 0x100, 0)
    _, first = host.start()
    _, second = host.start()
    assert host.platform() == (WORKING, 0x100, 2)
    assert host.on(FirmwareCommand.DECOMMISSION, first) is FirmwareStatus.SUCCESS
    assert host.platform() == (WORKING, 0x100, 1)
    assert host.on(FirmwareCommand.DECOMMISSION, second) is FirmwareStatus.SUCCESS
    assert host.platform() == (INIT, 0x100, 0)
    assert host.call(FirmwareCommand.SHUTDOWN)[0] is FirmwareStatus.SUCCESS
    assert host.platform() == (UNINIT, 0, 0)


def test_version() -> None:
    host = Host()
    _, (major, minor, _, _, build, _) = host.call(FirmwareCommand.PLATFORM_STATUS, "BBBIBI", [0] * 6)
    assert (major, minor, build) == (0, 24, 15)


def test_init_twice() -> None:
    host = Host()
    host.init()
    assert host.call(FirmwareCommand.INIT, "IIQI", [1, 0, TMR, MIB])[0] is FirmwareStatus.INVALID_PLATFORM_STATE


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([0, 0, 0, 0], FirmwareStatus.SUCCESS),
        ([2, 0, 0, 0], FirmwareStatus.INVALID_CONFIG),
        ([0x10000, 0, 0, 0], FirmwareStatus.INVALID_CONFIG),
        ([0, 1, 0, 0], FirmwareStatus.INVALID_CONFIG),
        ([1, 0, TMR + 0x1000, MIB], FirmwareStatus.INVALID_ADDRESS),
        ([1, 0, TMR, MIB - 1], FirmwareStatus.INVALID_LEN),
        ([1, 0, RAM_SIZE, MIB], FirmwareStatus.INVALID_ADDRESS),
        ([1, 0, TMR, MIB], FirmwareStatus.SUCCESS),
    ],
)
def test_init_checks_its_buffer(values: list[int], status: FirmwareStatus) -> None:
    host = Host()
    assert host.call(FirmwareCommand.INIT, "IIQI", values)[0] is status
    assert host.platform()[0] == (INIT if status is FirmwareStatus.SUCCESS else UNINIT)


def test_init_makes_every_asid_dirty_again() -> None:
    host = Host(Config(es_asids=3, sev_asids=4, sees_wbinvd=True))
    host.init(flush=False)
    host.firmware.wbinvd_done = True
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS
    host.call(FirmwareCommand.SHUTDOWN)
    host.init(flush=False)
    _, handle = host.start()
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED


def test_without_es_there_are_no_es_guests() -> None:
    host = Host()
    host.init(es=False)
    assert host.platform() == (INIT, 0, 0)
    assert host.start(ES_POLICY)[0] is FirmwareStatus.UNSUPPORTED
    assert host.platform()[0] == INIT


def test_the_tmr_is_out_of_reach() -> None:
    """Nobody may name an address in it, not even for a command buffer, from INIT until SHUTDOWN."""
    host = Host()
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR) is FirmwareStatus.SUCCESS
    host.init()
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR) is FirmwareStatus.INVALID_ADDRESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR + MIB - 1) is FirmwareStatus.INVALID_ADDRESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR - 1) is FirmwareStatus.INVALID_ADDRESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR | 1 << 51) is FirmwareStatus.INVALID_ADDRESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR - 12) is FirmwareStatus.SUCCESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR + MIB) is FirmwareStatus.SUCCESS
    host.call(FirmwareCommand.SHUTDOWN)
    assert host.at(FirmwareCommand.PLATFORM_STATUS, TMR) is FirmwareStatus.SUCCESS


def test_the_c_bit_is_not_part_of_an_address() -> None:
    host = Host()
    assert host.at(FirmwareCommand.PLATFORM_STATUS, BUFFER | 1 << 51) is FirmwareStatus.SUCCESS
    assert host.peek(BUFFER, 2) == b"\x00\x18"
    assert host.at(FirmwareCommand.PLATFORM_STATUS, BUFFER | 1 << 50) is FirmwareStatus.INVALID_ADDRESS


def test_shutdown_takes_guests_along() -> None:
    host = Host()
    host.init()
    host.running(4)
    assert host.call(FirmwareCommand.SHUTDOWN)[0] is FirmwareStatus.SUCCESS
    host.init()
    assert host.platform()[2] == 0
    assert host.guest_status(1) == (FirmwareStatus.SUCCESS, 0xAAAA, 0xBBBB, 0)


NEEDS_INIT = {
    FirmwareCommand.PEK_GEN: {INIT},
    FirmwareCommand.PEK_CSR: {INIT, WORKING},
    FirmwareCommand.PEK_CERT_IMPORT: {INIT},
    FirmwareCommand.PDH_CERT_EXPORT: {INIT, WORKING},
    FirmwareCommand.PDH_GEN: {INIT, WORKING},
    FirmwareCommand.FACTORY_RESET: {UNINIT},
    FirmwareCommand.DOWNLOAD_FIRMWARE: {UNINIT},
    FirmwareCommand.INIT: {UNINIT},
    FirmwareCommand.INIT_EX: {UNINIT},
    FirmwareCommand.SHUTDOWN: {UNINIT, INIT, WORKING},
    FirmwareCommand.PLATFORM_STATUS: {UNINIT, INIT, WORKING},
    FirmwareCommand.DF_FLUSH: {UNINIT, INIT, WORKING},
    FirmwareCommand.GET_ID: {UNINIT, INIT, WORKING},
    FirmwareCommand.NOP: {UNINIT, INIT, WORKING},
    FirmwareCommand.GUEST_STATUS: {INIT, WORKING},
    FirmwareCommand.LAUNCH_START: {INIT, WORKING},
    FirmwareCommand.RECEIVE_START: {INIT, WORKING},
    FirmwareCommand.DECOMMISSION: {WORKING},
    FirmwareCommand.ACTIVATE: {WORKING},
    FirmwareCommand.DEACTIVATE: {WORKING},
    FirmwareCommand.LAUNCH_UPDATE_DATA: {WORKING},
    FirmwareCommand.LAUNCH_MEASURE: {WORKING},
    FirmwareCommand.LAUNCH_UPDATE_SECRET: {WORKING},
    FirmwareCommand.LAUNCH_FINISH: {WORKING},
    FirmwareCommand.ATTESTATION_REPORT: {WORKING},
    FirmwareCommand.SEND_START: {WORKING},
    FirmwareCommand.SEND_UPDATE_DATA: {WORKING},
    FirmwareCommand.SEND_UPDATE_VMSA: {WORKING},
    FirmwareCommand.SEND_FINISH: {WORKING},
    FirmwareCommand.SEND_CANCEL: {WORKING},
    FirmwareCommand.RECEIVE_UPDATE_DATA: {WORKING},
    FirmwareCommand.RECEIVE_UPDATE_VMSA: {WORKING},
    FirmwareCommand.RECEIVE_FINISH: {WORKING},
    FirmwareCommand.DBG_DECRYPT: {WORKING},
    FirmwareCommand.DBG_ENCRYPT: {WORKING},
}


@pytest.mark.parametrize("state", [UNINIT, INIT, WORKING])
@pytest.mark.parametrize("command", NEEDS_INIT, ids=lambda command: command.name)
def test_the_platform_state_is_checked_first(command: FirmwareCommand, state: int) -> None:
    """A buffer of zeros gets INVALID_PLATFORM_STATE exactly in the states a command is not for."""
    host = Host()
    if state >= INIT:
        host.init()
    if state == WORKING:
        host.start()
    status = host.at(command, BUFFER)
    assert (status is FirmwareStatus.INVALID_PLATFORM_STATE) == (state not in NEEDS_INIT[command])


def test_every_command_has_its_states_in_the_table() -> None:
    """LAUNCH_UPDATE_VMSA is the exception: it looks at its length before it looks at the platform."""
    host = Host()
    host.init()
    host.start()
    answers = {command: host.at(command, BUFFER) for command in FirmwareCommand if command.name[:4] != "SNP_"}
    known = {command for command, status in answers.items() if status is not FirmwareStatus.UNSUPPORTED}
    assert known == set(NEEDS_INIT) | {FirmwareCommand.LAUNCH_UPDATE_VMSA}
    assert answers[FirmwareCommand.LAUNCH_UPDATE_VMSA] is FirmwareStatus.INVALID_LEN


def test_unknown_commands() -> None:
    host = Host()
    known = set(NEEDS_INIT) | {FirmwareCommand.LAUNCH_UPDATE_VMSA}
    later = {
        FirmwareCommand.RING_BUFFER,
        FirmwareCommand.COPY,
        FirmwareCommand.ACTIVATE_EX,
        FirmwareCommand.SWAP_OUT,
        FirmwareCommand.SWAP_IN,
    }
    for command in range(0x800):
        if command in known:
            continue
        expected = FirmwareStatus.UNSUPPORTED if command in later else FirmwareStatus.INVALID_COMMAND
        assert host.at(command, BUFFER) is expected, hex(command)


def test_get_id() -> None:
    host = Host()
    assert host.call(FirmwareCommand.GET_ID, "QI", [0, 0]) == (FirmwareStatus.INVALID_LEN, (0, 64))
    assert host.call(FirmwareCommand.GET_ID, "QI", [SCRATCH, 63]) == (FirmwareStatus.INVALID_LEN, (SCRATCH, 64))
    assert host.call(FirmwareCommand.GET_ID, "QI", [SCRATCH, 128]) == (FirmwareStatus.SUCCESS, (SCRATCH, 64))
    first = host.peek(SCRATCH, 64)
    other = Host(Config(es_asids=3, sev_asids=4, seed=1))
    other.call(FirmwareCommand.GET_ID, "QI", [SCRATCH, 64])
    assert first != other.peek(SCRATCH, 64)
    again = Host()
    again.call(FirmwareCommand.GET_ID, "QI", [SCRATCH, 64])
    assert first == again.peek(SCRATCH, 64)


def test_download_firmware_is_refused() -> None:
    host = Host()
    assert host.call(FirmwareCommand.DOWNLOAD_FIRMWARE, "QI", [SCRATCH + 16, 4096])[0] is FirmwareStatus.INVALID_ADDRESS
    assert host.call(FirmwareCommand.DOWNLOAD_FIRMWARE, "QI", [RAM_SIZE, 4096])[0] is FirmwareStatus.INVALID_ADDRESS
    assert host.call(FirmwareCommand.DOWNLOAD_FIRMWARE, "QI", [SCRATCH, 4096])[0] is FirmwareStatus.BAD_SIGNATURE


def test_wbinvd_is_taken_as_done_by_default() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS


def test_wbinvd_is_required_where_it_is_watched() -> None:
    host = Host(Config(es_asids=3, sev_asids=4, sees_wbinvd=True))
    host.init(flush=False)
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED
    _, handle = host.start()
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    host.firmware.wbinvd_done = True
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS
    assert host.activate(handle, 4) is FirmwareStatus.SUCCESS
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS, "nothing became dirty since"
    assert host.on(FirmwareCommand.DEACTIVATE, handle) is FirmwareStatus.SUCCESS
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED


# -- INIT_EX


def init_ex(host: Host, **changes: int) -> FirmwareStatus:
    values = {"length": 36, "flags": 0, "tmr": TMR, "tmr_len": MIB, "reserved": 0, "nv": NV, "nv_len": NV_SIZE}
    values |= changes
    return host.call(FirmwareCommand.INIT_EX, INIT_EX, list(values.values()))[0]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"flags": 2}, FirmwareStatus.INVALID_CONFIG),
        ({"reserved": 1}, FirmwareStatus.INVALID_CONFIG),
        ({"length": 20}, FirmwareStatus.INVALID_LEN),
        ({"nv": NV + 16}, FirmwareStatus.INVALID_ADDRESS),
        ({"nv": RAM_SIZE}, FirmwareStatus.INVALID_ADDRESS),
        ({"nv_len": NV_SIZE // 2}, FirmwareStatus.INVALID_LEN),
        ({"nv": RAM_SIZE - 0x1000, "nv_len": 0x2000}, FirmwareStatus.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR}, FirmwareStatus.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR - NV_SIZE + 0x1000}, FirmwareStatus.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR + MIB - 0x1000}, FirmwareStatus.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR - NV_SIZE}, FirmwareStatus.SUCCESS),
        ({"flags": 1, "nv": TMR + MIB}, FirmwareStatus.SUCCESS),
        ({"flags": 0, "nv": TMR}, FirmwareStatus.SUCCESS),
        ({"nv": 0, "nv_len": 0}, FirmwareStatus.SUCCESS),
        ({}, FirmwareStatus.SUCCESS),
    ],
)
def test_init_ex_checks_its_buffer(changes: dict[str, int], status: FirmwareStatus) -> None:
    host = Host()
    for address in (NV, TMR, TMR - NV_SIZE, TMR + MIB):
        host.poke(address, b"\xff" * NV_SIZE)
    assert init_ex(host, **changes) is status
    assert host.platform()[0] == (INIT if status is FirmwareStatus.SUCCESS else UNINIT)


def pdh(host: Host) -> bytes:
    status, _ = host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [SCRATCH, CERT, SCRATCH + 0x1000, 3 * CERT])
    assert status is FirmwareStatus.SUCCESS
    return host.peek(SCRATCH, CERT)


def test_init_ex_begins_with_a_file_of_zeros_as_the_driver_does() -> None:
    """The driver's file is not there at first, so its buffer is zeros: one refusal, erased, then it works."""
    host = Host()
    assert init_ex(host) is FirmwareStatus.SECURE_DATA_INVALID
    assert host.peek(NV, NV_SIZE) == b"\xff" * NV_SIZE
    assert init_ex(host) is FirmwareStatus.SUCCESS
    assert host.peek(NV, NV_SIZE) != b"\xff" * NV_SIZE


def test_init_ex_keeps_the_identity_in_memory() -> None:
    host = Host()
    init_ex(host)
    init_ex(host)
    first = pdh(host)
    kept = host.peek(NV, NV_SIZE)
    host.call(FirmwareCommand.SHUTDOWN)
    assert init_ex(host) is FirmwareStatus.SUCCESS
    assert pdh(host) == first

    assert host.call(FirmwareCommand.PDH_GEN)[0] is FirmwareStatus.SUCCESS
    second = pdh(host)
    assert second != first
    host.call(FirmwareCommand.SHUTDOWN)
    host.poke(NV, kept)
    init_ex(host)
    assert pdh(host) == first

    host.call(FirmwareCommand.SHUTDOWN)
    host.poke(NV + 20, bytes([kept[20] ^ 1]))
    assert init_ex(host) is FirmwareStatus.SECURE_DATA_INVALID


def test_init_ex_memory_of_another_chip() -> None:
    host, other = Host(), Host(Config(es_asids=3, sev_asids=4, seed=1))
    init_ex(host)
    init_ex(host)
    other.poke(NV, host.peek(NV, NV_SIZE))
    assert init_ex(other) is FirmwareStatus.SECURE_DATA_INVALID


def test_the_flash_survives_shutdown_and_not_factory_reset() -> None:
    host = Host()
    host.init()
    first = pdh(host)
    host.call(FirmwareCommand.SHUTDOWN)
    host.init()
    assert pdh(host) == first
    host.call(FirmwareCommand.SHUTDOWN)
    assert host.call(FirmwareCommand.FACTORY_RESET)[0] is FirmwareStatus.SUCCESS
    host.init()
    assert pdh(host) != first
