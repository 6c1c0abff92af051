# SPDX-License-Identifier: Apache-2.0
"""For all tests of the core: every answer to a question that a checker asks is whole, whatever a test looks at.

A verdict on a promise joins several answers, so that one without its records would hardly be missed in it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from chaos.judge import parts
from chaos.judge.verdict import Outcome, Verdict
from chaos.promises import PROMISES


@pytest.fixture(scope="session", autouse=True)
def every_verdict_is_whole() -> None:
    pytest.MonkeyPatch().setattr(parts, "Verdict", whole)


def whole(**fields: Any) -> Verdict:
    verdict = Verdict(**fields)
    assert verdict.promise in PROMISES
    assert verdict.reason and isinstance(verdict.reason, str)
    assert all(isinstance(text, str) for text in (verdict.expected, verdict.seen, verdict.signature))
    if verdict.outcome is Outcome.BROKEN:
        assert verdict.signature and verdict.expected and verdict.seen, f"{verdict}: what was expected, what was seen?"
    if verdict.outcome in (Outcome.BROKEN, Outcome.KEPT):
        assert verdict.records or verdict.promise == "P12", f"{verdict}: of what does it say so?"
    assert all(re.fullmatch(r"skipped:[a-z-]+", skip) for skip in verdict.skips)
    if verdict.outcome is Outcome.UNKNOWN and "+" not in verdict.signature:
        assert re.fullmatch(r"[a-z-]*(:[A-Za-z_-]+)?", verdict.signature), f"{verdict}: no experiment can name that"
    if verdict.promise == "P9" and verdict.outcome is Outcome.UNKNOWN:
        assert verdict.records or "the host was not" in verdict.reason, f"{verdict}: what was compared?"
    if "the move from" in verdict.reason:
        assert verdict.records, f"{verdict}: it tells of a move and has no record of it"
    return verdict
