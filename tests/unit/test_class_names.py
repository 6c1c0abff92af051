# SPDX-License-Identifier: Apache-2.0
"""A class or a type has a name of its own: whoever reads `Run` need not look which of five it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("chaos", "faults", "reports", "experiments")
# A record is called what it has in a history file as its `type`; a fault what its entry point says, by which installed
# packages find it.
TWICE = {"Fault": "a fault, and its record", "Firmware": "the fault of the firmware, and a command's record"}


def test_no_name_means_two_things() -> None:
    found = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name in names(path.read_text(encoding="utf-8")):
                found[name].append(str(path.relative_to(ROOT)))
    assert len(found) > 400, "nothing was looked at"
    twice = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in TWICE} == {}
    assert set(TWICE) <= set(twice), "what is excused and no longer there"


def names(source: str) -> Iterator[str]:
    """Of every class, and of every alias of a type at the top of a module: CamelCase, which a constant is not."""
    tree = ast.parse(source)
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if name.lstrip("_")[:1].isupper() and not name.isupper():
                    yield name


def test_a_class_an_alias_and_a_constant_are_told_apart() -> None:
    source = "class One:\n    class Inner: ...\nTwo = int | str\n_Three: type = int\nFOUR = 4\nfive = 5\n"
    assert [*names(source)] == ["One", "Inner", "Two", "_Three"]
