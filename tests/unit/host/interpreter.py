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
    """`data` is the base of DS. `outs` are (port, value) of each `out`, in order. A step runs one instruction."""

    memory: bytearray
    ip: int = 0x1000
    data: int = 0
    zero: bool = False
    registers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REGISTERS, 0))
    outs: list[tuple[int, int]] = field(default_factory=list)

    def step(self) -> None:
        far = self._byte() == 0x67
        self.ip -= not far
        wide = self._byte() == 0x66
        self.ip -= not wide
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
        elif opcode == 0xE7:  # out imm8, eax
            self.outs.append((self._byte(), self.registers["eax"]))
        elif opcode in (0x39, 0x3B, 0x85, 0x89, 0x8B):
            self._modrm(opcode, far)
        elif opcode in (0x83, 0xC1):
            self._immediate(opcode)
        else:
            raise Undefined(f"{opcode:#x}")

    def _modrm(self, opcode: int, far: bool) -> None:
        """A register and a place: [disp16], or with a prefix [r32+disp32], or another register."""
        modrm = self._byte()
        register, named = REGISTERS[modrm >> 3 & 7], REGISTERS[modrm & 7]
        value = self.registers[register]
        place = -1
        if far and modrm >> 6 == 2 and modrm & 7 != 4:  # [r32+disp32]
            place = (self.registers[named] + (self._word() | self._word() << 16)) & 0xFFFFFFFF
        elif not far and modrm >> 6 == 0 and modrm & 7 == 6:
            place = self._word()
        elif modrm >> 6 != 3:
            raise Undefined(f"modrm {modrm:#x}")
        other = self._load(place) if place >= 0 else self.registers[named]
        if opcode in (0x39, 0x3B):  # cmp
            self.zero = value == other
        elif opcode == 0x85:  # test rm32, r32
            self.zero = value & other == 0
        elif opcode == 0x8B:  # mov r32, rm32
            self.registers[register] = other
        elif place >= 0:  # mov rm32, r32
            at = self._in_data(place)
            self.memory[at : at + 4] = value.to_bytes(4, "little")
        else:
            self.registers[named] = value

    def _immediate(self, opcode: int) -> None:
        """A register and a byte: add and and (its sign is spread), shl."""
        modrm = self._byte()
        extension, named = modrm >> 3 & 7, REGISTERS[modrm & 7]
        byte = self._byte()
        operand = struct.unpack("b", bytes([byte]))[0] & 0xFFFFFFFF
        value = self.registers[named]
        if modrm >> 6 != 3 or (opcode, extension) not in ((0x83, 0), (0x83, 4), (0xC1, 4)):
            raise Undefined(f"{opcode:#x} with modrm {modrm:#x}")
        if opcode == 0xC1:
            value <<= byte & 31
        else:
            value = value + operand if extension == 0 else value & operand
        self.registers[named] = value & 0xFFFFFFFF
        self.zero = self.registers[named] == 0

    def _in_data(self, place: int) -> int:
        if place > 0xFFFC:
            raise Undefined(f"address {place:#x} is beyond the segment")
        return self.data + place

    def _byte(self) -> int:
        self.ip += 1
        return self.memory[self.ip - 1]

    def _word(self) -> int:
        return self._byte() | self._byte() << 8

    def _load(self, place: int) -> int:
        at = self._in_data(place)
        return int.from_bytes(self.memory[at : at + 4], "little")
