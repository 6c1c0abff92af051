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
# What newer kernels have in the place of a function: kvm_main.c, from 6.16 on.
_INSTEAD = {
    "sev_lock_vcpus_for_migration": "kvm_lock_all_vcpus",
    "sev_unlock_vcpus_for_migration": "kvm_unlock_all_vcpus",
}


def base_name(function: str) -> str:
    """Without what a compiler appended."""
    return function.split(".", 1)[0]


def copies(function: str, kallsyms: str) -> tuple[str, ...]:
    """The names that whole copies of `function` have, its own among them, in the text of /proc/kallsyms. Where there is
    none, those of the function that newer kernels have in its place."""
    found = re.findall(rf" ({re.escape(function)}(?:\.(?:constprop|isra|llvm)\.\d+)*)(?=\s)", kallsyms)
    if not found and function in _INSTEAD:
        return copies(_INSTEAD[function], kallsyms)
    return tuple(sorted(set(found)))


def kallsyms(proc: Path = PROC) -> str:
    """Several megabytes, which the lab takes a third of a second to read. Raises OSError."""
    return (proc / "kallsyms").read_text()
