# SPDX-License-Identifier: Apache-2.0
"""Enough of a CPU to run the guest's program: 16-bit real mode, with operand size prefixes.

Written from the instruction set's manual, not from the program: an opcode that is not here stops it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


class Undefined(Exception):
    """An instruction this CPU does not have."""


@dataclass
class Cpu:
    """`outs` are (port, value) of each `out`, in order. A step runs one instruction."""

    memory: bytearray
    ip: int = 0x1000
    zero: bool = False
    registers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REGISTERS, 0))
    outs: list[tuple[int, int]] = field(default_factory=list)

    def step(self) -> None:
        wide = self._byte() == 0x66
        if not wide:
            self.ip -= 1
        opcode = self._byte()
        if opcode in (0x74, 0x75, 0xEB):
            distance = struct.unpack("b", bytes([self._byte()]))[0]
            if opcode == 0xEB or (opcode == 0x74) == self.zero:
                self.ip += distance
            return
        if not wide:
            raise Undefined(f"{opcode:#x} without a prefix")
        if 0x40 <= opcode <= 0x47:  # inc r32
            name = REGISTERS[opcode - 0x40]
            self.registers[name] = (self.registers[name] + 1) & 0xFFFFFFFF
            self.zero = self.registers[name] == 0
        elif opcode == 0xA1:  # mov eax, [disp16]
            self.registers["eax"] = self._load(self._word())
        elif opcode == 0xE7:  # out imm8, eax
            self.outs.append((self._byte(), self.registers["eax"]))
        elif opcode in (0x3B, 0x85, 0x89):
            self._modrm(opcode)
        else:
            raise Undefined(f"{opcode:#x}")

    def _modrm(self, opcode: int) -> None:
        modrm = self._byte()
        register = REGISTERS[modrm >> 3 & 7]
        value = self.registers[register]
        direct = modrm >> 6 == 0 and modrm & 7 == 6  # [disp16]
        if not direct and modrm >> 6 != 3:
            raise Undefined(f"modrm {modrm:#x}")
        place = self._word() if direct else 0
        other = self._load(place) if direct else self.registers[REGISTERS[modrm & 7]]
        if opcode == 0x3B:  # cmp r32, rm32
            self.zero = value == other
        elif opcode == 0x85:  # test rm32, r32
            self.zero = value & other == 0
        elif direct:  # mov rm32, r32
            self.memory[place : place + 4] = value.to_bytes(4, "little")
        else:
            self.registers[REGISTERS[modrm & 7]] = value

    def _byte(self) -> int:
        self.ip += 1
        return self.memory[self.ip - 1]

    def _word(self) -> int:
        return self._byte() | self._byte() << 8

    def _load(self, place: int) -> int:
        return int.from_bytes(self.memory[place : place + 4], "little")
