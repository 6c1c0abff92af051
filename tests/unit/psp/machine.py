# SPDX-License-Identifier: Apache-2.0
"""The process `python -m chaos.lab.psp`, with what QEMU and the controller would hold of it."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from types import TracebackType
from typing import Self

from chaos.lab.psp.client import PspControl
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from tests.unit.psp.host import BUFFER, CMDRESP, HI, INTSTS, LO, MIB, RAM_SIZE, SCRATCH, TMR

DEADLINE_S = 10


class Machine:
    """Starts the process; `control_socket` is the other end of its control channel, `qemu` of its device's."""

    def __init__(self, *arguments: str, ram: bytes = bytes(RAM_SIZE), es: int = 3, sev: int = 4) -> None:
        self.control_socket, theirs = socket.socketpair()
        self.qemu, device = socket.socketpair()
        ram_fd = os.memfd_create("test-ram")
        os.write(ram_fd, ram)
        self.ram = mmap.mmap(ram_fd, RAM_SIZE)
        fds = (device.fileno(), ram_fd, theirs.fileno())
        names = ("--ivshmem-fd", "--ram-fd", "--control-fd")
        options = [text for name, fd in zip(names, fds, strict=True) for text in (name, str(fd))]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "chaos.lab.psp",
                *options,
                *("--es-asids", str(es), "--sev-asids", str(sev)),
                *arguments,
            ],
            pass_fds=fds,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(ram_fd)
        device.close()
        theirs.close()
        self._registers: memoryview | None = None
        self._interrupt = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.control_socket.close()
        self.qemu.close()

    async def control(self) -> PspControl:
        """A client over the control channel, which it owns from then on."""
        return await PspControl.open(self.control_socket.dup())

    def plug_in(self) -> list[int]:
        """Do QEMU's part of the handshake. Returns the numbers that came; keeps memory and first eventfd."""
        self.qemu.settimeout(DEADLINE_S)
        data, fds = b"", []
        while len(data) < 5 * 8:
            piece, found, _, _ = socket.recv_fds(self.qemu, 8, 1)
            assert piece, "the process closed the device"
            data += piece
            fds += found
        memory, self._interrupt, unused = fds
        self._registers = memoryview(mmap.mmap(memory, MIB)).cast("I")
        os.close(memory)
        os.close(unused)
        return list(struct.unpack("<5q", data))

    @property
    def registers(self) -> memoryview:
        assert self._registers is not None, "plug_in first"
        return self._registers

    def submit(self, command: FirmwareCommand, data: bytes = b"") -> None:
        self.ram[BUFFER : BUFFER + len(data)] = data
        self.registers[LO // 4] = BUFFER
        self.registers[HI // 4] = 0
        self.registers[CMDRESP // 4] = command << 16 | 1

    def answer(self, deadline: float = DEADLINE_S) -> FirmwareStatus | None:
        """Wait for the interrupt; None if it does not come."""
        ready, _, _ = select.select([self._interrupt], [], [], deadline)
        if not ready:
            return None
        assert os.eventfd_read(self._interrupt) == 1
        value: int = self.registers[CMDRESP // 4]
        assert value >> 31
        assert self.registers[INTSTS // 4] == 2
        return FirmwareStatus(value & 0xFFFF)

    def call(self, command: FirmwareCommand, layout: str = "", *values: int) -> tuple[FirmwareStatus, tuple[int, ...]]:
        self.submit(command, struct.pack("<" + layout, *values))
        status = self.answer()
        assert status is not None, f"no answer to {command.name}"
        return status, struct.unpack_from("<" + layout, self.ram, BUFFER)

    def init(self) -> None:
        assert self.call(FirmwareCommand.INIT, "IIQI", 1, 0, TMR, MIB)[0] is FirmwareStatus.SUCCESS
        assert self.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS

    def start(self) -> int:
        """LAUNCH_START with policy 0; the handle."""
        status, values = self.call(FirmwareCommand.LAUNCH_START, "IIQI4xQI", 0, 0, 0, 0, 0, 0)
        assert status is FirmwareStatus.SUCCESS
        return values[0]

    def measure(self, handle: int) -> bytes:
        status, _ = self.call(FirmwareCommand.LAUNCH_MEASURE, "I4xQI", handle, SCRATCH, 48)
        assert status is FirmwareStatus.SUCCESS
        return self.ram[SCRATCH : SCRATCH + 48]
