# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ tell a reader to type, and what they show as its output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = tuple(sorted((ROOT / "docs").rglob("*.md")))
LAB = ROOT / "docs" / "lab.md"
FIRMWARE = ROOT / "docs" / "firmware.md"
FINDINGS = tuple(sorted((ROOT / "docs" / "findings").glob("0*.md")))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `sevchaos` that stands in a line of its own: indented, or behind a `$`."""
    lines = re.findall(r"^(?:    |\$ )sevchaos (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def blocks(language: str) -> list[tuple[str, str]]:
    """The page and text of every fenced block in that language, in README and docs/."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, text) for page in (README, *DOCS) for text in fenced.findall(page.read_text(encoding="utf-8"))]


def output(page: Path) -> tuple[list[str], list[str]]:
    """The arguments of the command whose output the page shows, and that output's lines, blanks run together."""
    found = re.search(
        r"<!-- output of: sevchaos (.*) -->\n```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None, f"{page.name} shows no output"
    return shlex.split(found[1]), [" ".join(line.split()) for line in found[2].splitlines()]
