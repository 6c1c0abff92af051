# SPDX-License-Identifier: Apache-2.0
"""What is shown of a lab's console when the lab broke."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from chaos.lab.machine import SerialLines

BOOT = [f"[    0.{number:06}] boot" for number in range(300)]
OOPS = [
    "[   60.732000] BUG: unable to handle page fault for address: 00005629538c0dd8",
    "[   60.732010] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI",
    "[   60.732020] RIP: 0010:somewhere+0x12/0x30",
    *(f"[   60.733000] a line of the trace, {number}" for number in range(40)),
]
PANIC = [
    "[   60.732471] Kernel panic - not syncing: Fatal exception in interrupt",
    "[   60.733964] Kernel Offset: disabled",
]


def console(lines: Sequence[str]) -> SerialLines:
    async def follow() -> SerialLines:
        reader, console = asyncio.StreamReader(), SerialLines()
        reader.feed_data("\r\n".join([*lines, ""]).encode())
        reader.feed_eof()
        await console.follow(reader)
        return console

    return asyncio.run(follow())


def test_a_panic_is_shown_from_its_oops_on() -> None:
    heard = console([*BOOT, *OOPS, *PANIC])
    assert heard.tail() == (*OOPS, *PANIC)
    assert heard.panic == "Fatal exception in interrupt"


def test_a_panic_without_an_oops_is_shown_with_a_few_lines_before_it() -> None:
    assert console([*BOOT, *PANIC]).tail() == (*BOOT[-8:], *PANIC)


def test_without_a_panic_the_last_lines_are_shown() -> None:
    heard = console([*OOPS, *BOOT])
    assert (heard.tail(3), heard.panic) == (tuple(BOOT[-3:]), None)
