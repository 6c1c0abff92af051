# SPDX-License-Identifier: Apache-2.0
"""A program of the user's in the lab, with files and modules of the user's brought along."""

from __future__ import annotations

import asyncio
import io
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from chaos.cache.entries import Say
from chaos.errors import UsageError
from chaos.lab.image import shared_libraries
from chaos.lab.machine import Lab
from chaos.lab.protocol import Resize, Terminal
from chaos.lab.psp.plan import FailpointPlan
from chaos.lab.session import Source, Wish, execute, no_input, open_lab, write_to

COPIES = "copy"  # the directory of the lab that copies go to, and in which programs start
_BLOCK = 1 << 16
_TOOL_DEADLINE = 120.0


async def run_command(
    wish: Wish,
    argv: Sequence[str],
    *,
    copies: Sequence[Path],
    modules: Sequence[tuple[Path, tuple[str, ...]]],
    firmware: FailpointPlan,
    timeout: float,
    say: Say,
    stdin: Callable[[], Source],
) -> int:
    """Open a lab, bring files and modules in, run `argv` while the firmware follows its plan; returns its exit code."""
    archive = _archive([*copies, *(path for path, _ in modules)])
    async with open_lab(wish, say=say) as lab:
        if archive:
            await _tool(lab, ["tar", "-x", "-C", "/"], stdin=_bytes(archive))
        for path, parameters in modules:
            await _tool(lab, ["insmod", f"/{COPIES}/{path.name}", *parameters])
        await lab.psp.plan(firmware)
        ended = await execute(lab, argv, stdin=stdin(), stdout=write_to(1), stderr=write_to(2), timeout=timeout)
        fired = (await lab.psp.status()).fired if firmware.rules else ()
    for rule, count in Counter(firmware.rules[firing.rule] for firing in fired).items():
        say(f"the firmware: {rule}, {count} times")
    if ended.reason:
        say(ended.reason)
    return ended.code


async def run_shell(
    wish: Wish,
    *,
    say: Say,
    stdin: Callable[[], Source],
    size: Callable[[], tuple[int, int]],
    raw: Callable[[], object],
) -> int:
    """A shell on a terminal of the lab's; `raw` sets ours up once the lab runs."""
    async with open_lab(wish, say=say) as lab:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, lambda: lab.send(Resize(terminal=Terminal(*size()))))
        raw()
        ended = await execute(
            lab, ["sh", "-l"], stdin=stdin(), stdout=write_to(1), stderr=write_to(2), terminal=Terminal(*size())
        )
    return ended.code


def _archive(paths: Iterable[Path]) -> bytes:
    """A tar archive, to be unpacked at the root, of `paths` and of the libraries of the programs among them."""
    whole = io.BytesIO()
    names: dict[str, Path] = {}
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for path in paths:
            name = f"{COPIES}/{path.resolve().name}"
            if names.setdefault(name, path) is not path:
                raise UsageError(
                    f"{names[name]} and {path} would both be {path.resolve().name} in the lab",
                    remedy="rename one, or copy a directory that holds both",
                )
            archive.add(path.resolve(), arcname=name)
        files = [found for path in paths for found in ([path] if path.is_file() else sorted(path.rglob("*")))]
        for library in shared_libraries(found for found in files if _is_program(found)):
            archive.add(library.resolve(), arcname=str(library).lstrip("/"))
    return whole.getvalue() if names else b""


def _is_program(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(18)
    # An ELF file that is executable or a shared object; a kernel module is neither.
    return head[:4] == b"\x7fELF" and head[16] in (2, 3)


def _bytes(data: bytes) -> Source:
    position = 0

    async def source() -> bytes:
        nonlocal position
        block = data[position : position + _BLOCK]
        position += len(block)
        return block

    return source


async def _tool(lab: Lab, argv: Sequence[str], *, stdin: Source = no_input) -> None:
    """Run one of the lab's own tools. Raises `UsageError` with its words if it fails."""
    words: list[bytes] = []

    async def collect(data: bytes) -> None:
        words.append(data)

    ended = await execute(lab, argv, stdin=stdin, stdout=collect, stderr=collect, timeout=_TOOL_DEADLINE)
    if ended.code:
        said = b"".join(words).decode(errors="replace").strip()
        raise UsageError(f"in the lab, `{' '.join(argv)}` failed: {said or ended.reason}", remedy="see its words")
