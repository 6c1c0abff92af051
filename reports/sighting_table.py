# SPDX-License-Identifier: Apache-2.0
"""The table of findings and kernels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from chaos.judge.findings import Finding
from chaos.judge.sightings import KernelSightings, Sighting, SightingOutcome
from reports.output import bare_table, put_out
from reports.sentences import clean

FORMAT = 1
_STYLES = {
    SightingOutcome.SEEN: "bold red",
    SightingOutcome.NOT_SEEN: "green",
    SightingOutcome.UNKNOWN: "yellow",
    SightingOutcome.SKIPPED: "cyan",
}
_WRITTEN = "seen: on just this version, as its page says. Blank: nobody has seen it there, or nobody has looked"
_LOOKED = (
    "seen: a run of an experiment that shows it broke its promise as the finding says. not seen: the promise is kept"
)


def as_data(known: Sequence[Finding], columns: Sequence[KernelSightings]) -> dict[str, Any]:
    """For machines: the findings, and of each kernel what was seen."""
    return {
        "format": FORMAT,
        "findings": [{"id": f.id, "title": f.title, "document": f.document, "shown_by": f.shown_by} for f in known],
        "kernels": [
            {
                "kernel": column.source,
                "version": column.version,
                "sightings": [{"finding": s.finding.id, "seen": s.seen, "reason": s.reason} for s in column.sightings],
            }
            for column in columns
        ],
    }


def show(
    known: Sequence[Finding], columns: Sequence[KernelSightings], *, looked: bool, file: TextIO | None = None
) -> None:
    """Print it, on stdout unless told otherwise."""
    stream = file if file is not None else sys.stdout
    put_out(Group(*_parts(known, columns, looked=looked)), stream, _wide(columns))


def _wide(columns: Sequence[KernelSightings]) -> int:
    """Outside of a terminal nothing is folded for want of room."""
    return 60 + sum(max(len(column.source), len(column.version), 9) + 2 for column in columns)


def _parts(known: Sequence[Finding], columns: Sequence[KernelSightings], *, looked: bool) -> list[RenderableType]:
    table = bare_table()
    table.add_column("finding", no_wrap=True)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(_heading(column))
    for finding in known:
        cells = [next((s for s in column.sightings if s.finding is finding), None) for column in columns]
        table.add_row(finding.id, finding.title, *map(_cell, cells))
    told = [
        Text(f"{finding.id} on {column.source or column.version}: {sighting.seen.value}: {clean(sighting.reason)}")
        for finding in known
        for column in columns
        for sighting in column.sightings
        if sighting.finding is finding and sighting.seen in (SightingOutcome.UNKNOWN, SightingOutcome.SKIPPED)
    ]
    return [table, Text(f"\n{_LOOKED if looked else _WRITTEN}", style="dim"), *told]


def _heading(column: KernelSightings) -> str:
    return "\n".join(text for text in (clean(column.source), column.version or "no version") if text)


def _cell(sighting: Sighting | None) -> Text:
    if sighting is None:
        return Text("")
    said = "fixed" if sighting.reason == "fixed" else sighting.seen.value
    return Text(said, style=_STYLES[sighting.seen])
