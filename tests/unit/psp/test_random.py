# SPDX-License-Identifier: Apache-2.0
"""Hypothesis against the mailbox: whatever a host does, the rules of the firmware hold, and nothing breaks it."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chaos.lab.psp import failpoints, wire
from chaos.lab.psp.buffers import Buffer
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.memory import Ram
from chaos.lab.psp.model import TABLE
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import FailpointPlan
from tests.unit.mutation import mutated
from tests.unit.psp.host import BUFFER, ES_POLICY, RAM_SIZE, SCRATCH, TMR, Host

ES_ASIDS, SEV_ASIDS = 2, 3
UNINIT, INIT, WORKING = 0, 1, 2
LUPDATE, LSECRET, RUNNING = 1, 2, 3

handles = st.integers(0, 5)
asids = st.integers(0, ES_ASIDS + SEV_ASIDS + 1)


@dataclass
class Expected:
    """A guest as the test keeps it."""

    policy: int
    state: int = LUPDATE
    asid: int = 0


class Rules(RuleBasedStateMachine):
    """A second, simpler account of the firmware, which the real one must agree with after every command.

    It knows what the API says of states, handles and ASIDs; it computes no keys and moves no data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(es_asids=ES_ASIDS, sev_asids=SEV_ASIDS)
        self.state = UNINIT
        self.guests: dict[int, Expected] = {}
        self.clean: set[int] = set()

    def expect(self, found: FirmwareStatus, *refusals: tuple[bool, FirmwareStatus]) -> bool:
        """The status must be that of the first refusal that holds, else SUCCESS; returns whether it was SUCCESS."""
        wanted = next((status for holds, status in refusals if holds), FirmwareStatus.SUCCESS)
        assert found is wanted, f"{found.name}, not {wanted.name}"
        return found is FirmwareStatus.SUCCESS

    def known(self, handle: int) -> list[tuple[bool, FirmwareStatus]]:
        """The two refusals nearly every guest command begins with."""
        return [
            (self.state != WORKING, FirmwareStatus.INVALID_PLATFORM_STATE),
            (handle not in self.guests, FirmwareStatus.INVALID_GUEST),
        ]

    def owned(self) -> dict[int, int]:
        return {guest.asid: handle for handle, guest in self.guests.items() if guest.asid}

    @initialize()
    def power_on(self) -> None:
        assert self.host.platform()[0] == UNINIT

    @rule()
    def init(self) -> None:
        found = self.host.call(FirmwareCommand.INIT, "IIQI", [1, 0, TMR, 1 << 20])[0]
        if self.expect(found, (self.state != UNINIT, FirmwareStatus.INVALID_PLATFORM_STATE)):
            self.state = INIT
            self.clean = set()

    @precondition(lambda self: self.state != UNINIT)
    @rule(sure=st.integers(0, 15))
    def shutdown(self, sure: int) -> None:
        if sure:
            return  # seldom: it ends everything interesting
        assert self.host.call(FirmwareCommand.SHUTDOWN)[0] is FirmwareStatus.SUCCESS
        self.state = UNINIT
        self.clean -= set(self.owned())
        self.guests.clear()

    @rule()
    def flush(self) -> None:
        assert self.host.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS
        self.clean = set(range(1, ES_ASIDS + SEV_ASIDS + 1)) - set(self.owned())

    @rule(policy=st.sampled_from([0, 1, ES_POLICY]))
    def launch_start(self, policy: int) -> None:
        found, handle = self.host.start(policy)
        if self.expect(found, (self.state == UNINIT, FirmwareStatus.INVALID_PLATFORM_STATE)):
            assert handle not in self.guests
            assert handle > 0
            self.guests[handle] = Expected(policy)
            self.state = WORKING

    @rule(handle=handles, asid=asids)
    def activate(self, handle: int, asid: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        wrong_kind = bool(guest.policy & ES_POLICY) != (asid <= ES_ASIDS)
        if self.expect(
            self.host.activate(handle, asid),
            *self.known(handle),
            (not 1 <= asid <= ES_ASIDS + SEV_ASIDS, FirmwareStatus.INVALID_ASID),
            (asid in self.owned(), FirmwareStatus.ASID_OWNED),
            (guest.asid != 0, FirmwareStatus.ACTIVE),
            (asid not in self.clean, FirmwareStatus.DFFLUSH_REQUIRED),
            (wrong_kind, FirmwareStatus.INVALID_ASID),
        ):
            guest.asid = asid
            self.clean.discard(asid)

    @rule(handle=handles)
    def deactivate(self, handle: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        found = self.host.on(FirmwareCommand.DEACTIVATE, handle)
        if self.expect(found, *self.known(handle), (not guest.asid, FirmwareStatus.INACTIVE)):
            guest.asid = 0

    @rule(handle=handles)
    def decommission(self, handle: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        found = self.host.on(FirmwareCommand.DECOMMISSION, handle)
        if self.expect(found, *self.known(handle), (guest.asid != 0, FirmwareStatus.ACTIVE)):
            del self.guests[handle]
            self.state = WORKING if self.guests else INIT

    @rule(handle=handles, vmsa=st.booleans())
    def update(self, handle: int, vmsa: bool) -> None:
        guest = self.guests.get(handle, Expected(0))
        command = FirmwareCommand.LAUNCH_UPDATE_VMSA if vmsa else FirmwareCommand.LAUNCH_UPDATE_DATA
        self.expect(
            self.host.update(handle, bytes(4096), command),
            *self.known(handle),
            (guest.state != LUPDATE, FirmwareStatus.INVALID_GUEST_STATE),
            (vmsa and not guest.policy & ES_POLICY, FirmwareStatus.UNSUPPORTED),
            (not guest.asid, FirmwareStatus.INACTIVE),
        )

    @rule(handle=handles)
    def measure(self, handle: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        refusals = [*self.known(handle), (guest.state != LUPDATE, FirmwareStatus.INVALID_GUEST_STATE)]
        if self.expect(self.host.measure(handle)[0], *refusals):
            guest.state = LSECRET

    @rule(handle=handles)
    def finish(self, handle: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        found = self.host.on(FirmwareCommand.LAUNCH_FINISH, handle)
        if self.expect(found, *self.known(handle), (guest.state != LSECRET, FirmwareStatus.INVALID_GUEST_STATE)):
            guest.state = RUNNING

    @rule(handle=handles)
    def debug(self, handle: int) -> None:
        guest = self.guests.get(handle, Expected(0))
        self.expect(
            self.host.call(FirmwareCommand.DBG_DECRYPT, "I4xQQI", [handle, SCRATCH, SCRATCH + 4096, 64])[0],
            *self.known(handle),
            (bool(guest.policy & 1), FirmwareStatus.POLICY_FAILURE),
            (not guest.asid, FirmwareStatus.INACTIVE),
        )

    @rule()
    def snapshot(self) -> None:
        """A saved and loaded firmware is the same one."""
        saved = self.host.firmware.save()
        self.host.mailbox.firmware = SoftwareFirmware.load(Ram(self.host.ram), saved)
        assert self.host.firmware.save() == saved

    @invariant()
    def status_agrees(self) -> None:
        assert self.host.platform() == (self.state, 0x100 if self.state else 0, len(self.guests))
        if self.state == UNINIT:
            return
        for handle in range(8):
            guest = self.guests.get(handle)
            expected = (guest.policy, guest.asid, guest.state) if guest else (0xAAAA, 0xBBBB, 0)
            assert self.host.guest_status(handle) == (FirmwareStatus.SUCCESS, *expected)

    @invariant()
    def no_asid_has_two_owners(self) -> None:
        found = [guest.asid for guest in self.host.firmware.guests.values() if guest.asid]
        assert len(found) == len(set(found))
        assert not set(found) & self.host.firmware.dirty

    @invariant()
    def the_table_is_keyed_by_handle(self) -> None:
        assert all(handle == guest.handle for handle, guest in self.host.firmware.guests.items())


TestRules = Rules.TestCase
TestRules.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# -- nonsense


_TELLING = [0, 1, 2, 3, 16, 48, 52, 128, 0x824, 0x186C, 4096, BUFFER, SCRATCH, TMR, RAM_SIZE - 16, RAM_SIZE]


def _plausible(size: int) -> st.SearchStrategy[bytes]:
    """Buffers that are random words, mostly small or near what matters, so that checks after the first are reached."""
    word = st.one_of(
        st.sampled_from(_TELLING),
        st.integers(0, 0xFFFFFFFF),
    )
    words = st.lists(word, min_size=size // 4 + 1, max_size=size // 4 + 1)
    return words.map(lambda found: struct.pack(f"<{len(found)}I", *found)[:size])


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, bytes]:
    command = draw(st.sampled_from(sorted(TABLE)))
    kind: type[Buffer] | None = TABLE[command].buffer
    return command, draw(_plausible(kind.size())) if kind else b""


@settings(max_examples=150, deadline=None)
@given(st.lists(calls(), min_size=1, max_size=20), st.binary(max_size=256), st.booleans())
def test_no_buffer_breaks_it(sequence: list[tuple[int, bytes]], memory: bytes, working: bool) -> None:
    """Any commands with any buffers over any memory: each is answered with a status there is."""
    host = Host()
    if working:
        host.init()
        host.running(4)
        host.start(ES_POLICY)
    host.ram[SCRATCH : SCRATCH + 8192] = (memory or b"\0") * (8192 // max(len(memory), 1)) + bytes(
        8192 % max(len(memory), 1)
    )
    for command, data in sequence:
        host.poke(BUFFER, data)
        host.at(command, BUFFER)  # a Status: anything else raises
        found = [guest.asid for guest in host.firmware.guests.values() if guest.asid]
        assert len(found) == len(set(found))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=20))
def test_no_register_breaks_it(words: list[tuple[int, int]]) -> None:
    """Any values in the registers: a command is answered exactly when bit 31 is clear and there is one."""
    host = Host()
    host.init()
    for word, address in words:
        host.submit(0, address)
        host.set_register(0x10980, word)
        before = len(host.records)
        taken = host.mailbox.poll()
        assert taken == (word != 0 and not word >> 31)
        assert len(host.records) == before + taken
        if taken:
            assert host.answer() is not None  # a Status: anything else raises
        else:
            assert host.register(0x10980) == word


def test_a_million_random_bytes() -> None:
    """Any memory, any registers: buffers of nonsense, and honest ones with bytes changed."""
    chance = random.Random(7)
    host = _working()
    fed = 0
    while fed < 1_000_000:
        command = chance.choice(sorted(TABLE)) if chance.random() < 0.9 else chance.randrange(1 << 10)
        words = [chance.choice(_TELLING) if chance.random() < 0.7 else chance.randrange(1 << 32) for _ in range(20)]
        data = mutated(struct.pack("<20I", *words), chance) + chance.randbytes(chance.choice([0, 500, 20_000]))
        host.poke(BUFFER, data)
        host.poke(SCRATCH, data)
        host.at(command, chance.choice([BUFFER, BUFFER, SCRATCH, BUFFER + 1, RAM_SIZE - 8, 1 << 51, (1 << 64) - 1]))
        fed += len(data)
        if not host.firmware.guests:
            host = _working()


def _working() -> Host:
    host = Host()
    host.init()
    host.running(4)
    host.start(ES_POLICY)
    return host


def test_a_million_random_bytes_on_the_control_channel() -> None:
    """A line is a request or a decoding error, and a snapshot with bytes changed is one too, or refused."""
    chance = random.Random(8)
    host = _working()
    snapshot = wire.PspSnapshot(
        version=1, registers=host.mailbox.contents(), firmware=host.firmware.save(), sequence=3, executed={"INIT": 1}
    )
    plan = FailpointPlan(failpoints.parse("LAUNCH_START#2=fail:RESOURCE_LIMIT; DEACTIVATE=delay:5ms; NOP=garbage"))
    requests = (
        wire.Load(1, snapshot),
        wire.SetPlan(2, plan),
        wire.WithdrawPlan(3, "x"),
        wire.Trace(4, True),
        wire.Quit(5),
    )
    lines = [wire.encode(request) for request in requests]
    fed = 0
    while fed < 1_000_000:
        line = mutated(chance.choice(lines), chance) if chance.random() < 0.95 else chance.randbytes(1000)
        fed += len(line)
        try:
            request = wire.decode_request(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(request, wire.Load):
            try:
                SoftwareFirmware.load(Ram(host.ram), request.snapshot.firmware)
                host.mailbox.restore(request.snapshot.registers)
            except ValueError:
                pass
        elif isinstance(request, wire.SetPlan):
            host.mailbox.plan(request.plan)
