# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/contract.md, made of the oracle's own: `python -m chaos.judge.oracle.page` writes them anew.

What stands around them is written by hand. A test compares, so that page and oracle cannot part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from errno import errorcode
from pathlib import Path
from types import FunctionType

from chaos.judge.oracle.rules import CHECKS
from chaos.judge.oracle.surroundings import Check
from chaos.judge.oracle.versions import DIFFERENCES, Version
from chaos.promises import PROMISES

PAGE = Path(__file__).parents[3] / "docs" / "contract.md"
# Those that a kernel answers, in the order of the page; what is done from outside of any VM is not in the contract.
OPERATIONS = (
    "move", "mirror", "create", "create_vcpu", "init", "launch_start", "launch_update_data", "launch_update_vmsa",
    "launch_measure", "launch_finish", "guest_status", "dbg_decrypt", "dbg_encrypt", "command", "register_region",
    "unregister_region", "set_memory", "irqfd", "ioeventfd", "platform",
)  # fmt: skip
_REGION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
_ERRNOS = frozenset(errorcode.values())


def written(page: str) -> str:
    """The page with its tables as they are due."""
    return _REGION.sub(lambda found: f"{found[1]}\n{_TABLES[found[2]]()}\n{found[3]}", page)


def named(page: str) -> frozenset[str]:
    """The tables that the page has."""
    return frozenset(found[1] for found in _REGION.findall(page))


def _promises() -> str:
    rows = (f"| {promise} | {told} |" for promise, told in PROMISES.items())
    return _table("| | in short |", rows)


def _order() -> str:
    rows = []
    for operation in OPERATIONS:
        for number, check in enumerate(dict.fromkeys(CHECKS[operation]), 1):
            first = f"`{operation}`" if number == 1 else ""
            rows.append(f"| {first} | {number} | {', '.join(_answers(check))} | {_told(check)} |")
    return _table("| operation | | answer | what is looked at |", rows)


def _differences() -> str:
    rows = (
        f"| `{each.name}` | {_version(each.mainline)} | {', '.join(map(_version, each.stable)) or 'none'} "
        f"| {each.source} |"
        for each in DIFFERENCES
    )
    return _table("| | since | and in | source |", rows)


def _table(head: str, rows: Iterator[str] | list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join((head, "|---" * columns + "|", *rows))


def _told(check: Check) -> str:
    """What the check says of itself."""
    return re.sub(r"\s+", " ", (check.__doc__ or "").strip()).replace("|", "\\|")


def _answers(check: Check) -> list[str]:
    """The errnos that are in the check's code, and in that of what it asks."""
    return sorted(set(_errnos(check, set())))


def _errnos(function: Callable[..., object], seen: set[str]) -> Iterator[str]:
    if not isinstance(function, FunctionType) or function.__qualname__ in seen:
        return
    seen.add(function.__qualname__)
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, int) and cell.cell_contents in errorcode:
            yield errorcode[cell.cell_contents]
    for name in function.__code__.co_names:
        if name in _ERRNOS:
            yield name
        elif name in function.__globals__ and function.__module__.startswith("chaos.judge.oracle"):
            yield from _errnos(function.__globals__[name], seen)


def _version(version: Version) -> str:
    """6.10 is the first of its series; a stable kernel has three numbers."""
    return ".".join(map(str, version if version[2] else version[:2]))


_TABLES: dict[str, Callable[[], str]] = {"promises": _promises, "order": _order, "differences": _differences}


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
