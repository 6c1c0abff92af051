# SPDX-License-Identifier: Apache-2.0
"""The other side of the mailbox: issues commands through the registers the way the kernel's driver does.

Layouts are written here a second time, from section 5.4 of the kernel contract, so that a mistake in the firmware's
own tables cannot hide.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.mailbox import CommandRecord, Mailbox
from chaos.lab.psp.memory import Ram
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import Firing
from chaos.lab.psp.state import Config

MIB = 1 << 20
RAM_SIZE = 4 * MIB
TMR = 1 * MIB  # where INIT is told to put it
BUFFER = 0x1000  # where command buffers go
SCRATCH = 0x8000  # from here on, what they point at

CMDRESP, LO, HI, INTSTS, FEATURE = 0x10980, 0x109E0, 0x109E4, 0x10694, 0x109FC

ES_POLICY = 1 << 2


class Host:
    """A machine with RAM_SIZE of memory, one mailbox and a clock that moves a microsecond a look."""

    def __init__(self, config: Config | None = None, *, es_asids: int = 3, sev_asids: int = 4) -> None:
        self.ram = bytearray(RAM_SIZE)
        self.registers = bytearray(MIB)
        self.interrupts = 0
        self.now = 0
        self.records: list[CommandRecord] = []
        self.firings: list[Firing] = []
        config = config or Config(es_asids=es_asids, sev_asids=sev_asids)
        self.mailbox = Mailbox(
            self.registers,
            SoftwareFirmware(Ram(self.ram), config),
            interrupt=self._interrupted,
            clock=self._clock,
            on_record=self.records.append,
            on_firing=self.firings.append,
        )

    @property
    def firmware(self) -> SoftwareFirmware:
        return self.mailbox.firmware

    def _clock(self) -> int:
        self.now += 1000
        return self.now

    def _interrupted(self) -> None:
        """What the driver's handler looks at: without both it goes on sleeping, and the command times out."""
        assert self.register(INTSTS) & 2, "interrupt without `command complete`"
        assert self.register(CMDRESP) >> 31, "interrupt before the answer"
        self.interrupts += 1

    def register(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.registers, offset)[0]
        return value

    def set_register(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.registers, offset, value)

    def submit(self, command: int, address: int = 0) -> None:
        """Write a command into the registers, and look no further."""
        self.set_register(LO, address & 0xFFFFFFFF)
        self.set_register(HI, address >> 32)
        self.set_register(INTSTS, 0)
        self.set_register(CMDRESP, command << 16 | 1)

    def answer(self) -> FirmwareStatus | None:
        """The status in the register, None while there is none."""
        value = self.register(CMDRESP)
        return FirmwareStatus(value & 0xFFFF) if value >> 31 else None

    def at(self, command: int, address: int) -> FirmwareStatus:
        """Issue a command whose buffer is at `address` already, and wait for the answer."""
        before = self.interrupts
        self.submit(command, address)
        assert self.mailbox.poll()
        status = self.answer()
        assert status is not None
        assert self.interrupts == before + 1
        return status

    def call(
        self, command: FirmwareCommand, layout: str = "", values: Sequence[int | bytes] = ()
    ) -> tuple[FirmwareStatus, tuple[int, ...]]:
        """Issue a command with the buffer that `values` make in `layout`; returns its status and the buffer after."""
        data = struct.pack("<" + layout, *values)
        self.poke(BUFFER, data)
        status = self.at(command, BUFFER if layout else 0)
        return status, struct.unpack_from("<" + layout, self.ram, BUFFER)

    def poke(self, address: int, data: bytes) -> None:
        self.ram[address : address + len(data)] = data

    def peek(self, address: int, length: int) -> bytes:
        return bytes(self.ram[address : address + length])

    # -- commands, as often as they are needed

    def init(self, *, es: bool = True, flush: bool = True) -> None:
        """A platform ready for guests."""
        assert self.call(FirmwareCommand.INIT, "IIQI", [int(es), 0, TMR, MIB])[0] is FirmwareStatus.SUCCESS
        if flush:
            assert self.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS

    def start(self, policy: int = 0, *, share: int = 0) -> tuple[FirmwareStatus, int]:
        """LAUNCH_START without a session; status and handle."""
        status, values = self.call(FirmwareCommand.LAUNCH_START, "IIQI4xQI", [share, policy, 0, 0, 0, 0])
        return status, values[0]

    def on(self, command: FirmwareCommand, handle: int) -> FirmwareStatus:
        """A command that takes a handle only."""
        return self.call(command, "I", [handle])[0]

    def activate(self, handle: int, asid: int) -> FirmwareStatus:
        return self.call(FirmwareCommand.ACTIVATE, "II", [handle, asid])[0]

    def update(
        self, handle: int, data: bytes, command: FirmwareCommand = FirmwareCommand.LAUNCH_UPDATE_DATA
    ) -> FirmwareStatus:
        self.poke(SCRATCH, data)
        return self.call(command, "I4xQI", [handle, SCRATCH, len(data)])[0]

    def measure(self, handle: int) -> tuple[FirmwareStatus, bytes]:
        """LAUNCH_MEASURE; status and the 48 bytes."""
        status, _ = self.call(FirmwareCommand.LAUNCH_MEASURE, "I4xQI", [handle, SCRATCH, 48])
        return status, self.peek(SCRATCH, 48)

    def guest_status(self, handle: int) -> tuple[FirmwareStatus, int, int, int]:
        """GUEST_STATUS; status, policy, ASID, state."""
        status, values = self.call(FirmwareCommand.GUEST_STATUS, "IIIB", [handle, 0xAAAA, 0xBBBB, 0xCC])
        return status, values[1], values[2], values[3]

    def platform(self) -> tuple[int, int, int]:
        """PLATFORM_STATUS; state, the 32 bits of flags as the kernel reads them, guest count."""
        status, values = self.call(FirmwareCommand.PLATFORM_STATUS, "BBBIBI", [0] * 6)
        assert status is FirmwareStatus.SUCCESS
        return values[2], values[3], values[5]

    def running(self, asid: int, policy: int = 0) -> int:
        """A guest launched to the end with one page of zeros; its handle."""
        status, handle = self.start(policy)
        assert status is FirmwareStatus.SUCCESS
        assert self.activate(handle, asid) is FirmwareStatus.SUCCESS
        assert self.update(handle, bytes(4096)) is FirmwareStatus.SUCCESS
        assert self.measure(handle)[0] is FirmwareStatus.SUCCESS
        assert self.on(FirmwareCommand.LAUNCH_FINISH, handle) is FirmwareStatus.SUCCESS
        return handle
