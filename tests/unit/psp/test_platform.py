# SPDX-License-Identifier: Apache-2.0
"""Platform commands through the mailbox: states, lengths, the TMR, flushing, INIT_EX."""

from __future__ import annotations

import pytest

from chaos.lab.psp.numbers import Command, Status
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
    assert host.on(Command.DECOMMISSION, first) is Status.SUCCESS
    assert host.platform() == (WORKING, 0x100, 1)
    assert host.on(Command.DECOMMISSION, second) is Status.SUCCESS
    assert host.platform() == (INIT, 0x100, 0)
    assert host.call(Command.SHUTDOWN)[0] is Status.SUCCESS
    assert host.platform() == (UNINIT, 0, 0)


def test_version() -> None:
    host = Host()
    _, (major, minor, _, _, build, _) = host.call(Command.PLATFORM_STATUS, "BBBIBI", [0] * 6)
    assert (major, minor, build) == (0, 24, 15)


def test_init_twice() -> None:
    host = Host()
    host.init()
    assert host.call(Command.INIT, "IIQI", [1, 0, TMR, MIB])[0] is Status.INVALID_PLATFORM_STATE


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([0, 0, 0, 0], Status.SUCCESS),
        ([2, 0, 0, 0], Status.INVALID_CONFIG),
        ([0x10000, 0, 0, 0], Status.INVALID_CONFIG),
        ([0, 1, 0, 0], Status.INVALID_CONFIG),
        ([1, 0, TMR + 0x1000, MIB], Status.INVALID_ADDRESS),
        ([1, 0, TMR, MIB - 1], Status.INVALID_LEN),
        ([1, 0, RAM_SIZE, MIB], Status.INVALID_ADDRESS),
        ([1, 0, TMR, MIB], Status.SUCCESS),
    ],
)
def test_init_checks_its_buffer(values: list[int], status: Status) -> None:
    host = Host()
    assert host.call(Command.INIT, "IIQI", values)[0] is status
    assert host.platform()[0] == (INIT if status is Status.SUCCESS else UNINIT)


def test_init_makes_every_asid_dirty_again() -> None:
    host = Host(Config(es_asids=3, sev_asids=4, sees_wbinvd=True))
    host.init(flush=False)
    host.firmware.wbinvd_done = True
    assert host.call(Command.DF_FLUSH)[0] is Status.SUCCESS
    host.call(Command.SHUTDOWN)
    host.init(flush=False)
    _, handle = host.start()
    assert host.activate(handle, 4) is Status.DFFLUSH_REQUIRED
    assert host.call(Command.DF_FLUSH)[0] is Status.WBINVD_REQUIRED


def test_without_es_there_are_no_es_guests() -> None:
    host = Host()
    host.init(es=False)
    assert host.platform() == (INIT, 0, 0)
    assert host.start(ES_POLICY)[0] is Status.UNSUPPORTED
    assert host.platform()[0] == INIT


def test_the_tmr_is_out_of_reach() -> None:
    """Nobody may name an address in it, not even for a command buffer, from INIT until SHUTDOWN."""
    host = Host()
    assert host.at(Command.PLATFORM_STATUS, TMR) is Status.SUCCESS
    host.init()
    assert host.at(Command.PLATFORM_STATUS, TMR) is Status.INVALID_ADDRESS
    assert host.at(Command.PLATFORM_STATUS, TMR + MIB - 1) is Status.INVALID_ADDRESS
    assert host.at(Command.PLATFORM_STATUS, TMR - 1) is Status.INVALID_ADDRESS
    assert host.at(Command.PLATFORM_STATUS, TMR | 1 << 51) is Status.INVALID_ADDRESS
    assert host.at(Command.PLATFORM_STATUS, TMR - 12) is Status.SUCCESS
    assert host.at(Command.PLATFORM_STATUS, TMR + MIB) is Status.SUCCESS
    host.call(Command.SHUTDOWN)
    assert host.at(Command.PLATFORM_STATUS, TMR) is Status.SUCCESS


def test_the_c_bit_is_not_part_of_an_address() -> None:
    host = Host()
    assert host.at(Command.PLATFORM_STATUS, BUFFER | 1 << 51) is Status.SUCCESS
    assert host.peek(BUFFER, 2) == b"\x00\x18"
    assert host.at(Command.PLATFORM_STATUS, BUFFER | 1 << 50) is Status.INVALID_ADDRESS


def test_shutdown_takes_guests_along() -> None:
    host = Host()
    host.init()
    host.running(4)
    assert host.call(Command.SHUTDOWN)[0] is Status.SUCCESS
    host.init()
    assert host.platform()[2] == 0
    assert host.guest_status(1) == (Status.SUCCESS, 0xAAAA, 0xBBBB, 0)


NEEDS_INIT = {
    Command.PEK_GEN: {INIT},
    Command.PEK_CSR: {INIT, WORKING},
    Command.PEK_CERT_IMPORT: {INIT},
    Command.PDH_CERT_EXPORT: {INIT, WORKING},
    Command.PDH_GEN: {INIT, WORKING},
    Command.FACTORY_RESET: {UNINIT},
    Command.DOWNLOAD_FIRMWARE: {UNINIT},
    Command.INIT: {UNINIT},
    Command.INIT_EX: {UNINIT},
    Command.SHUTDOWN: {UNINIT, INIT, WORKING},
    Command.PLATFORM_STATUS: {UNINIT, INIT, WORKING},
    Command.DF_FLUSH: {UNINIT, INIT, WORKING},
    Command.GET_ID: {UNINIT, INIT, WORKING},
    Command.NOP: {UNINIT, INIT, WORKING},
    Command.GUEST_STATUS: {INIT, WORKING},
    Command.LAUNCH_START: {INIT, WORKING},
    Command.RECEIVE_START: {INIT, WORKING},
    Command.DECOMMISSION: {WORKING},
    Command.ACTIVATE: {WORKING},
    Command.DEACTIVATE: {WORKING},
    Command.LAUNCH_UPDATE_DATA: {WORKING},
    Command.LAUNCH_MEASURE: {WORKING},
    Command.LAUNCH_UPDATE_SECRET: {WORKING},
    Command.LAUNCH_FINISH: {WORKING},
    Command.ATTESTATION_REPORT: {WORKING},
    Command.SEND_START: {WORKING},
    Command.SEND_UPDATE_DATA: {WORKING},
    Command.SEND_UPDATE_VMSA: {WORKING},
    Command.SEND_FINISH: {WORKING},
    Command.SEND_CANCEL: {WORKING},
    Command.RECEIVE_UPDATE_DATA: {WORKING},
    Command.RECEIVE_UPDATE_VMSA: {WORKING},
    Command.RECEIVE_FINISH: {WORKING},
    Command.DBG_DECRYPT: {WORKING},
    Command.DBG_ENCRYPT: {WORKING},
}


@pytest.mark.parametrize("state", [UNINIT, INIT, WORKING])
@pytest.mark.parametrize("command", NEEDS_INIT, ids=lambda command: command.name)
def test_the_platform_state_is_checked_first(command: Command, state: int) -> None:
    """A buffer of zeros gets INVALID_PLATFORM_STATE exactly in the states a command is not for."""
    host = Host()
    if state >= INIT:
        host.init()
    if state == WORKING:
        host.start()
    status = host.at(command, BUFFER)
    assert (status is Status.INVALID_PLATFORM_STATE) == (state not in NEEDS_INIT[command])


def test_every_command_has_its_states_in_the_table() -> None:
    """LAUNCH_UPDATE_VMSA is the exception: it looks at its length before it looks at the platform."""
    host = Host()
    host.init()
    host.start()
    answers = {command: host.at(command, BUFFER) for command in Command if command.name[:4] != "SNP_"}
    known = {command for command, status in answers.items() if status is not Status.UNSUPPORTED}
    assert known == set(NEEDS_INIT) | {Command.LAUNCH_UPDATE_VMSA}
    assert answers[Command.LAUNCH_UPDATE_VMSA] is Status.INVALID_LEN


def test_unknown_commands() -> None:
    host = Host()
    known = set(NEEDS_INIT) | {Command.LAUNCH_UPDATE_VMSA}
    later = {Command.RING_BUFFER, Command.COPY, Command.ACTIVATE_EX, Command.SWAP_OUT, Command.SWAP_IN}
    for command in range(0x800):
        if command in known:
            continue
        expected = Status.UNSUPPORTED if command in later else Status.INVALID_COMMAND
        assert host.at(command, BUFFER) is expected, hex(command)


def test_get_id() -> None:
    host = Host()
    assert host.call(Command.GET_ID, "QI", [0, 0]) == (Status.INVALID_LEN, (0, 64))
    assert host.call(Command.GET_ID, "QI", [SCRATCH, 63]) == (Status.INVALID_LEN, (SCRATCH, 64))
    assert host.call(Command.GET_ID, "QI", [SCRATCH, 128]) == (Status.SUCCESS, (SCRATCH, 64))
    first = host.peek(SCRATCH, 64)
    other = Host(Config(es_asids=3, sev_asids=4, seed=1))
    other.call(Command.GET_ID, "QI", [SCRATCH, 64])
    assert first != other.peek(SCRATCH, 64)
    again = Host()
    again.call(Command.GET_ID, "QI", [SCRATCH, 64])
    assert first == again.peek(SCRATCH, 64)


def test_download_firmware_is_refused() -> None:
    host = Host()
    assert host.call(Command.DOWNLOAD_FIRMWARE, "QI", [SCRATCH + 16, 4096])[0] is Status.INVALID_ADDRESS
    assert host.call(Command.DOWNLOAD_FIRMWARE, "QI", [RAM_SIZE, 4096])[0] is Status.INVALID_ADDRESS
    assert host.call(Command.DOWNLOAD_FIRMWARE, "QI", [SCRATCH, 4096])[0] is Status.BAD_SIGNATURE


def test_wbinvd_is_taken_as_done_by_default() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    host.on(Command.DEACTIVATE, handle)
    assert host.call(Command.DF_FLUSH)[0] is Status.SUCCESS


def test_wbinvd_is_required_where_it_is_watched() -> None:
    host = Host(Config(es_asids=3, sev_asids=4, sees_wbinvd=True))
    host.init(flush=False)
    assert host.call(Command.DF_FLUSH)[0] is Status.WBINVD_REQUIRED
    _, handle = host.start()
    assert host.activate(handle, 4) is Status.DFFLUSH_REQUIRED
    host.firmware.wbinvd_done = True
    assert host.call(Command.DF_FLUSH)[0] is Status.SUCCESS
    assert host.activate(handle, 4) is Status.SUCCESS
    assert host.call(Command.DF_FLUSH)[0] is Status.SUCCESS, "nothing became dirty since"
    assert host.on(Command.DEACTIVATE, handle) is Status.SUCCESS
    assert host.call(Command.DF_FLUSH)[0] is Status.WBINVD_REQUIRED
    assert host.activate(handle, 4) is Status.DFFLUSH_REQUIRED


# -- INIT_EX


def init_ex(host: Host, **changes: int) -> Status:
    values = {"length": 36, "flags": 0, "tmr": TMR, "tmr_len": MIB, "reserved": 0, "nv": NV, "nv_len": NV_SIZE}
    values |= changes
    return host.call(Command.INIT_EX, INIT_EX, list(values.values()))[0]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"flags": 2}, Status.INVALID_CONFIG),
        ({"reserved": 1}, Status.INVALID_CONFIG),
        ({"length": 20}, Status.INVALID_LEN),
        ({"nv": NV + 16}, Status.INVALID_ADDRESS),
        ({"nv": RAM_SIZE}, Status.INVALID_ADDRESS),
        ({"nv_len": NV_SIZE // 2}, Status.INVALID_LEN),
        ({"nv": RAM_SIZE - 0x1000, "nv_len": 0x2000}, Status.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR}, Status.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR - NV_SIZE + 0x1000}, Status.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR + MIB - 0x1000}, Status.INVALID_ADDRESS),
        ({"flags": 1, "nv": TMR - NV_SIZE}, Status.SUCCESS),
        ({"flags": 1, "nv": TMR + MIB}, Status.SUCCESS),
        ({"flags": 0, "nv": TMR}, Status.SUCCESS),
        ({"nv": 0, "nv_len": 0}, Status.SUCCESS),
        ({}, Status.SUCCESS),
    ],
)
def test_init_ex_checks_its_buffer(changes: dict[str, int], status: Status) -> None:
    host = Host()
    for address in (NV, TMR, TMR - NV_SIZE, TMR + MIB):
        host.poke(address, b"\xff" * NV_SIZE)
    assert init_ex(host, **changes) is status
    assert host.platform()[0] == (INIT if status is Status.SUCCESS else UNINIT)


def pdh(host: Host) -> bytes:
    status, _ = host.call(Command.PDH_CERT_EXPORT, "QI4xQI", [SCRATCH, CERT, SCRATCH + 0x1000, 3 * CERT])
    assert status is Status.SUCCESS
    return host.peek(SCRATCH, CERT)


def test_init_ex_begins_with_a_file_of_zeros_as_the_driver_does() -> None:
    """The driver's file is not there at first, so its buffer is zeros: one refusal, erased, then it works."""
    host = Host()
    assert init_ex(host) is Status.SECURE_DATA_INVALID
    assert host.peek(NV, NV_SIZE) == b"\xff" * NV_SIZE
    assert init_ex(host) is Status.SUCCESS
    assert host.peek(NV, NV_SIZE) != b"\xff" * NV_SIZE


def test_init_ex_keeps_the_identity_in_memory() -> None:
    host = Host()
    init_ex(host)
    init_ex(host)
    first = pdh(host)
    kept = host.peek(NV, NV_SIZE)
    host.call(Command.SHUTDOWN)
    assert init_ex(host) is Status.SUCCESS
    assert pdh(host) == first

    assert host.call(Command.PDH_GEN)[0] is Status.SUCCESS
    second = pdh(host)
    assert second != first
    host.call(Command.SHUTDOWN)
    host.poke(NV, kept)
    init_ex(host)
    assert pdh(host) == first

    host.call(Command.SHUTDOWN)
    host.poke(NV + 20, bytes([kept[20] ^ 1]))
    assert init_ex(host) is Status.SECURE_DATA_INVALID


def test_init_ex_memory_of_another_chip() -> None:
    host, other = Host(), Host(Config(es_asids=3, sev_asids=4, seed=1))
    init_ex(host)
    init_ex(host)
    other.poke(NV, host.peek(NV, NV_SIZE))
    assert init_ex(other) is Status.SECURE_DATA_INVALID


def test_the_flash_survives_shutdown_and_not_factory_reset() -> None:
    host = Host()
    host.init()
    first = pdh(host)
    host.call(Command.SHUTDOWN)
    host.init()
    assert pdh(host) == first
    host.call(Command.SHUTDOWN)
    assert host.call(Command.FACTORY_RESET)[0] is Status.SUCCESS
    host.init()
    assert pdh(host) != first
