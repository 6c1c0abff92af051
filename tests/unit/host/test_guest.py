# SPDX-License-Identifier: Apache-2.0
"""The guest's program, run instruction by instruction on an interpreter that knows nothing of it."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path
from shutil import which

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from chaos.vmm import guest
from tests.unit.host.interpreter import Cpu

LANE = 3
PAGE = guest.LANES_AT + LANE * guest.LANE


def boot(mask: int, count: int = 0, high: int = 0) -> Cpu:
    memory = bytearray(guest.MEMORY)
    image = guest.image(guest.LANES)
    memory[: len(image)] = image
    cpu = Cpu(memory, data=guest.segment(LANE))
    page(cpu, guest.pattern(count))
    cpu.registers.update(esi=mask, ebx=count, edx=high)
    return cpu


def page(cpu: Cpu, content: bytes | None = None) -> bytes:
    if content is not None:
        cpu.memory[PAGE : PAGE + guest.LANE] = content
    return bytes(cpu.memory[PAGE : PAGE + guest.LANE])


def run(cpu: Cpu, ticks: int) -> list[int]:
    """Until it has counted so many more; the ticks it reported meanwhile."""
    for _ in range(ticks):
        cpu.step()
        while cpu.ip != guest.CODE:
            cpu.step()
    assert all(port == guest.TICK_PORT for port, _ in cpu.outs)
    return [value for _, value in cpu.outs]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (4, [4, 8]), (8, [8]), (0, [])])
def test_it_leaves_as_often_as_the_mask_says(every: int, expected: list[int]) -> None:
    cpu = boot(guest.mask(every))
    assert run(cpu, 9) == expected
    assert cpu.registers["ebx"] == 9


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 150))
def test_its_page_is_the_pattern_of_its_counter(count: int, ticks: int) -> None:
    cpu = boot(guest.NEVER, count=count)
    assert run(cpu, ticks) == []
    assert page(cpu) == guest.pattern(cpu.registers["ebx"])


def test_it_touches_its_own_page_only() -> None:
    cpu = boot(guest.NEVER)
    before = bytes(cpu.memory)
    run(cpu, 200)
    page(cpu, guest.pattern(0))
    assert bytes(cpu.memory) == before


def test_the_counter_wraps_into_its_high_half_and_is_never_zero() -> None:
    cpu = boot(guest.NEVER, count=0xFFFFFFFE, high=6)
    assert run(cpu, 1) == []
    assert run(cpu, 2) == []
    assert (cpu.registers["ebx"], cpu.registers["edx"]) == (2, 7)
    assert run(cpu, 130) == []  # what was there before the wrap is still known after it


@given(st.integers(0, 0xFFFFFFFE), st.integers(0, 63), st.integers(0, 0xFFFFFFFF))
@example(0xFFFFFFC1, 1, 0)
@example(0xFFFFFFBF, 0, 0)
def test_a_value_that_is_not_the_last_one_is_noticed_within_a_round_and_the_guest_goes_on(
    count: int, slot: int, value: int
) -> None:
    assume(slot or count + guest.SLOTS < 1 << 32)  # once in a wrap slot 0 is written without a look at what was there
    cpu = boot(guest.NEVER, count=count)
    right = page(cpu)[slot * guest.SLOT : slot * guest.SLOT + 4]
    at = PAGE + slot * guest.SLOT
    cpu.memory[at : at + 4] = value.to_bytes(4, "little")
    for _ in range(guest.SLOTS * 32):
        cpu.step()
    wrong = value.to_bytes(4, "little") != right
    assert (guest.STALE_PORT, value) in cpu.outs if wrong else cpu.outs == []
    assert len(cpu.outs) <= 2  # the slot of the counter itself is looked at twice
    cpu.outs.clear()
    while cpu.ip != guest.CODE:
        cpu.step()
    assert run(cpu, guest.SLOTS + 2) == []


@given(st.integers(0, 400), st.integers(0, 300))
def test_stopped_anywhere_and_moved_it_notices_nothing(before: int, after: int) -> None:
    """Registers and memory carried over between any two instructions are all there is to it."""
    cpu = boot(guest.mask(2))
    for _ in range(before):
        cpu.step()
    moved = Cpu(bytearray(cpu.memory), cpu.ip, cpu.data, cpu.zero, dict(cpu.registers), list(cpu.outs))
    for _ in range(after):
        cpu.step()
        moved.step()
    assert (moved.memory, moved.registers, moved.outs) == (cpu.memory, cpu.registers, cpu.outs)
    assert all(port == guest.TICK_PORT for port, _ in moved.outs)


def test_an_old_copy_of_memory_does_not_go_unnoticed() -> None:
    cpu = boot(guest.mask(1), count=64)
    run(cpu, 3)
    old = bytes(cpu.memory)
    run(cpu, 2)
    cpu.memory[:] = old
    cpu.outs.clear()
    for _ in range(12):
        cpu.step()
    assert (guest.STALE_PORT, 5) in cpu.outs  # where 69 was, what was 64 counts before


def test_an_old_page_under_a_new_counter_shows_within_a_round_also_where_the_counters_own_slot_is_right() -> None:
    cpu = boot(guest.NEVER, count=640)
    old = page(cpu)
    run(cpu, 64)
    page(cpu, old[: 1 * guest.SLOT] + page(cpu)[guest.SLOT : 32 * guest.SLOT] + old[32 * guest.SLOT :])
    for _ in range(guest.SLOTS * 32):
        cpu.step()
    assert {value for _, value in cpu.outs} >= set(range(640 - 32, 640))


def test_its_image_is_what_is_encrypted_and_fits() -> None:
    assert len(guest.TEXT) <= guest.LANES_AT - guest.CODE
    assert len(guest.image(guest.LANES)) == guest.MEMORY
    assert guest.segment(guest.LANES - 1) < 1 << 20  # a real-mode segment begins no further
    assert guest.image(1) == guest.PROGRAM
    assert len(guest.image(3)) % 16 == 0
    assert guest.image(3).endswith(guest.pattern(0) * 3)


def test_every_vector_leads_to_lines_that_tell_it() -> None:
    image = guest.image(1)
    for number in range(256):
        offset, segment = struct.unpack_from("<HH", image, 4 * number)
        assert segment == 0 and guest.vector(offset, 0) == number
        assert image[offset:].startswith(bytes((0x59, 0xB0, number, 0xE6, guest.VECTOR_PORT, 0xEB, 0xFE)))
        assert not guest.at_home(offset, 0)
    assert offset + 7 + 3 * 2 * 4 < guest.STACK  # room for what four vCPUs push
    assert guest.vector(guest.TAKEN_AT - 1, 0) is None and guest.vector(offset + 7, 0) is None
    assert guest.vector(offset, 0x1000) is None


def test_the_listing_is_what_a_disassembler_says(tmp_path: Path) -> None:
    if which("objdump") is None:
        pytest.skip("no objdump here")
    program = tmp_path / "program"
    program.write_bytes(guest.TEXT)
    said = subprocess.run(
        ["objdump", "-D", "-b", "binary", "-m", "i8086", f"--adjust-vma={guest.CODE}", "-M", "intel", program],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    mnemonics = [line.split("\t")[2].split()[0] for line in said.splitlines() if line.count("\t") >= 2]
    ours = [re.findall(r"[a-z]+", line.split(";")[0][31:].split(":")[-1])[0] for line in guest.listing().splitlines()]
    assert [{"jnz": "jne"}.get(name, name) for name in ours] == mnemonics


def test_it_never_leaves_its_program() -> None:
    cpu = boot(guest.mask(4), count=0xFFFFFFF0)
    for _ in range(2000):
        assert guest.at_home(cpu.ip, 0)
        cpu.step()
    assert not guest.at_home(guest.CODE + len(guest.TEXT), 0) and not guest.at_home(guest.CODE, 0x1000)
