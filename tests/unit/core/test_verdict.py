# SPDX-License-Identifier: Apache-2.0
"""Outcomes, the worst of them, and the exit codes they lead to."""

from __future__ import annotations

import pytest

from chaos.errors import ExitCode
from chaos.judge.verdict import Outcome, RunVerdict, Verdict, exit_code, worst

H, D, U, S = Outcome.KEPT, Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED


def run(*outcomes: Outcome, accepted: str = "") -> RunVerdict:
    """A run of verdicts; `accepted` has a letter for each, "y" for those accepted."""
    verdicts = tuple(
        Verdict(promise="P1", outcome=outcome, reason="", accepted="for a reason" if mark == "y" else "")
        for outcome, mark in zip(outcomes, accepted or "n" * len(outcomes), strict=True)
    )
    return RunVerdict(experiment="x", kernel="6.1.1", host="lab", seed=1, outcome=worst(outcomes), verdicts=verdicts)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [((H, S), H), ((S, S), S), ((H, U, S), U), ((U, D, H), D), ((), U)],
)
def test_worst(outcomes: tuple[Outcome, ...], expected: Outcome) -> None:
    assert worst(outcomes) is expected


@pytest.mark.parametrize(
    ("of", "code"),
    [
        (run(H, H), ExitCode.KEPT),
        (run(H, S), ExitCode.KEPT),
        (run(S), ExitCode.SKIPPED),
        (run(H, U), ExitCode.UNKNOWN),
        (run(D, U), ExitCode.BROKEN),
        (run(), ExitCode.UNKNOWN),
        (run(D, H, accepted="yn"), ExitCode.KEPT),
        (run(D, U, accepted="yn"), ExitCode.UNKNOWN),
        (run(D, D, accepted="yn"), ExitCode.BROKEN),
        (run(D, U, accepted="yy"), ExitCode.KEPT),
        (run(U, accepted="y"), ExitCode.SKIPPED),  # what cannot be asked has not been shown
    ],
)
def test_exit_code_of_a_run(of: RunVerdict, code: ExitCode) -> None:
    assert of.exit_code is code


def test_exit_code_of_several() -> None:
    assert exit_code([]) is ExitCode.UNKNOWN
    assert exit_code([run(H), run(S)]) is ExitCode.KEPT
    assert exit_code([run(S)]) is ExitCode.SKIPPED
    assert exit_code([run(H), run(U)]) is ExitCode.UNKNOWN
    assert exit_code([run(U), run(D)]) is ExitCode.BROKEN


def test_every_outcome_has_its_code() -> None:
    assert [outcome.exit_code for outcome in (H, D, U, S)] == [0, 1, 2, 4]
