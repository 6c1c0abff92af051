# SPDX-License-Identifier: Apache-2.0
"""Functions of the running kernel by name.

A compiler may put a function into its callers, and then it has no name at all, or make copies of it with fewer
arguments, whose names it appends to: `f.constprop.0` is a whole copy of f. Parts of one (`.cold`, `.part.0`) have no
entry of their own that a caller could be stopped or seen at.
"""

from __future__ import annotations

import re
from pathlib import Path

PROC = Path("/proc")


def base_name(function: str) -> str:
    """Without what a compiler appended."""
    return function.split(".", 1)[0]


def copies(function: str, kallsyms: str) -> tuple[str, ...]:
    """The names that whole copies of `function` have, its own among them, in the text of /proc/kallsyms."""
    found = re.findall(rf" ({re.escape(function)}(?:\.(?:constprop|isra|llvm)\.\d+)*)(?=\s)", kallsyms)
    return tuple(sorted(set(found)))


def kallsyms(proc: Path = PROC) -> str:
    """Several megabytes, which the lab takes a third of a second to read. Raises OSError."""
    return (proc / "kallsyms").read_text()
