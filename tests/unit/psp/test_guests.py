# SPDX-License-Identifier: Apache-2.0
"""Guests through the mailbox: handles, ASIDs, the launch, its measurement, the debug commands."""

from __future__ import annotations

import hashlib
import hmac
import struct

import pytest

from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.state import Config
from tests.unit.psp.host import BUFFER, ES_POLICY, RAM_SIZE, SCRATCH, TMR, Host

LUPDATE, LSECRET, RUNNING = 1, 2, 3
PAGE = 4096


@pytest.fixture
def host() -> Host:
    """SEV-ES ASIDs 1 to 3, SEV ASIDs 4 to 7, initialised and flushed."""
    host = Host()
    host.init()
    return host


# -- handles


def test_handles_are_the_lowest_free(host: Host) -> None:
    assert [host.start()[1] for _ in range(3)] == [1, 2, 3]
    host.on(FirmwareCommand.DECOMMISSION, 2)
    assert host.start()[1] == 2
    assert host.start()[1] == 4


def test_handles_run_out() -> None:
    host = Host(Config(es_asids=3, sev_asids=4, max_guests=2))
    host.init()
    host.start()
    host.start()
    assert host.start()[0] is FirmwareStatus.RESOURCE_LIMIT
    assert host.platform()[2] == 2
    host.on(FirmwareCommand.DECOMMISSION, 1)
    assert host.start() == (FirmwareStatus.SUCCESS, 1)


def test_a_thousand_and_twenty_four_guests_and_no_more() -> None:
    host = Host()
    host.init()
    assert [host.start()[1] for _ in range(1024)] == list(range(1, 1025))
    assert host.start()[0] is FirmwareStatus.RESOURCE_LIMIT
    assert host.platform()[2] == 1024


@pytest.mark.parametrize(
    "command",
    [
        FirmwareCommand.DECOMMISSION,
        FirmwareCommand.DEACTIVATE,
        FirmwareCommand.LAUNCH_FINISH,
        FirmwareCommand.SEND_FINISH,
        FirmwareCommand.SEND_CANCEL,
        FirmwareCommand.RECEIVE_FINISH,
    ],
)
@pytest.mark.parametrize("handle", [0, 2, 0xFFFFFFFF])
def test_a_handle_nobody_has(host: Host, command: FirmwareCommand, handle: int) -> None:
    host.start()
    assert host.on(command, handle) is FirmwareStatus.INVALID_GUEST


def test_guest_status(host: Host) -> None:
    _, handle = host.start(0x2A)
    assert host.guest_status(handle) == (FirmwareStatus.SUCCESS, 0x2A, 0, LUPDATE)
    host.activate(handle, 4)
    assert host.guest_status(handle) == (FirmwareStatus.SUCCESS, 0x2A, 4, LUPDATE)
    host.measure(handle)
    assert host.guest_status(handle)[3] == LSECRET
    host.on(FirmwareCommand.LAUNCH_FINISH, handle)
    assert host.guest_status(handle) == (FirmwareStatus.SUCCESS, 0x2A, 4, RUNNING)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    assert host.guest_status(handle) == (FirmwareStatus.SUCCESS, 0x2A, 0, RUNNING)
    host.on(FirmwareCommand.DECOMMISSION, handle)
    host.start()  # another guest has the handle now
    assert host.guest_status(handle) == (FirmwareStatus.SUCCESS, 0, 0, LUPDATE)
    assert host.guest_status(7) == (FirmwareStatus.SUCCESS, 0xAAAA, 0xBBBB, 0)


def test_decommission_needs_an_inactive_guest(host: Host) -> None:
    _, handle = host.start()
    host.activate(handle, 4)
    assert host.on(FirmwareCommand.DECOMMISSION, handle) is FirmwareStatus.ACTIVE
    assert host.on(FirmwareCommand.DEACTIVATE, handle) is FirmwareStatus.SUCCESS
    assert host.on(FirmwareCommand.DEACTIVATE, handle) is FirmwareStatus.INACTIVE
    assert host.on(FirmwareCommand.DECOMMISSION, handle) is FirmwareStatus.SUCCESS
    assert host.on(FirmwareCommand.DECOMMISSION, handle) is FirmwareStatus.INVALID_PLATFORM_STATE


# -- policy


def test_a_shared_key_needs_the_same_policy(host: Host) -> None:
    _, first = host.start(0)
    assert host.start(0, share=first)[0] is FirmwareStatus.SUCCESS
    assert host.start(1, share=first)[0] is FirmwareStatus.POLICY_FAILURE
    assert host.start(0, share=99)[0] is FirmwareStatus.INVALID_GUEST
    _, alone = host.start(2)
    assert host.start(2, share=alone)[0] is FirmwareStatus.POLICY_FAILURE
    assert host.platform()[2] == 3


# -- ASIDs


@pytest.mark.parametrize("asid", [0, 8, 1 << 31])
@pytest.mark.parametrize("policy", [0, ES_POLICY])
def test_asids_there_are_not(host: Host, policy: int, asid: int) -> None:
    _, handle = host.start(policy)
    assert host.activate(handle, asid) is FirmwareStatus.INVALID_ASID


@pytest.mark.parametrize("asid", range(1, 8))
def test_es_and_plain_guests_have_their_own_asids(host: Host, asid: int) -> None:
    _, plain = host.start()
    _, es = host.start(ES_POLICY)
    assert host.activate(plain, asid) is (FirmwareStatus.SUCCESS if asid >= 4 else FirmwareStatus.INVALID_ASID)
    assert host.activate(es, asid) is (FirmwareStatus.SUCCESS if asid < 4 else FirmwareStatus.ASID_OWNED)


def test_an_asid_has_one_owner(host: Host) -> None:
    _, first = host.start()
    _, second = host.start()
    assert host.activate(first, 4) is FirmwareStatus.SUCCESS
    assert host.activate(second, 4) is FirmwareStatus.ASID_OWNED
    assert host.activate(first, 4) is FirmwareStatus.ASID_OWNED
    assert host.activate(first, 5) is FirmwareStatus.ACTIVE
    assert host.activate(second, 5) is FirmwareStatus.SUCCESS


def test_nothing_is_activated_before_the_first_flush() -> None:
    host = Host()
    host.init(flush=False)
    _, handle = host.start()
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    assert host.guest_status(handle)[2] == 0
    host.call(FirmwareCommand.DF_FLUSH)
    assert host.activate(handle, 4) is FirmwareStatus.SUCCESS


def used(host: Host, *, launched: bool) -> int:
    """A guest that has had ASID 4 and has it no more; it ran there if it was launched."""
    if launched:
        handle = host.running(4)
    else:
        _, handle = host.start()
        host.activate(handle, 4)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    return handle


@pytest.mark.parametrize("launched", [True, False])
def test_a_used_asid_needs_a_flush(host: Host, launched: bool) -> None:
    handle = used(host, launched=launched)
    _, other = host.start()
    assert host.activate(other, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    assert host.activate(other, 5) is FirmwareStatus.SUCCESS
    host.call(FirmwareCommand.DF_FLUSH)
    assert host.activate(handle, 4) is FirmwareStatus.SUCCESS


@pytest.mark.parametrize("launched", [True, False])
def test_newer_firmware_forgives_an_asid_that_never_ran(launched: bool) -> None:
    host = Host(Config(es_asids=3, sev_asids=4, forgive_unrun=True))
    host.init()
    handle = used(host, launched=launched)
    assert host.activate(handle, 4) is (FirmwareStatus.DFFLUSH_REQUIRED if launched else FirmwareStatus.SUCCESS)


def test_a_flush_leaves_owned_asids_alone(host: Host) -> None:
    handle = host.running(4)
    host.call(FirmwareCommand.DF_FLUSH)
    assert host.guest_status(handle)[2] == 4
    _, other = host.start()
    assert host.activate(other, 4) is FirmwareStatus.ASID_OWNED


# -- the launch


def expected_measurement(policy: int, data: bytes, nonce: bytes, tik: bytes = bytes(16)) -> bytes:
    """API 55766, LAUNCH_MEASURE: 0x04, version 0.24, build 15, policy, digest, nonce, under the TIK."""
    digest = hashlib.sha256(data).digest()
    message = bytes([4, 0, 24, 15]) + struct.pack("<I", policy) + digest + nonce
    return hmac.new(tik, message, "sha256").digest()


def test_the_measurement_is_over_the_data_in_order(host: Host) -> None:
    _, handle = host.start(0x01)
    host.activate(handle, 4)
    for piece in (b"a" * PAGE, b"b" * 16, b"c" * 48):
        assert host.update(handle, piece) is FirmwareStatus.SUCCESS
    status, blob = host.measure(handle)
    assert status is FirmwareStatus.SUCCESS
    data = b"a" * PAGE + b"b" * 16 + b"c" * 48
    assert blob[:32] == expected_measurement(0x01, data, blob[32:])
    assert blob[:32] != expected_measurement(0x01, data[::-1], blob[32:])
    assert blob[:32] != expected_measurement(0x00, data, blob[32:])


def test_the_vmsa_is_measured_too(host: Host) -> None:
    _, handle = host.start(ES_POLICY)
    host.activate(handle, 1)
    host.update(handle, b"a" * PAGE)
    assert host.update(handle, b"v" * PAGE, FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.SUCCESS
    assert host.update(handle, b"w" * PAGE, FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.SUCCESS
    _, blob = host.measure(handle)
    data = b"a" * PAGE + b"v" * PAGE + b"w" * PAGE
    assert blob[:32] == expected_measurement(ES_POLICY, data, blob[32:])


def test_an_empty_launch_measures_nothing(host: Host) -> None:
    _, handle = host.start()
    _, blob = host.measure(handle)
    assert blob[:32] == expected_measurement(0, b"", blob[32:])


def test_nonces_differ_and_repeat_with_the_seed() -> None:
    def nonces(seed: int) -> list[bytes]:
        host = Host(Config(es_asids=3, sev_asids=4, seed=seed))
        host.init()
        return [host.measure(host.start()[1])[1][32:] for _ in range(3)]

    assert len(set(nonces(1))) == 3
    assert nonces(1) == nonces(1)
    assert not set(nonces(1)) & set(nonces(2))


def test_the_lab_leaves_memory_as_it_is(host: Host) -> None:
    _, handle = host.start()
    host.activate(handle, 4)
    host.update(handle, b"x" * PAGE)
    assert host.peek(SCRATCH, PAGE) == b"x" * PAGE


def test_the_length_of_a_measurement_can_be_asked(host: Host) -> None:
    _, handle = host.start()
    for length in (0, 47):
        status, values = host.call(FirmwareCommand.LAUNCH_MEASURE, "I4xQI", [handle, 0, length])
        assert (status, values[2]) == (FirmwareStatus.INVALID_LEN, 48)
    assert host.guest_status(handle)[3] == LUPDATE
    status, values = host.call(FirmwareCommand.LAUNCH_MEASURE, "I4xQI", [handle, SCRATCH, 256])
    assert (status, values[2]) == (FirmwareStatus.SUCCESS, 256)


@pytest.mark.parametrize(
    ("address", "length", "status"),
    [
        (SCRATCH, 16, FirmwareStatus.SUCCESS),
        (SCRATCH + 8, 16, FirmwareStatus.INVALID_ADDRESS),
        (SCRATCH, 0, FirmwareStatus.INVALID_LEN),
        (SCRATCH, 24, FirmwareStatus.INVALID_LEN),
        (RAM_SIZE - 16, 32, FirmwareStatus.INVALID_ADDRESS),
        (RAM_SIZE, 16, FirmwareStatus.INVALID_ADDRESS),
        ((1 << 64) - 16, 16, FirmwareStatus.INVALID_ADDRESS),
        (TMR, 16, FirmwareStatus.INVALID_ADDRESS),
        (0, 0xFFFFFFF0, FirmwareStatus.INVALID_ADDRESS),
    ],
)
def test_update_data_checks_its_region(host: Host, address: int, length: int, status: FirmwareStatus) -> None:
    _, handle = host.start()
    host.activate(handle, 4)
    assert host.call(FirmwareCommand.LAUNCH_UPDATE_DATA, "I4xQI", [handle, address, length])[0] is status


def test_update_needs_an_asid(host: Host) -> None:
    _, handle = host.start()
    assert host.update(handle, bytes(16)) is FirmwareStatus.INACTIVE


def test_update_vmsa(host: Host) -> None:
    _, plain = host.start()
    _, es = host.start(ES_POLICY)
    assert host.update(plain, bytes(PAGE), FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.UNSUPPORTED
    assert host.update(es, bytes(PAGE), FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.INACTIVE
    assert host.update(es, bytes(PAGE - 16), FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.INVALID_LEN
    host.activate(es, 1)
    assert host.update(es, bytes(PAGE), FirmwareCommand.LAUNCH_UPDATE_VMSA) is FirmwareStatus.SUCCESS


def test_the_launch_goes_one_way(host: Host) -> None:
    """Every step in every state of a launch: right where it belongs, INVALID_GUEST_STATE elsewhere."""
    _, handle = host.start()
    host.activate(handle, 4)
    wrong = FirmwareStatus.INVALID_GUEST_STATE

    def others(finish: FirmwareStatus) -> None:
        assert host.update(handle, bytes(16)) is wrong
        assert host.measure(handle)[0] is wrong
        assert host.on(FirmwareCommand.LAUNCH_FINISH, handle) is finish

    assert host.on(FirmwareCommand.LAUNCH_FINISH, handle) is wrong
    assert host.update(handle, bytes(16)) is FirmwareStatus.SUCCESS
    assert host.measure(handle)[0] is FirmwareStatus.SUCCESS
    others(FirmwareStatus.SUCCESS)
    others(wrong)


def test_a_refused_measurement_changes_nothing(host: Host) -> None:
    _, handle = host.start()
    assert (
        host.call(FirmwareCommand.LAUNCH_MEASURE, "I4xQI", [handle, RAM_SIZE, 48])[0] is FirmwareStatus.INVALID_ADDRESS
    )
    assert host.guest_status(handle)[3] == LUPDATE
    assert host.measure(handle)[0] is FirmwareStatus.SUCCESS


# -- debug


@pytest.mark.parametrize("command", [FirmwareCommand.DBG_DECRYPT, FirmwareCommand.DBG_ENCRYPT])
def test_debug_copies(host: Host, command: FirmwareCommand) -> None:
    handle = host.running(4)
    host.poke(SCRATCH, bytes(range(64)))
    values = [handle, SCRATCH, SCRATCH + 0x1000, 48]
    assert host.call(command, "I4xQQI", values)[0] is FirmwareStatus.SUCCESS
    assert host.peek(SCRATCH + 0x1000, 64) == bytes(range(48)) + bytes(16)


@pytest.mark.parametrize(
    ("source", "destination", "length", "status"),
    [
        (SCRATCH + 1, SCRATCH, 16, FirmwareStatus.INVALID_ADDRESS),
        (SCRATCH, SCRATCH + 8, 16, FirmwareStatus.INVALID_ADDRESS),
        (SCRATCH, SCRATCH, 15, FirmwareStatus.INVALID_LEN),
        (RAM_SIZE, SCRATCH, 16, FirmwareStatus.INVALID_ADDRESS),
        (SCRATCH, RAM_SIZE, 16, FirmwareStatus.INVALID_ADDRESS),
        (SCRATCH, SCRATCH, 0, FirmwareStatus.SUCCESS),
    ],
)
def test_debug_checks(host: Host, source: int, destination: int, length: int, status: FirmwareStatus) -> None:
    handle = host.running(4)
    assert host.call(FirmwareCommand.DBG_DECRYPT, "I4xQQI", [handle, source, destination, length])[0] is status


def test_debug_honours_the_policy(host: Host) -> None:
    handle = host.running(4, policy=1)
    host.poke(SCRATCH, b"s" * 16 + bytes(16))
    for command in (FirmwareCommand.DBG_DECRYPT, FirmwareCommand.DBG_ENCRYPT):
        values = [handle, SCRATCH, SCRATCH + 16, 16]
        assert host.call(command, "I4xQQI", values)[0] is FirmwareStatus.POLICY_FAILURE
    assert host.peek(SCRATCH + 16, 16) == bytes(16)


def test_debug_needs_an_asid(host: Host) -> None:
    handle = host.running(4)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    assert (
        host.call(FirmwareCommand.DBG_DECRYPT, "I4xQQI", [handle, SCRATCH, SCRATCH, 16])[0] is FirmwareStatus.INACTIVE
    )
    assert (
        host.call(FirmwareCommand.DBG_DECRYPT, "I4xQQI", [9, SCRATCH, SCRATCH, 16])[0] is FirmwareStatus.INVALID_GUEST
    )


# -- the command buffer itself


@pytest.mark.parametrize(
    "command", [FirmwareCommand.ACTIVATE, FirmwareCommand.GUEST_STATUS, FirmwareCommand.LAUNCH_START]
)
@pytest.mark.parametrize("address", [RAM_SIZE, RAM_SIZE - 1, (1 << 64) - 4])
def test_a_buffer_that_is_not_memory(host: Host, command: FirmwareCommand, address: int) -> None:
    assert host.at(command, address) is FirmwareStatus.INVALID_ADDRESS


def test_commands_without_a_buffer_do_not_look_at_the_address(host: Host) -> None:
    assert host.at(FirmwareCommand.DF_FLUSH, RAM_SIZE) is FirmwareStatus.SUCCESS


def test_input_buffers_are_not_written(host: Host) -> None:
    """What comes back is what the caller put there, to the byte, reserved ones included."""
    _, handle = host.start()
    host.activate(handle, 4)
    data = struct.pack("<IIQI", handle, 0xDEADBEEF, SCRATCH, 16)
    host.poke(BUFFER, data)
    assert host.at(FirmwareCommand.LAUNCH_UPDATE_DATA, BUFFER) is FirmwareStatus.SUCCESS
    assert host.peek(BUFFER, len(data)) == data
