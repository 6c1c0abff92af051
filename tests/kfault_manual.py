# SPDX-License-Identifier: Apache-2.0
"""The table of functions in docs/kfault.md, for the tests that hold it to the module and to the kernels."""

from __future__ import annotations

import re
from pathlib import Path

_MANUAL = Path(__file__).parent.parent / "docs" / "kfault.md"


def manual_table() -> dict[str, list[bool]]:
    """By function: hold, error, anything, there in 6.1, in 6.12, in 7.3."""
    rows = re.findall(r"^\| `(\w+)` \|((?: (?:yes )?\|){6})", _MANUAL.read_text(), re.MULTILINE)
    return {name: ["yes" in cell for cell in cells.split("|")[:6]] for name, cells in rows}
