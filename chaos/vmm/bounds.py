# SPDX-License-Identifier: Apache-2.0
"""Commands whose buffers somebody may write beyond, and memory in which that shows.

A caller tells the kernel how long its buffer is. Around what it tells there is more memory of its own, filled with a
pattern: what is not as it was there, somebody has written who had no business to. Where a buffer's length is all that
is told, a page that nobody can write lies behind it all, so that no kernel, whatever it writes, reaches what else the
process has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from chaos.history.reading import NEW_KEYS
from chaos.history.records import Value
from chaos.kvm.call import KernelError
from chaos.kvm.numbers import PAGE, PlatformCommand
from chaos.kvm.sev import Platform, Sev
from chaos.kvm.structs import BlobData, PdhCertExportData, PlatformStatusData
from chaos.linux.fd import Mapping
from chaos.vmm.guest import DEBUGGED, DEBUGGED_AT
from chaos.vmm.messages import AskPlatform, Decrypt, Encrypt

PATTERN = 0xA5
GUESTS_PATTERN = 0x5A  # what one has of the other shows
SPARE = 1 << 20  # bytes behind what is told: more than a firmware's longest answer
LOOKED_AT = 16 << 20  # whoever tells more than this has less, and cannot look behind it
PAGEMAP = Path("/proc/self/pagemap")
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1


class ToldBuffer:
    """Memory of which the kernel is told the first `told` bytes. Raises OSError if there is none to be had."""

    def __init__(self, told: int) -> None:
        self.told = told
        self._size = -(-min(told, LOOKED_AT) // PAGE) * PAGE + SPARE
        self._memory = Mapping.private(self._size + PAGE)
        self._memory.write(0, bytes([PATTERN]) * self._size)
        self._memory.close_off(self._size, PAGE)

    @property
    def address(self) -> int:
        return self._memory.start

    def behind(self) -> int | None:
        """How many bytes behind what was told do not hold the pattern any more; None if they cannot be looked at."""
        if self.told > LOOKED_AT:
            return None
        return _changed(self._memory.read(self.told, self._size - self.told), PATTERN)

    def close(self) -> None:
        self._memory.close()


def _changed(memory: bytes, pattern: int) -> int:
    return len(memory) - memory.count(pattern)


def _answered(ask: Callable[[], None], said: Callable[[], dict[str, Value]]) -> dict[str, Value]:
    """What can be said once it was asked. A `KernelError` has it in `told`."""
    try:
        ask()
    except KernelError as error:
        error.told = said()
        raise
    return said()


# -- /dev/sev -------------------------------------------------------------------------------------------------


def ask_platform(platform: Platform, do: AskPlatform) -> dict[str, Value]:
    """The lengths that were told back, and how many bytes were written behind those that were told; nothing of one that
    has no buffer. Raises OSError."""
    command = PlatformCommand[do.command]
    if do.command in NEW_KEYS:
        platform.command(command, 0)
        return {}
    status = command is PlatformCommand.PLATFORM_STATUS
    with (
        contextlib.closing(ToldBuffer(ctypes.sizeof(PlatformStatusData) if status else do.length)) as first,
        contextlib.closing(ToldBuffer(do.chain)) as second,
    ):
        if status:
            return _answered(lambda: platform.command(command, first.address), lambda: {"behind": first.behind()})
        if command is PlatformCommand.PDH_CERT_EXPORT:
            both = PdhCertExportData(first.address, do.length, second.address, do.chain)
            return _answered(
                lambda: platform.command(command, ctypes.addressof(both)),
                lambda: {"length": both.pdh_cert_len, "chain": both.cert_chain_len, "behind": _sum(first, second)},
            )
        blob = BlobData(first.address, do.length)
        return _answered(
            lambda: platform.command(command, ctypes.addressof(blob)),
            lambda: {"length": blob.length, "behind": first.behind()},
        )


def _sum(*buffers: ToldBuffer) -> int | None:
    behind = [buffer.behind() for buffer in buffers]
    return None if None in behind else sum(filter(None, behind))


# -- a guest's memory -----------------------------------------------------------------------------------------


def debug(sev: Sev, guest: Mapping, do: Decrypt | Encrypt) -> dict[str, Value]:
    """How many bytes of the buffer that is written to have changed and were not to, and the pages of either. Offsets
    count from the second page of a buffer. Raises OSError."""
    with contextlib.closing(Mapping.private(DEBUGGED)) as own:
        own.write(0, bytes([PATTERN]) * DEBUGGED)
        guest.write(DEBUGGED_AT, bytes([GUESTS_PATTERN]) * DEBUGGED)
        encrypt = isinstance(do, Encrypt)
        mine, theirs = own.start + PAGE, guest.start + DEBUGGED_AT + PAGE
        source = (mine if encrypt else theirs) + do.read_at
        destination = (theirs if encrypt else mine) + do.write_at
        pages: dict[str, Value] = {
            "read_pages": _pages(source, do.length),
            "written_pages": _pages(destination, do.length),
        }
        written = PAGE + do.write_at

        def said() -> dict[str, Value]:
            memory = guest.read(DEBUGGED_AT, DEBUGGED) if encrypt else own.read(0, DEBUGGED)
            around = memory[:written] + memory[written + do.length :]
            return {"outside": _changed(around, GUESTS_PATTERN if encrypt else PATTERN), **pages}

        call = sev.debug_encrypt if encrypt else sev.debug_decrypt
        return _answered(lambda: call(source, destination, do.length), said)


def _pages(address: int, length: int) -> list[int | str]:
    """Where in the machine's memory the pages of these bytes lie, in order; nothing if that cannot be told."""
    first, last = address // PAGE, (address + max(length, 1) - 1) // PAGE
    try:
        with PAGEMAP.open("rb", buffering=0) as table:
            entries = os.pread(table.fileno(), 8 * (last - first + 1), 8 * first)
    except OSError:
        return []
    found = [int.from_bytes(entries[at : at + 8], "little") for at in range(0, len(entries), 8)]
    frames = [entry & _FRAME for entry in found if entry & _PRESENT]
    return [frame * PAGE for frame in frames] if all(frames) and len(frames) == last - first + 1 else []
