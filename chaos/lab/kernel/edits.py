# SPDX-License-Identifier: Apache-2.0
"""Edits of a kernel's sources: the proposed fix of each finding, without the kernel's text around it.

    # what it is for
    file arch/x86/kvm/svm/sev.c
    in sev_migrate_from
    -	dst->active = true;
    +	dst->active = true;
    +	dst->need_init = false;

The lines with `-` must stand once, one below the other, in the function or structure that `in` names; those with `+`
take their place. `only 6.12 7.3` before them is for sources of these series alone. Where an edit does not fit, the
source is another one than it was written for, and nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.errors import InternalError, NoKernel

FIXES = Path(__file__).parent / "fixes"
SERIES = ("6.12", "7.3")
"""The kernels that the fixes were written for."""
BY_ANOTHER = {"0005": "0001", "0014": "0008"}
"""Findings that the fix of another one mends."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Lines without their ends. `series` is empty if it is for all."""

    file: str
    inside: str
    series: tuple[str, ...]
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fix:
    """The edits that mend one finding; `finding` is its number, "0003"."""

    finding: str
    edits: tuple[Edit, ...]


def fixes() -> tuple[Fix, ...]:
    """All that the project has, by number."""
    return tuple(Fix(path.name[:4], parse(path.read_text(), path.name)) for path in sorted(FIXES.glob("*.edit")))


def parse(text: str, name: str) -> tuple[Edit, ...]:
    """The edits of a file. Raises InternalError, for such files are the project's own."""
    found: list[Edit] = []
    place = {"file": "", "in": "", "only": ""}
    old: list[str] = []
    new: list[str] = []

    def end() -> None:
        if old or new:
            if not (old and place["file"] and place["in"]):
                raise InternalError(f"{name}: an edit names no file, no function, or no line that it replaces")
            found.append(Edit(place["file"], place["in"], tuple(place["only"].split()), tuple(old), tuple(new)))
        old.clear()
        new.clear()

    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if line.startswith("-") and not new:
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
        elif line.startswith("-"):
            end()
            old.append(line[1:])
        elif not line or line.startswith("#"):
            end()
            place["only"] = ""
        elif word in place:
            end()
            place[word] = rest
        else:
            raise InternalError(f"{name}: {line!r} is no line of an edit")
    end()
    return tuple(found)


def apply(wanted: Iterable[Fix], tree: Path, series: str) -> tuple[Path, ...]:
    """Make these fixes in the sources below `tree`, and return the files that were changed.

    A changed file is a new one, so that other links to the old one keep it. Raises NoKernel, and has changed nothing
    then, if one does not fit.
    """
    if series not in SERIES:
        raise NoKernel(
            f"the fixes of the findings are for Linux {' and '.join(SERIES)}, and these sources are of {series}",
            remedy="build it without them",
        )
    texts: dict[Path, list[str]] = {}
    for fix in wanted:
        for edit in fix.edits:
            if edit.series and series not in edit.series:
                continue
            path = tree / edit.file
            if path not in texts:
                texts[path] = _lines(path, fix)
            texts[path] = _edited(texts[path], edit, fix)
    for path, lines in texts.items():
        path.unlink()
        path.write_text("".join(f"{line}\n" for line in lines))
    return tuple(texts)


def _lines(path: Path, fix: Fix) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1]
    except OSError as error:
        raise _does_not_fit(fix, f"{path}: {error.strerror}") from error


def _edited(lines: Sequence[str], edit: Edit, fix: Fix) -> list[str]:
    start, end = _extent(lines, edit.inside)
    size = len(edit.old)
    at = [n for n in range(start, end - size + 1) if tuple(lines[n : n + size]) == edit.old]
    if len(at) != 1:
        times = f"{len(at)} times" if at else "not"
        raise _does_not_fit(fix, f"{edit.file}: in {edit.inside} it is {times} there: {edit.old[0].strip()!r}")
    return [*lines[: at[0]], *edit.new, *lines[at[0] + size :]]


def _extent(lines: Sequence[str], name: str) -> tuple[int, int]:
    """From the line that begins the definition of a function or structure to the one after its end; two equal numbers
    if there is none. What a declaration says of it is no definition."""
    head = re.compile(rf"(?:[A-Za-z].*)?\b{re.escape(name)}\b *(?:\(|\{{)")
    for start in (number for number, line in enumerate(lines) if head.match(line)):
        body = next((n for n in range(start, len(lines)) if lines[n].endswith(("{", ";"))), start)
        if lines[body].endswith("{"):
            return start, next((n + 1 for n in range(body, len(lines)) if lines[n].startswith("}")), len(lines))
    return 0, 0


def _does_not_fit(fix: Fix, why: str) -> NoKernel:
    return NoKernel(
        f"the fix of finding {fix.finding} does not fit these sources: {why}",
        remedy="the fixes are for 6.12 and 7.3; build it without them",
    )
