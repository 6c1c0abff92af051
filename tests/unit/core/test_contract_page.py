# SPDX-License-Identifier: Apache-2.0
"""docs/contract.md says what the oracle checks, in its order, and what differs between kernels."""

from __future__ import annotations

import re
from errno import EBUSY, EINVAL
from pathlib import Path

import pytest

from chaos.history.records import Invoke
from chaos.judge.oracle.page import OPERATIONS, PAGE, named, written
from chaos.judge.oracle.rules import CHECKS
from chaos.judge.oracle.state import Refusal, State, sure
from chaos.judge.oracle.versions import DIFFERENCES
from chaos.promises import PROMISES

ROOT = Path(__file__).parents[3]
TEXT = PAGE.read_text()


def test_the_tables_are_the_oracle_s_own() -> None:
    assert named(TEXT) == {"promises", "order", "differences"}
    assert written(TEXT) == TEXT, "run python -m chaos.judge.oracle.page"
    assert written(TEXT.replace("EBADF", "EBADFD")) != TEXT.replace("EBADF", "EBADFD")


def test_every_check_of_what_a_kernel_answers_says_what_it_is() -> None:
    assert set(OPERATIONS) <= CHECKS.keys()
    assert [check.__qualname__ for f in OPERATIONS for check in CHECKS[f] if not check.__doc__] == []
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (`\w+`)? ?\| \d+ \|", line)]
    assert len(rows) == sum(len(dict.fromkeys(CHECKS[f])) for f in OPERATIONS)
    assert not [row for row in rows if re.search(r"\| \d+ \|  \|", row)], "a check without an errno"


def test_whatever_a_check_says_of_itself_is_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(state: State, op: Invoke) -> Refusal | None:
        """This | that,
        and no more."""
        return sure(EINVAL, when=True)

    def silent(state: State, op: Invoke) -> Refusal | None:
        return sure(EBUSY, when=True)

    monkeypatch.setitem(CHECKS, "move", (told, silent))
    assert "| `move` | 1 | EINVAL | This \\| that, and no more. |\n|  | 2 | EBUSY |  |\n" in written(TEXT)


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_is_there_in_full(promise: str) -> None:
    assert f"* **{promise}** " in TEXT


def test_every_part_that_a_difference_cites_is_there() -> None:
    cited = {part for each in DIFFERENCES for part in re.findall(r"\b\d\.\d\b", each.source.partition("[")[0])}
    parts = set(re.findall(r"^### (\d\.\d) ", TEXT, re.MULTILINE))
    kernels = {"6.1", "6.6", "5.1"}
    assert {part for part in cited if part in ("1.2", "1.7", "3.4")} <= parts | kernels
    assert {"1.2", "1.7", "3.4"} <= parts


def test_whoever_cites_the_contract_links_it() -> None:
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/findings/*.md")]
    citing = [page for page in pages if re.search(r"kernel\s+contract", page.read_text()) and page != PAGE]
    assert citing
    assert [page.name for page in citing if "contract.md" not in page.read_text()] == []
