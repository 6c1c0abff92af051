# SPDX-License-Identifier: Apache-2.0
"""How every report for people gets out: with colours on a terminal, as plain text of a given width elsewhere."""

from __future__ import annotations

from io import StringIO
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table


def put_out(body: RenderableType, stream: TextIO, width: int) -> None:
    """On a terminal its own width counts."""
    if stream.isatty():
        Console(file=stream).print(body, highlight=False)
    else:
        stream.write(plain(body, width))


def plain(body: RenderableType, width: int) -> str:
    """As plain text, whatever the environment says about terminals."""
    text = StringIO()
    Console(file=text, width=width, color_system=None, force_terminal=False, _environ={}).print(body, highlight=False)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def bare_table() -> Table:
    """A table with a line below its heads, and no other."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
