# SPDX-License-Identifier: Apache-2.0
"""Buffers that show what was written around them, against a kernel that is played."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from chaos.kvm.call import KernelError
from chaos.kvm.numbers import PlatformCommand
from chaos.kvm.structs import BlobData, PdhCertExportData
from chaos.linux.fd import Mapping
from chaos.vmm import bounds
from chaos.vmm.guest import DEBUGGED_AT, MEMORY
from chaos.vmm.messages import AskPlatform, Decrypt, Encrypt

PAGE = 4096


class Playing:
    """A /dev/sev that writes so many bytes into each buffer, tells that as its length, and then refuses or not."""

    def __init__(self, written: int, *, refuses: bool) -> None:
        self.written, self.refuses = written, refuses

    def command(self, command: PlatformCommand, data: int) -> None:
        if command is PlatformCommand.PLATFORM_STATUS:
            ctypes.memset(data, 0, self.written)
        elif command is PlatformCommand.PDH_CERT_EXPORT:
            both = PdhCertExportData.from_address(data)
            for address in (both.pdh_cert_address, both.cert_chain_address):
                ctypes.memset(address, 0, self.written)
            both.pdh_cert_len = both.cert_chain_len = self.written
        elif data:
            blob = BlobData.from_address(data)
            ctypes.memset(blob.address, 0, self.written)
            blob.length = self.written
        if self.refuses:
            raise KernelError(EIO, "SEV_ISSUE_CMD", firmware=4)


def answered(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask()
    except KernelError as error:
        return dict(error.told)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize(
    ("command", "length", "chain", "written", "due"),
    [
        ("GET_ID2", 64, 0, 64, {"length": 64, "behind": 0}),
        ("GET_ID2", 16, 0, 64, {"length": 64, "behind": 48}),
        ("PEK_CSR", 0, 0, 2084, {"length": 2084, "behind": 2084}),
        ("PEK_CSR", 2084, 0, 100_000, {"length": 100_000, "behind": 97_916}),
        ("PDH_CERT_EXPORT", 10, 20, 20, {"length": 20, "chain": 20, "behind": 10}),
        ("PDH_CERT_EXPORT", 10, 20, 30, {"length": 30, "chain": 30, "behind": 30}),
        ("PLATFORM_STATUS", 0, 0, 12, {"behind": 0}),
        ("PLATFORM_STATUS", 0, 0, 13, {"behind": 1}),
        ("GET_ID2", (16 << 20) + 1, 0, 64, {"length": 64, "behind": None}),
        ("PEK_GEN", 0, 0, 0, {}),
    ],
)
def test_what_is_written_behind_what_was_told_shows(
    refuses: bool, command: str, length: int, chain: int, written: int, due: dict[str, int | None]
) -> None:
    playing: Any = Playing(written, refuses=refuses)
    do = AskPlatform(command=command, length=length, chain=chain)
    assert answered(lambda: bounds.ask_platform(playing, do)) == due


class PlayingSev:
    """A guest whose bytes are copied as they are, `more` on either side as well."""

    def __init__(self, more: int = 0) -> None:
        self.more = more

    def debug_decrypt(self, source: int, destination: int, length: int) -> None:
        ctypes.memmove(destination - self.more, source - self.more, length + 2 * self.more)

    debug_encrypt = debug_decrypt


@pytest.fixture
def guest() -> Any:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, MEMORY)
    memory = Mapping(fd, MEMORY)
    yield memory
    memory.close()
    os.close(fd)


@pytest.mark.parametrize("kind", [Decrypt, Encrypt])
@pytest.mark.parametrize(("more", "outside"), [(0, 0), (16, 32)])
@pytest.mark.parametrize(("source", "destination", "length"), [(0, 1, PAGE), (4088, 15, 17), (8191, 8191, 4 * PAGE)])
def test_what_changes_around_what_is_debugged_shows(
    guest: Mapping, kind: Any, more: int, outside: int, source: int, destination: int, length: int
) -> None:
    sev: Any = PlayingSev(more)
    for _ in range(2):  # what one has left does not hide what the next does
        do = kind(vm="guest", read_at=source, write_at=destination, length=length)
        assert bounds.debug(sev, guest, do)["outside"] == outside
    if kind is Encrypt and not more:
        at = DEBUGGED_AT + PAGE + destination
        assert guest.read(at, length) == bytes([bounds.PATTERN]) * length


def test_pages_are_those_of_the_bytes_or_nobodys(
    guest: Mapping, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sev: Any = PlayingSev()
    do = Decrypt(vm="guest", read_at=1, write_at=0, length=PAGE)
    monkeypatch.setattr(bounds, "PAGEMAP", tmp_path / "none")
    assert bounds.debug(sev, guest, do)["read_pages"] == []

    class Table:
        """Every page is there, in the frame of its own number modulo 1000; without rights frames read 0."""

        def __init__(self, hidden: bool) -> None:
            self.hidden = hidden

        def pread(self, _fd: int, length: int, offset: int) -> bytes:
            numbers = [(offset // 8 + n) % 1000 + 1 for n in range(length // 8)]
            return b"".join((0 if self.hidden else n | 1 << 63).to_bytes(8, "little") for n in numbers)

    monkeypatch.setattr(bounds, "PAGEMAP", Path("/dev/null"))
    monkeypatch.setattr("chaos.vmm.bounds.os.pread", Table(hidden=False).pread)
    said = bounds.debug(sev, guest, do)
    first = ((guest.start + DEBUGGED_AT + PAGE) // PAGE) % 1000 + 1
    assert said["read_pages"] == [first * PAGE, (first % 1000 + 1) * PAGE]
    assert len(said["written_pages"]) == 1  # type: ignore[arg-type]
    monkeypatch.setattr("chaos.vmm.bounds.os.pread", Table(hidden=True).pread)
    assert bounds.debug(sev, guest, do)["written_pages"] == []
