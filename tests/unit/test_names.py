# SPDX-License-Identifier: Apache-2.0
"""What a text names is there: every `chaos.…` name and every path below `chaos/` in a comment, a string, a page of the
documentation or `pyproject.toml`. A checker reads imports; nobody else reads these."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ("chaos", "faults", "experiments", "reports", "tests", "docs", "bench", "setup")
KINDS = {".py", ".md", ".toml", ".c", ".h", ".sh", ".yaml", ".j2", ""}
NAME = re.compile(r"(?<![\w./@-])chaos(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"(?<![\w./-])chaos/[\w/.-]*[\w/](?!\*)")


def texts() -> Iterator[Path]:
    yield from (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "Makefile")
    for folder in TEXTS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in KINDS and "__pycache__" not in path.parts:
                yield path


def resolves(name: str) -> bool:
    """Whether the longest module that the name begins with has what comes after it."""
    module, *rest = name.split(".")
    while rest and importlib.util.find_spec(f"{module}.{rest[0]}") is not None:
        module = f"{module}.{rest.pop(0)}"
        if not hasattr(importlib.import_module(module), "__path__"):
            break
    found: object = importlib.import_module(module)
    for attribute in rest:
        if not hasattr(found, attribute):
            return attribute in getattr(found, "__annotations__", {})
        found = getattr(found, attribute)
    return True


def lacking(text: str) -> set[str]:
    plain = text.replace("\\.", ".")  # a pattern that a test looks for
    names = {found for found in NAME.findall(plain) if not resolves(found)}
    return names | {found for found in PATH.findall(plain) if not (ROOT / found).exists()}


def test_every_name_in_a_text_is_there() -> None:
    wrong = {path: lacking(path.read_text(encoding="utf-8", errors="replace")) for path in texts()}
    told = [f"{path.relative_to(ROOT)}: {name}" for path, names in wrong.items() for name in sorted(names)]
    assert not told, "\n".join(["these name what is not there:", *told])


@pytest.mark.parametrize("gone", ["the {}.nowhere", "see `{}.fault.Fault.nothing`", "`{}/nowhere.py`"])
def test_a_name_that_is_not_there_is_found(gone: str) -> None:
    assert lacking(gone.format("chaos"))
