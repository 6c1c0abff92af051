# SPDX-License-Identifier: Apache-2.0
"""The guest: a counter that is kept twice.

It counts in a register and writes every value to memory, and before each step it compares the two. A migration that
loses a register, or a page, or brings an old copy of either, makes them differ; the guest then says so itself. It
needs no paging, no interrupts and no CPU features, so it runs wherever the first instruction of a plain SEV guest
does: without paging all memory is private on hardware, and in the lab nothing is encrypted.

It leaves to its VMM with `out`, because that is the one exit whose length the CPU reports without NRIPS (the lab's has
none). How often it does is a mask in ESI, set by the VMM before each run: the guest leaves when (count & mask) == 0.
The count never is 0 in its low half, so the mask of all ones means never.

    EBX  the counter, low half        [0x2000]  the same in memory
    EDX  high half: wraps of EBX      ESI       the mask
"""

from __future__ import annotations

MEMORY = 64 * 1024
CODE = 0x1000
COUNTER = 0x2000
ENCRYPTED = range(0x1000, 0x3000)  # what LAUNCH_UPDATE_DATA covers; the guest touches nothing else

TICK_PORT = 0x10  # EAX: the counter
STALE_PORT = 0x11  # EAX: what memory held instead
NEVER = 0xFFFFFFFF

# 16-bit real mode; 0x66 makes an instruction's operand 32 bits wide.
_PROGRAM: tuple[tuple[bytes, str], ...] = (
    (b"\x66\x3b\x1e\x00\x20", "loop:   cmp ebx, [0x2000]"),
    (b"\x74\x07", "        je same"),
    (b"\x66\xa1\x00\x20", "        mov eax, [0x2000]"),
    (b"\x66\xe7\x11", "        out 0x11, eax         ; memory is not what the register says"),
    (b"\x66\x43", "same:   inc ebx"),
    (b"\x75\x04", "        jnz store"),
    (b"\x66\x42", "        inc edx               ; wrapped: 0 is skipped, it would match any mask"),
    (b"\x66\x43", "        inc ebx"),
    (b"\x66\x89\x1e\x00\x20", "store:  mov [0x2000], ebx"),
    (b"\x66\x85\xf3", "        test ebx, esi"),
    (b"\x75\xe0", "        jnz loop"),
    (b"\x66\x89\xd8", "        mov eax, ebx"),
    (b"\x66\xe7\x10", "        out 0x10, eax         ; a tick"),
    (b"\xeb\xd8", "        jmp loop"),
)
PROGRAM = b"".join(code for code, _ in _PROGRAM)


def listing() -> str:
    """The program with its addresses, to compare with a disassembler."""
    lines, address = [], CODE
    for code, text in _PROGRAM:
        lines.append(f"{address:04x}  {code.hex(' '):<16}{text}")
        address += len(code)
    return "\n".join(lines)


def mask(every: int) -> int:
    """ESI for a guest that leaves every `every` counts, a power of two, or never if 0."""
    return NEVER if every == 0 else every - 1
