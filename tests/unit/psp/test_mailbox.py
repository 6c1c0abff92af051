# SPDX-License-Identifier: Apache-2.0
"""The registers, and what a plan does to them."""

from __future__ import annotations

import struct

import msgspec
import pytest

from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.mailbox import Mailbox
from chaos.lab.psp.memory import Ram
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import (
    Corrupt,
    DelayAnswer,
    Die,
    Fail,
    FailpointPlan,
    FailpointRule,
    Planner,
    Reset,
    Stall,
    TellLength,
)
from chaos.lab.psp.state import Config
from tests.unit.psp.host import BUFFER, CMDRESP, FEATURE, INTSTS, LO, MIB, TMR, Host


def plan(host: Host, *rules: FailpointRule, seed: int = 0) -> None:
    host.mailbox.plan(FailpointPlan(rules=rules, seed=seed))


# -- registers


def test_the_machine_is_sev_capable_from_the_start() -> None:
    host = Host()
    assert host.register(FEATURE) == 1
    assert host.register(CMDRESP) == 0
    assert not host.mailbox.poll()


def test_an_answer_is_taken_once() -> None:
    host = Host()
    host.at(FirmwareCommand.NOP, 0)
    assert host.register(CMDRESP) == 1 << 31
    assert host.register(INTSTS) == 2
    assert not host.mailbox.poll()
    assert host.interrupts == 1


def test_without_the_interrupt_bit_there_is_none() -> None:
    """The driver polls when interrupts are off, as in a panic."""
    host = Host()
    host.set_register(CMDRESP, FirmwareCommand.NOP << 16)
    assert host.mailbox.poll()
    assert host.register(CMDRESP) == 1 << 31
    assert host.register(INTSTS) == 0
    assert host.interrupts == 0


def test_the_address_is_both_registers() -> None:
    host = Host()
    assert host.at(FirmwareCommand.PLATFORM_STATUS, 1 << 32 | BUFFER) is FirmwareStatus.INVALID_ADDRESS
    assert host.at(FirmwareCommand.PLATFORM_STATUS, BUFFER) is FirmwareStatus.SUCCESS
    assert host.register(LO) == BUFFER


def test_records() -> None:
    host = Host()
    host.init()
    host.start()
    host.on(FirmwareCommand.DEACTIVATE, 1)
    record = host.records[-1]
    assert (record.command, record.handle, record.status) == ("DEACTIVATE", 1, FirmwareStatus.INACTIVE)
    assert [r.sequence for r in host.records] == list(range(1, len(host.records) + 1))
    assert all(r.start_ns < r.end_ns for r in host.records)
    assert host.records[-2].handle == 1, "LAUNCH_START is about the guest it made"
    assert host.mailbox.executed == {"INIT": 1, "DF_FLUSH": 1, "LAUNCH_START": 1, "DEACTIVATE": 1}


# -- save and load


def test_a_restored_mailbox_goes_on_as_the_other_would() -> None:
    """Save in the middle of launches, load over a copy of the memory: both then give the same bytes."""
    host = Host()
    host.init()
    host.running(4)
    host.on(FirmwareCommand.DEACTIVATE, 1)
    _, handle = host.start(4)
    host.activate(handle, 1)
    host.update(handle, b"data" * 1024)

    saved = msgspec.json.decode(msgspec.json.encode(host.firmware.save()), type=type(host.firmware.save()))
    contents = host.mailbox.contents()
    twin = Host()
    twin.ram[:] = host.ram
    twin.mailbox.restore(contents)
    twin.mailbox.firmware = SoftwareFirmware.load(Ram(twin.ram), saved)
    assert twin.registers == host.registers
    assert twin.firmware.save() == host.firmware.save()

    for machine in (host, twin):
        machine.call(FirmwareCommand.PDH_GEN)
        machine.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [0x20000, 0x824, 0x30000, 3 * 0x824])
        assert machine.activate(1, 4) is FirmwareStatus.DFFLUSH_REQUIRED
        machine.measure(handle)
        assert machine.on(FirmwareCommand.LAUNCH_FINISH, handle) is FirmwareStatus.SUCCESS
        machine.start()
    assert twin.ram == host.ram
    assert twin.firmware.save() == host.firmware.save()


def test_nothing_of_the_state_is_forgotten() -> None:
    """Every field of it away from where it starts, saved and loaded."""
    host = Host(Config(es_asids=1, sev_asids=2, sees_wbinvd=True))
    fresh = host.firmware.save()
    host.init(flush=False)  # fills the flash
    host.call(FirmwareCommand.SHUTDOWN)
    host.poke(0x300000, b"\xff" * 32 * 1024)
    assert (
        host.call(FirmwareCommand.INIT_EX, "IIQIIQI", [36, 1, TMR, MIB, 0, 0x300000, 32 * 1024])[0]
        is FirmwareStatus.SUCCESS
    )
    host.firmware.wbinvd_done = True
    host.call(FirmwareCommand.DF_FLUSH)
    host.start()
    saved = host.firmware.save()
    same = {name for name in saved.__struct_fields__ if getattr(saved, name) == getattr(fresh, name)}
    assert same == {"version", "config"}
    assert SoftwareFirmware.load(Ram(host.ram), saved).save() == saved


def test_a_state_of_another_version_does_not_decode() -> None:
    """So that a cache of snapshots finds out before it starts anything."""
    saved = Host().firmware.save()
    text = msgspec.json.encode(saved)
    assert msgspec.json.decode(text, type=type(saved)) == saved
    with pytest.raises(msgspec.DecodeError, match="version"):
        msgspec.json.decode(text.replace(b'"version":2', b'"version":1'), type=type(saved))


def test_registers_of_another_size_are_refused() -> None:
    host = Host()
    small = Mailbox(
        bytearray(0x11000),
        SoftwareFirmware(Ram(bytearray(16)), Config(es_asids=1, sev_asids=1)),
        interrupt=lambda: None,
        clock=lambda: 0,
    )
    with pytest.raises(ValueError, match="bytes"):
        host.mailbox.restore(small.contents())


# -- failing


def test_fail() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(Fail("RESOURCE_LIMIT"), command="LAUNCH_START", nth=2, name="second"))
    assert host.start() == (FirmwareStatus.SUCCESS, 1)
    assert host.start()[0] is FirmwareStatus.RESOURCE_LIMIT
    assert host.platform()[2] == 1, "a failed command was not carried out"
    assert host.start() == (FirmwareStatus.SUCCESS, 2)
    assert [(f.rule, f.name, f.action, f.command, f.applied) for f in host.firings] == [
        (0, "second", "fail:RESOURCE_LIMIT", "LAUNCH_START", True)
    ]
    assert host.firings[0].sequence == host.records[3].sequence
    assert [r.rule for r in host.records[2:]] == [None, 0, None, None]
    assert host.records[3].status == FirmwareStatus.RESOURCE_LIMIT


def test_fail_what_was_carried_out() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(Fail("HWERROR_PLATFORM", carried_out=True), command="LAUNCH_START"))
    assert host.start()[0] is FirmwareStatus.HWERROR_PLATFORM
    assert host.platform()[2] == 1
    assert host.records[-2].handle == 1


def test_wbinvd_by_plan() -> None:
    """The refusal a software PSP cannot come to by itself; the ASID stays dirty, as it would."""
    host = Host()
    host.init()
    handle = host.running(4)
    host.on(FirmwareCommand.DEACTIVATE, handle)
    plan(host, FailpointRule(Fail("WBINVD_REQUIRED"), command="DF_FLUSH", times=1))
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED
    assert host.activate(handle, 4) is FirmwareStatus.DFFLUSH_REQUIRED
    assert host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS
    assert host.activate(handle, 4) is FirmwareStatus.SUCCESS


# -- telling a length


def test_every_length_of_the_buffer_is_told_and_nothing_is_done() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(TellLength(4000)))
    status, values = host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [0x20000, 0x824, 0x30000, 3 * 0x824])
    assert (status, values) == (FirmwareStatus.INVALID_LEN, (0x20000, 4000, 0x30000, 4000))
    assert host.peek(0x20000, 0x824) == bytes(0x824)
    assert host.records[-1].fault == "length:4000"
    assert host.call(FirmwareCommand.GET_ID, "QI", [0x20000, 64]) == (FirmwareStatus.INVALID_LEN, (0x20000, 4000))


def test_a_command_that_has_no_length_to_tell_is_carried_out() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(TellLength(16)))
    assert host.start() == (FirmwareStatus.SUCCESS, 1)
    assert host.at(FirmwareCommand.NOP, 0) is FirmwareStatus.SUCCESS
    assert host.at(FirmwareCommand.PEK_CSR, 1 << 40) is FirmwareStatus.INVALID_ADDRESS
    assert [firing.applied for firing in host.firings] == [False] * 3
    assert {record.fault for record in host.records[-3:]} == {""}


def test_what_a_command_was_asked_is_recorded_as_it_came() -> None:
    """Without the C-bit, which is no part of an address; of commands whose bounds nobody judges nothing."""
    host = Host()
    host.init()
    c_bit = 1 << host.firmware.config.c_bit
    host.call(FirmwareCommand.PEK_CSR, "QI", [0x20000 | c_bit, 16])
    assert host.records[-1].asked == {"address": 0x20000, "length": 16}
    host.call(FirmwareCommand.DBG_ENCRYPT, "I4xQQI", [1, 0x20000 | c_bit, 0x30010, 4112])
    assert host.records[-1].asked == {"source": 0x20000, "destination": 0x30010, "length": 4112}
    host.call(FirmwareCommand.PDH_CERT_EXPORT, "QI4xQI", [1, 2, 3, 4])
    assert list(host.records[-1].asked.values()) == [1, 2, 3, 4]
    host.start()
    assert host.records[-1].asked == {}


# -- delaying


def test_delay() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(DelayAnswer(1_000_000), command="LAUNCH_START"))
    host.poke(BUFFER, bytes(36))
    host.submit(FirmwareCommand.LAUNCH_START, BUFFER)
    host.mailbox.poll()
    submitted = host.now
    assert host.answer() is None
    assert host.mailbox.pending
    assert not host.mailbox.stalled
    assert not host.firmware.guests, "carried out when it is due, not before"
    assert not host.mailbox.release()
    looks = 0
    while host.answer() is None:
        host.mailbox.poll()
        looks += 1
        assert looks < 5000, "never answered"
    assert host.now - submitted >= 1_000_000 - 10_000
    assert looks > 100
    assert host.firmware.guests
    assert host.records[-1].end_ns - host.records[-1].start_ns >= 1_000_000
    assert len(host.firings) == 1


# -- stalling


@pytest.mark.parametrize("carried_out", [False, True])
def test_stall_until_release(carried_out: bool) -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    plan(host, FailpointRule(Stall(carried_out=carried_out), command="DEACTIVATE"))
    host.poke(BUFFER, struct.pack("<I", handle))
    host.submit(FirmwareCommand.DEACTIVATE, BUFFER)
    for _ in range(10):
        host.mailbox.poll()
    assert host.answer() is None
    assert host.mailbox.stalled
    assert [f.action for f in host.firings] == ["withhold" if carried_out else "stall"]
    assert (host.firmware.guests[handle].asid == 0) == carried_out
    with pytest.raises(ValueError, match="held back"):
        host.mailbox.contents()
    assert host.mailbox.release()
    assert host.mailbox.poll()
    assert host.answer() is FirmwareStatus.SUCCESS
    assert host.firmware.guests[handle].asid == 0
    assert not host.mailbox.release()
    assert host.mailbox.executed["DEACTIVATE"] == 1
    host.mailbox.contents()


def test_a_stall_outlives_its_plan() -> None:
    host = Host()
    plan(host, FailpointRule(Stall(), command="NOP"))
    host.submit(FirmwareCommand.NOP)
    host.mailbox.poll()
    plan(host)
    host.mailbox.poll()
    assert host.answer() is None
    assert host.mailbox.release()
    host.mailbox.poll()
    assert host.answer() is FirmwareStatus.SUCCESS
    assert host.records[-1].rule == 0


def test_a_command_the_host_gave_up_on() -> None:
    """The driver was loaded anew while one was stalled: that one is dropped, the new one answered."""
    host = Host()
    plan(host, FailpointRule(Stall(), command="PEK_GEN"))
    host.submit(FirmwareCommand.PEK_GEN)
    host.mailbox.poll()
    assert host.at(FirmwareCommand.PLATFORM_STATUS, BUFFER) is FirmwareStatus.SUCCESS
    assert [(r.command, r.status) for r in host.records] == [("PEK_GEN", None), ("PLATFORM_STATUS", 0)]
    assert not host.mailbox.stalled
    assert "PEK_GEN" not in host.mailbox.executed


# -- corrupting


def test_corrupt() -> None:
    host = Host()
    host.init()
    plan(host, FailpointRule(Corrupt(), command="LAUNCH_START"), seed=3)
    host.poke(BUFFER + 36, b"untouched")
    assert host.start()[0] is FirmwareStatus.SUCCESS
    garbage = host.peek(BUFFER, 36)
    assert garbage != struct.pack("<IIQI4xQI", 1, 0, 0, 0, 0, 0)
    assert len(set(garbage)) > 8
    assert host.peek(BUFFER + 36, 9) == b"untouched"
    assert host.platform()[2] == 1
    assert host.firings[0].applied
    twin = Host()
    twin.init()
    plan(twin, FailpointRule(Corrupt(), command="LAUNCH_START"), seed=3)
    twin.start()
    assert twin.peek(BUFFER, 36) == garbage, "the seed decides"


def test_there_may_be_nothing_to_corrupt() -> None:
    host = Host()
    plan(host, FailpointRule(Corrupt()))
    host.call(FirmwareCommand.NOP)
    host.at(FirmwareCommand.PLATFORM_STATUS, 1 << 40)
    assert [f.applied for f in host.firings] == [False, False]


# -- when rules fire


def fired(plan: FailpointPlan, commands: list[str]) -> list[int | None]:
    planner = Planner(plan)
    return [planner.choose(command) for command in commands]


def test_nth_every_and_times() -> None:
    rule = FailpointRule(Stall(), command="NOP")
    nop = ["NOP"] * 7

    def which(**changes: int) -> list[int]:
        found = fired(FailpointPlan(rules=(msgspec.structs.replace(rule, **changes),)), nop)
        return [n for n, index in enumerate(found, 1) if index == 0]

    assert which() == [1, 2, 3, 4, 5, 6, 7]
    assert which(nth=3) == [3]
    assert which(every=3) == [3, 6]
    assert which(times=2) == [1, 2]
    assert which(every=2, times=2) == [2, 4]
    assert which(nth=3, every=2) == []


def test_other_commands_are_not_counted() -> None:
    found = fired(
        FailpointPlan(rules=(FailpointRule(Stall(), command="INIT", nth=2),)), ["NOP", "INIT", "NOP", "INIT", "INIT"]
    )
    assert found == [None, None, None, 0, None]


def test_any_command() -> None:
    assert fired(FailpointPlan(rules=(FailpointRule(Stall(), nth=2),)), ["NOP", "INIT", "NOP"]) == [None, 0, None]


def test_the_first_due_rule_fires_and_all_count() -> None:
    rules = (FailpointRule(Stall(), nth=1), FailpointRule(Stall(), nth=2), FailpointRule(Stall(), command="NOP", nth=2))
    assert fired(FailpointPlan(rules=rules), ["NOP", "NOP", "NOP"]) == [0, 1, None]


def test_chance_is_the_seeds() -> None:
    rules = (FailpointRule(Stall(), percent=25.0), FailpointRule(Stall(), percent=50.0))
    commands = ["NOP"] * 4000
    found = fired(FailpointPlan(rules=rules, seed=1), commands)
    assert found == fired(FailpointPlan(rules=rules, seed=1), commands)
    assert found != fired(FailpointPlan(rules=rules, seed=2), commands)
    assert 850 < found.count(0) < 1150
    assert 1300 < found.count(1) < 1700, "half of what the first one left"


def test_chance_at_its_ends() -> None:
    assert fired(FailpointPlan(rules=(FailpointRule(Stall(), percent=0.0),)), ["NOP"] * 50) == [None] * 50
    assert fired(FailpointPlan(rules=(FailpointRule(Stall(), percent=100.0),)), ["NOP"] * 50) == [0] * 50


def test_luck_does_not_depend_on_the_other_conditions() -> None:
    free = fired(FailpointPlan(rules=(FailpointRule(Stall(), percent=30.0),)), ["NOP"] * 40)
    bound = fired(FailpointPlan(rules=(FailpointRule(Stall(), percent=30.0, every=2),)), ["NOP"] * 40)
    assert bound == [index if n % 2 == 0 else None for n, index in enumerate(free, 1)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '{"rules":[{"action":{"type":"fail","status":"NO_SUCH"}}]}',
            "status 'NO_SUCH' is no number",
        ),
        ('{"rules":[{"action":{"type":"stall"},"command":"INTI"}]}', "command 'INTI' is none of"),
        ('{"rules":[{"action":{"type":"stall"},"nth":0}]}', "nth must be at least 1"),
        ('{"rules":[{"action":{"type":"stall"},"percent":101}]}', "percent must be 0 to 100"),
        ('{"rules":[{"action":{"type":"delay","ns":-1}}]}', "ns must not be negative"),
        ('{"rules":[{"action":{"type":"explode"}}]}', "Invalid value 'explode'"),
        ('{"rules":[{"action":{"type":"stall"},"nht":1}]}', "unknown field `nht`"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.json.decode(text, type=FailpointPlan)


def test_a_plan_is_data() -> None:
    text = b'{"rules":[{"action":{"type":"fail","status":"ACTIVE"},"command":"INIT","every":2}],"seed":4}'
    rule = FailpointRule(Fail("ACTIVE"), command="INIT", every=2)
    assert msgspec.json.decode(text, type=FailpointPlan) == FailpointPlan(rules=(rule,), seed=4)


# -- death, resets and lies


def test_the_dead_answer_nothing_any_more() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    plan(host, FailpointRule(Die(), command="DEACTIVATE"))
    host.poke(BUFFER, struct.pack("<I", handle))
    host.submit(FirmwareCommand.DEACTIVATE, BUFFER)
    assert host.mailbox.poll()
    assert host.mailbox.dead
    assert (host.records[-1].command, host.records[-1].handle, host.records[-1].status) == ("DEACTIVATE", handle, None)
    assert host.records[-1].fault == "dead"
    plan(host)
    assert not host.mailbox.release()
    host.submit(FirmwareCommand.NOP)
    assert not host.mailbox.poll()
    assert host.answer() is None
    with pytest.raises(ValueError, match="dead"):
        host.mailbox.contents()


def test_a_reset_loses_every_guest() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    plan(host, FailpointRule(Reset(), command="GUEST_STATUS", nth=2))
    assert host.on(FirmwareCommand.GUEST_STATUS, handle) is FirmwareStatus.SUCCESS
    assert host.on(FirmwareCommand.GUEST_STATUS, handle) is FirmwareStatus.INVALID_PLATFORM_STATE, (
        "the first command after it"
    )
    assert host.platform()[0] == 0
    assert host.firings[0].action == host.records[-2].fault == "reset"
    host.init()
    assert host.start() == (FirmwareStatus.SUCCESS, 1)


def test_what_is_skipped_was_not_done() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    plan(host, FailpointRule(Fail("SUCCESS"), command="DEACTIVATE"))
    assert host.on(FirmwareCommand.DEACTIVATE, handle) is FirmwareStatus.SUCCESS
    assert host.firmware.guests[handle].asid == 4
    assert (host.records[-1].fault, host.records[-1].handle) == ("skip", handle)


def test_a_status_without_a_name() -> None:
    host = Host()
    plan(host, FailpointRule(Fail("4711"), command="NOP"))
    host.submit(FirmwareCommand.NOP)
    host.mailbox.poll()
    assert host.register(CMDRESP) == 1 << 31 | 4711
    assert (host.records[-1].status, host.records[-1].fault) == (4711, "fail:4711")


def test_a_failed_command_is_about_the_guest_that_it_names() -> None:
    host = Host()
    host.init()
    handle = host.running(4)
    plan(host, FailpointRule(Fail("HWERROR_PLATFORM"), command="DECOMMISSION"))
    host.on(FirmwareCommand.DECOMMISSION, handle)
    assert (host.records[-1].handle, host.records[-1].fault) == (handle, "fail:HWERROR_PLATFORM")


def test_nothing_was_done_where_there_was_nothing_to_corrupt() -> None:
    host = Host()
    plan(host, FailpointRule(Corrupt()))
    host.call(FirmwareCommand.NOP)
    assert (host.records[-1].fault, host.firings[-1].action) == ("", "garbage")


# -- plans beside each other


def test_plans_are_added_and_taken_back_by_name() -> None:
    """The counters of those that stay go on, and so do their places."""
    host = Host()
    plan(host, FailpointRule(Fail("ACTIVE"), command="NOP", nth=3, name="a"))
    host.call(FirmwareCommand.NOP)
    host.mailbox.add(FailpointPlan(rules=(FailpointRule(Fail("INACTIVE"), command="NOP", nth=1, name="b"),)))
    assert host.call(FirmwareCommand.NOP)[0] is FirmwareStatus.INACTIVE
    assert host.call(FirmwareCommand.NOP)[0] is FirmwareStatus.ACTIVE
    assert [(f.rule, f.name) for f in host.firings] == [(1, "b"), (0, "a")]
    host.mailbox.add(FailpointPlan(rules=(FailpointRule(Fail("UNSUPPORTED"), command="NOP", name="c"),)))
    host.mailbox.withdraw("a")
    host.mailbox.withdraw("c")
    assert host.call(FirmwareCommand.NOP)[0] is FirmwareStatus.SUCCESS


def test_withdrawing_a_rule_lets_go_what_it_stalls() -> None:
    host = Host()
    plan(host, FailpointRule(Stall(), command="NOP", name="hold"), FailpointRule(Stall(), command="INIT", name="other"))
    host.submit(FirmwareCommand.NOP)
    host.mailbox.poll()
    assert (host.mailbox.stalled_by, host.mailbox.stalled_command) == ("hold", "NOP")
    host.mailbox.withdraw("other")
    host.mailbox.poll()
    assert host.answer() is None
    host.mailbox.withdraw("hold")
    host.mailbox.poll()
    assert host.answer() is FirmwareStatus.SUCCESS
    assert (host.mailbox.stalled_by, host.mailbox.stalled_command) == (None, "")
