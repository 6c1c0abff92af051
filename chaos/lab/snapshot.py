# SPDX-License-Identifier: Apache-2.0
"""A booted lab, saved once and restored many times.

A snapshot is one file in the cache: a line of JSON, QEMU's device state, and guest memory, which is sparse. Its name
carries the digest of all that it depends on (kernel, image, QEMU, parameters), so a change of any of them makes a
new one, and the file is made whole or not at all. The oldest ones are removed when there are too many.

Only device state goes through QEMU's migration stream (0.3 MB); memory is the shared memory file, which the
`x-ignore-shared` capability keeps out of the stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from qemu.qmp import QMPClient

from chaos.cache import entries
from chaos.cache.wholefile import keep_newest, mark_used, whole_file
from chaos.lab.machine import RESTORE_DEADLINE, Lab, Spec
from chaos.lab.psp.wire import PspSnapshot as PspState

KEPT: Final = 8  # a quarter of a gigabyte each
_ALIGNMENT: Final = 1 << 21
_HEADER_ROOM: Final = 1 << 20
_CHUNK: Final = 1 << 20
_SAVE_DEADLINE: Final = 60.0


class _Header(msgspec.Struct, frozen=True):
    """`psp` is the software PSP's own saved state. Offsets and sizes in bytes."""

    psp: PspState
    state: int
    state_size: int
    memory: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    path: Path


def name_of(spec: Spec) -> str:
    parts = (
        spec.kernel.identity, spec.image.identity, ".".join(map(str, spec.qemu.version)), spec.qemu.threads,
        spec.sev_asids, spec.es_asids, spec.cpus, spec.memory, spec.ccp,
        Path(__file__).with_name("machine.py").read_text(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20] + ".lab"


def find(spec: Spec) -> Snapshot | None:
    path = entries.entry_path("snapshots", name_of(spec))
    if not path.exists():
        return None
    mark_used(path)
    return Snapshot(path)


async def save(lab: Lab) -> None:
    """Save a lab that is idle, and let it run on. Raises `NoSpace`; the lab is of no more use then."""
    await lab.monitor.execute("stop")
    state = await lab.wait(_device_state(lab.monitor), _SAVE_DEADLINE, "the state of QEMU's devices")
    memory = _up(_HEADER_ROOM + len(state))
    header = _Header(
        psp=await lab.psp.save(),
        state=_HEADER_ROOM,
        state_size=len(state),
        memory=memory,
        memory_size=lab.spec.memory,
    )
    with whole_file("snapshots", name_of(lab.spec)) as out:
        out.write(msgspec.json.encode(header) + b"\n")
        assert out.tell() <= _HEADER_ROOM
        out.seek(_HEADER_ROOM)
        out.write(state)
        out.flush()
        await asyncio.to_thread(_copy_memory, lab.memory, 0, out.fileno(), memory, lab.spec.memory)
        os.ftruncate(out.fileno(), memory + lab.spec.memory)
    await lab.monitor.execute("cont")
    keep_newest("snapshots", "*.lab", KEPT)


async def _stream(monitor: QMPClient, command: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Our end of a migration stream that `command` ("migrate" or "migrate-incoming") begins."""
    ours, theirs = socket.socketpair()
    monitor.send_fd_scm(theirs.fileno())
    await monitor.execute("getfd", {"fdname": "state"})
    theirs.close()
    await monitor.execute(command, {"uri": "fd:state"})
    return await asyncio.open_connection(sock=ours)


async def _device_state(monitor: QMPClient) -> bytes:
    reader, writer = await _stream(monitor, "migrate")
    state = await reader.read(-1)
    writer.close()
    deadline = time.monotonic() + _SAVE_DEADLINE
    while (answer := await monitor.execute("query-migrate"))["status"] != "completed":  # type: ignore[index]
        if answer["status"] == "failed" or time.monotonic() > deadline:  # type: ignore[index]
            raise RuntimeError(f"QEMU could not save its devices: {answer}")
        await asyncio.sleep(0.005)
    return state


async def restore(lab: Lab, snapshot: Snapshot) -> None:
    """Start `lab` from what was saved. Raises OSError or msgspec.DecodeError if the file is of no use."""
    with snapshot.path.open("rb") as file:
        header = msgspec.json.decode(file.readline(_HEADER_ROOM), type=_Header)
        if os.fstat(file.fileno()).st_size != header.memory + header.memory_size:
            raise OSError(f"{snapshot.path} is cut off")
        os.ftruncate(lab.memory, header.memory_size)
        source = (file.fileno(), header.memory)
        copying = asyncio.create_task(asyncio.to_thread(_copy_memory, *source, lab.memory, 0, header.memory_size))
        try:
            await lab.start(psp_state=header.psp, incoming=True)
        finally:
            await copying  # QEMU runs as soon as it has the state, so memory must be there first
        await lab.wait(_feed(lab.monitor, file, header), RESTORE_DEADLINE, "QEMU to take its state")


async def _feed(monitor: QMPClient, file: BinaryIO, header: _Header) -> None:
    _, writer = await _stream(monitor, "migrate-incoming")
    file.seek(header.state)
    writer.write(file.read(header.state_size))
    await writer.drain()
    writer.close()
    # It was saved stopped, so it comes back stopped.
    while (await monitor.execute("query-status"))["status"] == "inmigrate":  # type: ignore[index]
        await asyncio.sleep(0.002)
    await monitor.execute("cont")


def _copy_memory(source: int, source_offset: int, target: int, target_offset: int, size: int) -> None:
    """Copy what is data, leave holes holes."""
    position, end = source_offset, source_offset + size
    while position < end:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        stop = min(os.lseek(source, start, os.SEEK_HOLE), end)
        os.lseek(target, target_offset + start - source_offset, os.SEEK_SET)
        while start < stop:
            start += os.sendfile(target, source, start, min(stop - start, 64 * _CHUNK))
        position = stop


def _up(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
