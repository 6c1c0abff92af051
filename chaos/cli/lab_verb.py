# SPDX-License-Identifier: Apache-2.0
"""`sevchaos lab`: a SEV host for anybody's program, and what is kept of it on disk."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import sys
import termios
import tty
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chaos.cli.common import Stdin, firmware_option, lab_options, say, tell_removed
from chaos.errors import UsageError

if TYPE_CHECKING:
    from chaos.cache.entries import Say
    from chaos.lab.session import Wish

_TIMEOUT = 600.0


@click.group()
def lab_() -> None:
    """A SEV host that needs no SEV hardware: QEMU, a stock kernel, a software PSP.

    The kernel's real kvm_amd and ccp drivers run in it; nothing is encrypted, and SEV-ES guests cannot be entered.
    """


@lab_.command("run")
@lab_options
@click.option("--insmod", multiple=True, metavar="FILE.ko[,param=value]…", help="Load this module first. Repeatable.")
@click.option(
    "--copy", "copies", multiple=True, metavar="PATH", type=click.Path(exists=True, path_type=Path),
    help="Copy a file or directory to the command's working directory; a program brings its libraries. Repeatable.",
)  # fmt: skip
@firmware_option
@click.option("--timeout", type=click.FloatRange(1, 86400), default=_TIMEOUT, show_default=True, metavar="S",
              help="Give up after so many seconds of the command.")  # fmt: skip
@click.argument("command", nargs=-1, required=True)
def run(
    *,
    wish: Wish,
    say: Say,
    insmod: tuple[str, ...],
    copies: tuple[Path, ...],
    firmware: str | None,
    timeout: float,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND in the lab as root: its input, output, errors and exit code are passed through.

    \b
    sevchaos lab run -- cat /sys/fs/cgroup/misc.capacity
    sevchaos lab run --kernel debian:6.1 --copy ./sev_migrate_tests -- ./sev_migrate_tests
    """
    from chaos.lab.psp import failpoints
    from chaos.lab.psp.plan import FailpointPlan
    from chaos.lab.tools import run_command

    plan = FailpointPlan() if firmware is None else FailpointPlan(failpoints.parse(firmware))
    modules = [_module(text) for text in insmod]
    return asyncio.run(
        run_command(wish, command, copies=copies, modules=modules, firmware=plan, timeout=timeout, say=say, stdin=Stdin)
    )


def _module(text: str) -> tuple[Path, tuple[str, ...]]:
    name, *parameters = text.split(",")
    if not Path(name).is_file():
        raise UsageError(f"--insmod {text}: there is no file {name}", remedy="give the path of a .ko file")
    for parameter in parameters:
        if "=" not in parameter:
            raise UsageError(f"--insmod {text}: {parameter!r} is not param=value", remedy="write FILE.ko,param=value")
    return Path(name), tuple(parameters)


@lab_.command("shell")
@lab_options
def shell(*, wish: Wish, say: Say) -> int:
    """A terminal in the lab. Ends with the shell."""
    from chaos.lab.tools import run_shell

    if not sys.stdin.isatty():
        raise UsageError("`lab shell` wants a terminal", remedy="`sevchaos lab run -- COMMAND` does without")
    before = termios.tcgetattr(0)
    try:
        return asyncio.run(run_shell(wish, say=say, stdin=Stdin, size=_size, raw=lambda: tty.setraw(0)))
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _size() -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))
    return rows, columns


@lab_.command("list")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def list_(as_json: bool) -> None:
    """Which labs are saved, and the layers of their root file systems. Kernels are in `sevchaos kernel list`."""
    from chaos.cache import entries as cache

    entries = [entry for entry in cache.entries() if entry.kind in cache.LABS]
    if as_json:
        import msgspec

        rows = [{"kind": e.kind, "name": e.name, "bytes": e.size, "leftover": e.leftover} for e in entries]
        click.echo(msgspec.json.encode(rows))
        return
    for entry in entries:
        note = "  (left over)" if entry.leftover else ""
        click.echo(f"{cache.megabytes(entry.size):>10}  {entry.kind + '/' + entry.name:60} {entry.what}{note}")
    total = sum(entry.size for entry in entries)
    click.echo(f"{cache.megabytes(total):>10}  in {cache.root()}; `sevchaos lab clean` removes them")


@lab_.command("clean")
def clean() -> None:
    """Remove saved labs and the layers of their root file systems. The next lab makes its own anew, and boots."""
    from chaos.cache import entries as cache

    tell_removed(cache.clean(kinds=cache.LABS, say=say))
