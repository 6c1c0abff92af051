# SPDX-License-Identifier: Apache-2.0
"""docs/faults.md says of every fault what the fault says of itself."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "faults.md").read_text()
TABLE = runpy.run_path(str(ROOT / "bench" / "fault_table.py"))


def test_the_tables_say_what_the_faults_say() -> None:
    assert TABLE["written"](PAGE, dict(TABLE["_shown"](PAGE))) == PAGE, "run bench/fault_table.py --words"


def test_a_row_that_is_made_anew_keeps_what_stands_around_it() -> None:
    page = TABLE["written"](PAGE, {"kill": ("a | b", "c")})
    assert dict(TABLE["_shown"](page))["kill"] == ("a | b", "c")
    assert page.split("## vmm", maxsplit=1)[0] == PAGE.split("## vmm", maxsplit=1)[0]
    assert TABLE["written"](page, dict(TABLE["_shown"](page))) == page


def test_a_row_names_every_kernel_that_showed_the_same_experiment() -> None:
    shown, cells = TABLE["Shown"], TABLE["_cells_of"]
    first = cells(shown("one", "6.12.117", "a: b"), shown("one", "6.12.117", "c"), None)
    assert first == ("`one` on 6.12.117: a: b", "nothing kept: c")
    second = cells(shown("one", "6.1.192", "d"), shown("one", "6.1.192", "e"), first)
    assert second == ("`one` on 6.1.192 and 6.12.117: d", "nothing kept: e")
    assert cells(shown("two", "6.1.192", "d"), shown("two", "6.1.192", "e"), second)[0] == "`two` on 6.1.192: d"
