# SPDX-License-Identifier: Apache-2.0
"""The guest: counters that are kept twice, one a vCPU.

A vCPU counts in a register and writes every value to a page of its own, into one of 64 slots in turn, one a cache line.
So the page is a pattern that follows from the counter alone: slot k holds the last value that is k modulo 64. Before a
step it compares the slot of the value it has, and before it overwrites the next one, what is due to be there. A
migration that loses a register, a page or a cache line, or brings an old copy of any, makes them differ; the guest
then says so itself, at the latest 64 counts later. Only slot 0 is overwritten unseen, when the low half of the counter
wraps: once in 2^32 counts.

It needs no paging, no interrupts and no CPU features, so it runs wherever the first instruction of a plain SEV guest
does: without paging all memory is private on hardware, and in the lab nothing is encrypted.

It leaves to its VMM with `out`, because that is the one exit whose length the CPU reports without NRIPS (the lab's has
none). How often it does is a mask in ESI, set by the VMM before each run: the guest leaves when (count & mask) == 0.
The count never is 0 in its low half, so the mask of all ones means never.

An interrupt or exception is never due: interrupts are off, and the program raises none. If one comes all the same it is
told by a third `out`, once: each of the 256 vectors leads to lines of its own, which leave the address that the guest
was at in CX, and stand still.

    EBX  the counter, low half       DS   the vCPU's page, 0x2000 from its base     EAX, ECX  scratch
    EDX  high half: wraps of EBX     ESI  the mask
"""

from __future__ import annotations

MEMORY = 256 * 1024
TAKEN_AT = 0x400  # behind the vector table of real mode
STACK = CODE = 0x1000  # it grows down, to the page of the vectors
LANES_AT = 0x2000
LANE = 0x1000  # a page for each vCPU of a guest and of its mirrors
LANES = (MEMORY - LANES_AT) // LANE
DEBUGGED_AT = 40 * LANE  # pages that no guest of ours counts in, to be decrypted and encrypted from outside
DEBUGGED = 8 * LANE
SLOTS = 64
SLOT = LANE // SLOTS

TICK_PORT = 0x10  # EAX: the counter
STALE_PORT = 0x11  # EAX: what memory held instead
VECTOR_PORT = 0x12  # AL: the vector of an interrupt or exception
NEVER = 0xFFFFFFFF
_WORD = 1 << 32

# 16-bit real mode; 0x66 makes an instruction's operand 32 bits wide, 0x67 its address.
_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"\x66\x89\xd8", "loop:   mov eax, ebx"),
    (b"\x66\x83\xe0\x3f", "        and eax, 63"),
    (b"\x66\xc1\xe0\x06", "        shl eax, 6"),
    (b"\x67\x66\x3b\x98\x00\x20\x00\x00", "        cmp ebx, [eax+0x2000]"),
    (b"\x74\x0b", "        je same"),
    (b"\x67\x66\x8b\x80\x00\x20\x00\x00", "        mov eax, [eax+0x2000]"),
    (b"\x66\xe7\x11", "        out 0x11, eax         ; memory is not what the register says"),
    (b"\x66\x43", "same:   inc ebx"),
    (b"\x75\x09", "        jnz next"),
    (b"\x66\x42", "        inc edx               ; wrapped: 0 is skipped, it would match any mask"),
    (b"\x66\x89\x1e\x00\x20", "        mov [0x2000], ebx     ; but not in the pattern"),
    (b"\x66\x43", "        inc ebx"),
    (b"\x66\x89\xd8", "next:   mov eax, ebx"),
    (b"\x66\x83\xe0\x3f", "        and eax, 63"),
    (b"\x66\xc1\xe0\x06", "        shl eax, 6"),
    (b"\x67\x66\x8b\x88\x00\x20\x00\x00", "        mov ecx, [eax+0x2000]"),
    (b"\x66\x83\xc1\x40", "        add ecx, 64"),
    (b"\x66\x39\xd9", "        cmp ecx, ebx"),
    (b"\x74\x11", "        je store"),
    (b"\x66\x89\xc1", "        mov ecx, eax"),
    (b"\x67\x66\x8b\x80\x00\x20\x00\x00", "        mov eax, [eax+0x2000]"),
    (b"\x66\xe7\x11", "        out 0x11, eax         ; nor what it said 64 counts ago"),
    (b"\x66\x89\xc8", "        mov eax, ecx"),
    (b"\x67\x66\x89\x98\x00\x20\x00\x00", "store:  mov [eax+0x2000], ebx"),
    (b"\x66\x85\xf3", "        test ebx, esi"),
    (b"\x75\x99", "        jnz loop"),
    (b"\x66\x89\xd8", "        mov eax, ebx"),
    (b"\x66\xe7\x10", "        out 0x10, eax         ; a tick"),
    (b"\xeb\x91", "        jmp loop"),
)
TEXT = b"".join(code for code, _ in _TEXT)


def _taken(vector: int) -> bytes:
    """pop cx; mov al, vector; out 0x12, al; jmp to itself"""
    return bytes((0x59, 0xB0, vector, 0xE6, VECTOR_PORT, 0xEB, 0xFE))


_TAKEN = len(_taken(0))
VECTORS = b"".join((TAKEN_AT + _TAKEN * vector).to_bytes(4, "little") for vector in range(256))
"""Segment and offset of where each vector leads."""


def listing() -> str:
    """The program with its addresses, to compare with a disassembler."""
    lines, address = [], CODE
    for code, text in _TEXT:
        lines.append(f"{address:04x}  {code.hex(' '):<25}{text}")
        address += len(code)
    return "\n".join(lines)


def mask(every: int) -> int:
    """ESI for a guest that leaves every `every` counts, a power of two, or never if 0."""
    return NEVER if every == 0 else every - 1


def at_home(rip: int, code_base: int) -> bool:
    """Whether a vCPU that is out of the guest is in the program: it never leaves that by itself."""
    return code_base == 0 and CODE <= rip < CODE + len(TEXT)


def vector(rip: int, code_base: int) -> int | None:
    """The vector of the interrupt or exception that a vCPU has taken, None if it has not come to that."""
    number = (rip - TAKEN_AT) // _TAKEN
    return number if code_base == 0 and 0 <= number < 256 else None


def segment(lane: int) -> int:
    """The base of DS with which a vCPU counts in this lane."""
    return lane * LANE


def pattern(count: int) -> bytes:
    """What the page of a vCPU must hold when its counter is `count`, of which the low half is looked at."""
    page = bytearray(LANE)
    for slot in range(SLOTS):
        value = (count - (count - slot) % SLOTS) % _WORD  # the last that is `slot` modulo 64, up to `count`
        page[slot * SLOT : slot * SLOT + 4] = value.to_bytes(4, "little")
    return bytes(page)


def agrees(page: bytes, count: int) -> bool:
    """Whether the page of a vCPU holds what it must when its counter is `count`, or is the next to be written."""
    return page in (pattern(count), pattern(count - 1))


def image(lanes: int) -> bytes:
    """What LAUNCH_UPDATE_DATA covers, from 0 on: vectors, program, and the pages of so many vCPUs at count 0."""
    vectors = VECTORS + b"".join(map(_taken, range(256)))
    return vectors.ljust(CODE, b"\0") + TEXT.ljust(LANES_AT - CODE, b"\0") + pattern(0) * lanes


PROGRAM = image(1)  # of a guest with one vCPU
