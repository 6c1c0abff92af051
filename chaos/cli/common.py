# SPDX-License-Identifier: Apache-2.0
"""What several verbs need: telling progress, explaining errors, the options of a lab."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chaos.errors import LabFailed, SevchaosError

if TYPE_CHECKING:
    from chaos.cache.entries import Cleaned
    from chaos.controller.campaign import Tell
    from chaos.lab.session import Wish

DEFAULT_KERNEL = "debian:6.12"


def say(message: str) -> None:
    """Progress, for people: on stderr, so that stdout stays the command's own."""
    click.echo(click.style("· ", dim=True) + message, err=True)


def silent(_: str) -> None:
    pass


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Tell]:
    """Live progress of runs on a terminal; one line an experiment elsewhere."""
    if quiet:
        yield lambda run, doing: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield lambda run, doing: status.update(run + doing)
    else:
        yield lambda run, doing: say(run) if not doing else None


def tell_removed(cleaned: Cleaned) -> None:
    """What was removed of the cache, and what was left because it is in use."""
    from chaos.cache.entries import megabytes

    for entry in cleaned.busy:
        click.echo(f"{entry.kind}/{entry.name} is in use and was left", err=True)
    freed = sum(entry.size for entry in cleaned.removed)
    click.echo(f"removed {len(cleaned.removed)} entries, {megabytes(freed)}")


def explain(error: SevchaosError) -> None:
    """An error as people want it: what happened, what to do, and for a broken lab its last console lines."""
    if isinstance(error, LabFailed) and error.console:
        click.echo("the last lines of the lab's console:", err=True)
        for line in error.console:
            click.echo(click.style("  | ", dim=True) + line, err=True)
    click.echo(click.style("sevchaos: ", bold=True) + error.message, err=True)
    if error.remedy:
        click.echo(f"  what to do: {error.remedy}", err=True)


class Asids(click.ParamType[tuple[int, int]]):
    """N or N:ES."""

    name = "N[:ES]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", value)
        if not found:
            self.fail(f"{value!r} is neither N nor N:ES, as in 509 or 8:7", param, ctx)
        sev, es = int(found[1]), int(found[2] or 7)
        if not 0 < sev + es < 1 << 15:
            self.fail("there must be at least one ASID, and fewer than 32768", param, ctx)
        return sev, es


class MemoryOption(click.ParamType[int]):
    """Bytes, with M or G."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)([MG])", value)
        if not found:
            self.fail(f"{value!r} is no size like 1024M or 2G", param, ctx)
        size = int(found[1]) << (20 if found[2] == "M" else 30)
        if not 512 << 20 <= size <= 64 << 30:
            self.fail("a lab takes from 512M to 64G", param, ctx)
        return size


class FailpointsOption(click.ParamType[str]):
    """What the firmware is to fail, as docs/firmware.md has it."""

    name = "PLAN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from chaos.lab.psp import failpoints

        try:
            return failpoints.write(failpoints.parse(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


firmware_option = click.option(
    "--firmware",
    type=FailpointsOption(),
    help="Commands that the lab's firmware fails, delays or stalls meanwhile, as in "
    "LAUNCH_START#2=fail:RESOURCE_LIMIT; see docs/firmware.md.",
)


class ParameterOption(click.ParamType[tuple[str, str]]):
    """A module's parameter: NAME=VALUE."""

    name = "parameter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        found = re.fullmatch(r"([a-z][a-z0-9_]*)=([^\s\"'=]+)", str(value))
        if found is None:
            self.fail(f"{value!r} is not NAME=VALUE, without spaces and quotes", param, ctx)
        return found[1], found[2]


runs_option = click.option(
    "--runs", type=click.Path(file_okay=False, path_type=Path), default="runs", show_default=True,
    help="Where run directories go.",
)  # fmt: skip
jobs_option = click.option(
    "--jobs", "-j", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
    help="Run up to N labs in parallel (about two CPUs each).",
)  # fmt: skip


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a lab but for its kernel; the command gets them as `wish`, which has the default kernel."""
    options = (
        click.option("--asids", type=Asids(), default="8:7", show_default=True,
                     help="ASIDs of the lab for SEV guests, and for SEV-ES guests."),
        click.option("--cpus", type=click.IntRange(1, 64), default=2, show_default=True, help="CPUs of the lab."),
        click.option("--memory", type=MemoryOption(),
                     help="Memory of the lab. [default: 1G, and 2G for a kernel with KASAN]"),
        click.option("--ccp", type=ParameterOption(), multiple=True, metavar="NAME=VALUE",
                     help="A parameter that the PSP's driver is loaded with in the lab. Repeatable."),
        click.option("--cold", is_flag=True, help="Boot each lab; neither restore a saved one nor save this one."),
    )  # fmt: skip

    @functools.wraps(command)
    def gathered(
        *,
        asids: tuple[int, int],
        cpus: int,
        memory: int | None,
        cold: bool,
        ccp: tuple[tuple[str, str], ...],
        **others: Any,
    ) -> Any:
        from chaos.lab.session import Wish

        sev, es = asids
        wish = Wish(
            kernel=DEFAULT_KERNEL,
            sev_asids=sev,
            es_asids=es,
            cpus=cpus,
            memory=memory,
            cold=cold,
            ccp=tuple(sorted(ccp)),
        )
        return command(wish=wish, **others)

    for option in reversed(options):
        gathered = option(gathered)
    return gathered


def lab_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of one lab; the command gets them as `wish`, and a voice as `say`."""

    @click.option(
        "--kernel",
        default=DEFAULT_KERNEL,
        show_default=True,
        metavar="K",
        help="debian:SERIES, debian:ABI, running, installed:RELEASE, a build tree, or one that `kernel build` made.",
    )
    @machine_options
    @click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
    @functools.wraps(command)
    def gathered(*, kernel: str, wish: Wish, quiet: bool, **others: Any) -> Any:
        return command(wish=replace(wish, kernel=kernel), say=silent if quiet else say, **others)

    return gathered


class Stdin:
    """Our standard input, whatever it is. A daemon thread reads it, so that nothing waits for it at the end.

    To be made inside a running event loop.
    """

    def __init__(self) -> None:
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(maxsize=8)
        threading.Thread(target=self._read, args=[asyncio.get_running_loop()], daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        data = b"-"
        while data:
            try:
                data = os.read(0, 1 << 16)
            except OSError:
                data = b""
            try:
                asyncio.run_coroutine_threadsafe(self._chunks.put(data), loop).result()
            except (RuntimeError, concurrent.futures.CancelledError):  # the loop is gone, and with it the need
                return

    async def __call__(self) -> bytes:
        return await self._chunks.get()
