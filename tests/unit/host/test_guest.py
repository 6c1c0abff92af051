# SPDX-License-Identifier: Apache-2.0
"""The guest's program, run instruction by instruction on an interpreter that knows nothing of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from shutil import which

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.vmm import guest
from chaos.vmm.drive import unwrapped
from tests.unit.host.interpreter import Cpu


def boot(mask: int, count: int = 0, high: int = 0) -> Cpu:
    memory = bytearray(guest.MEMORY)
    memory[guest.CODE : guest.CODE + len(guest.PROGRAM)] = guest.PROGRAM
    memory[guest.COUNTER : guest.COUNTER + 4] = count.to_bytes(4, "little")
    cpu = Cpu(memory)
    cpu.registers.update(esi=mask, ebx=count, edx=high)
    return cpu


def held(cpu: Cpu) -> int:
    return int.from_bytes(cpu.memory[guest.COUNTER : guest.COUNTER + 4], "little")


def run(cpu: Cpu, ticks: int) -> list[int]:
    """Until so many more counts are in memory; the ticks it reported meanwhile."""
    for _ in range(ticks):
        before = held(cpu)
        while held(cpu) == before:
            cpu.step()
    while cpu.ip != guest.CODE:
        cpu.step()
    assert all(port == guest.TICK_PORT for port, _ in cpu.outs)
    return [value for _, value in cpu.outs]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (4, [4, 8]), (8, [8]), (0, [])])
def test_it_leaves_as_often_as_the_mask_says(every: int, expected: list[int]) -> None:
    cpu = boot(guest.mask(every))
    assert run(cpu, 9) == expected
    assert cpu.registers["ebx"] == held(cpu) == 9


def test_the_counter_wraps_into_its_high_half_and_is_never_zero() -> None:
    cpu = boot(guest.NEVER, count=0xFFFFFFFE, high=6)
    assert run(cpu, 1) == []
    assert run(cpu, 2) == []
    assert (cpu.registers["ebx"], cpu.registers["edx"], held(cpu)) == (2, 7, 2)


@given(st.integers(1, 0xFFFFFFFF), st.integers(1, 0xFFFFFFFF))
def test_it_says_when_memory_and_register_differ_and_goes_on_with_the_register(register: int, memory: int) -> None:
    cpu = boot(guest.NEVER, count=register)
    cpu.memory[guest.COUNTER : guest.COUNTER + 4] = memory.to_bytes(4, "little")
    for _ in range(12):
        cpu.step()
    assert cpu.outs == ([] if register == memory else [(guest.STALE_PORT, memory)])
    assert held(cpu) >= 1 and held(cpu) in (register + 1, register + 2, 1, 2)


@given(st.integers(0, 400), st.integers(0, 300))
def test_stopped_anywhere_and_moved_it_notices_nothing(before: int, after: int) -> None:
    """Registers and memory carried over between any two instructions are all there is to it."""
    cpu = boot(guest.mask(2))
    for _ in range(before):
        cpu.step()
    moved = Cpu(bytearray(cpu.memory), cpu.ip, cpu.zero, dict(cpu.registers), list(cpu.outs))
    for _ in range(after):
        cpu.step()
        moved.step()
    assert (moved.memory, moved.registers, moved.outs) == (cpu.memory, cpu.registers, cpu.outs)
    assert all(port == guest.TICK_PORT for port, _ in moved.outs)


def test_an_old_copy_of_memory_does_not_go_unnoticed() -> None:
    cpu = boot(guest.mask(1))
    run(cpu, 3)
    old = bytes(cpu.memory)
    run(cpu, 2)
    cpu.memory[:] = old
    cpu.outs.clear()
    for _ in range(12):
        cpu.step()
    assert (guest.STALE_PORT, 3) in cpu.outs


def test_it_touches_only_what_is_encrypted() -> None:
    assert guest.CODE in guest.ENCRYPTED and guest.COUNTER + 3 in guest.ENCRYPTED
    assert guest.CODE + len(guest.PROGRAM) <= guest.COUNTER
    assert guest.ENCRYPTED.start % 16 == 0 and len(guest.ENCRYPTED) % 16 == 0


def test_the_listing_is_what_a_disassembler_says(tmp_path: Path) -> None:
    if which("objdump") is None:
        pytest.skip("no objdump here")
    program = tmp_path / "program"
    program.write_bytes(guest.PROGRAM)
    said = subprocess.run(
        ["objdump", "-D", "-b", "binary", "-m", "i8086", f"--adjust-vma={guest.CODE}", "-M", "intel", program],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    mnemonics = [line.split("\t")[2].split()[0] for line in said.splitlines() if line.count("\t") >= 2]
    ours = [re.findall(r"[a-z]+", line.split(";")[0][22:].split(":")[-1])[0] for line in guest.listing().splitlines()]
    assert [{"jnz": "jne"}.get(name, name) for name in ours] == mnemonics


@given(st.integers(0, 1 << 40), st.integers(0, 0xFFFFFFFE))
def test_a_low_half_is_unwrapped(before: int, further: int) -> None:
    assert unwrapped(before, (before + further) % (1 << 32)) == before + further
