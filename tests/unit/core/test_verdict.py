# SPDX-License-Identifier: Apache-2.0
"""Outcomes, the worst of them, and the exit codes they lead to."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.errors import ExitCode
from chaos.judge.verdict import Bounds, Outcome, RunVerdict, Verdict, exceeded, exit_code, tally, worst

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


VERDICTS = [(H, ""), (D, ""), (U, ""), (S, ""), (D, "y"), (U, "y")]


def made(*verdicts: tuple[Outcome, str]) -> RunVerdict:
    return run(*(outcome for outcome, _ in verdicts), accepted="".join(mark or "n" for _, mark in verdicts))


@given(st.lists(st.sampled_from(VERDICTS), max_size=6))
def test_exit_code_of_a_run(verdicts: list[tuple[Outcome, str]]) -> None:
    """A deviation counts unless it is accepted, then an unknown; without either, something has to be kept. Where
    nothing is, the code is 4 if all was skipped, else 2."""
    code = made(*verdicts).exit_code
    if (D, "") in verdicts:
        assert code is ExitCode.BROKEN
    elif (U, "") in verdicts:
        assert code is ExitCode.UNKNOWN
    elif (H, "") in verdicts:
        assert code is ExitCode.KEPT
    else:
        assert code is (ExitCode.SKIPPED if verdicts and set(verdicts) == {(S, "")} else ExitCode.UNKNOWN)


@given(st.lists(st.sampled_from(VERDICTS), max_size=6), st.lists(st.sampled_from((H, U, S)), max_size=4))
def test_what_is_not_listed_counts_only_if_it_is_broken(
    verdicts: list[tuple[Outcome, str]], others: list[Outcome]
) -> None:
    plain = made(*verdicts)
    beside = tuple(Verdict(promise="P2", outcome=outcome, reason="", listed=False) for outcome in others)
    more = msgspec.structs.replace(plain, verdicts=plain.verdicts + beside)
    assert (more.exit_code, more.tally) == (plain.exit_code, plain.tally)
    broken = Verdict(promise="P2", outcome=D, reason="", listed=False)
    assert msgspec.structs.replace(plain, verdicts=(*plain.verdicts, broken)).exit_code is ExitCode.BROKEN


def test_what_is_left_on_the_host_hides_no_deviation() -> None:
    for of, code in ((run(H), ExitCode.UNCLEAN), (run(U), ExitCode.UNCLEAN), (run(D), ExitCode.BROKEN)):
        assert msgspec.structs.replace(of, left="a cgroup").exit_code is code


@given(st.lists(st.lists(st.sampled_from(VERDICTS), max_size=5).map(lambda of: made(*of)), max_size=4))
def test_every_promise_that_counts_is_counted_once(runs: list[RunVerdict]) -> None:
    counted = tally(runs)
    kinds = [*Outcome, "accepted_broken", "accepted_unknown"]
    assert sum(getattr(counted, kind) for kind in kinds) == sum(len(run.verdicts) for run in runs)
    assert counted.accepted_broken == sum(v.outcome is D and bool(v.accepted) for run in runs for v in run.verdicts)


def test_more_skipped_or_unknown_than_may_be_is_a_failure() -> None:
    runs = [run(S, S), run(H, S), run(H, U, accepted="ny")]
    assert exit_code(runs) is ExitCode.KEPT
    assert exit_code(runs, Bounds(skipped=3, unknown=1)) is ExitCode.KEPT
    assert exit_code(runs, Bounds(skipped=2)) is ExitCode.UNKNOWN
    assert exit_code(runs, Bounds(unknown=0)) is ExitCode.UNKNOWN
    assert exit_code([run(S)], Bounds(skipped=0)) is ExitCode.UNKNOWN
    assert exit_code([run(D, S)], Bounds(skipped=0)) is ExitCode.BROKEN
    partly = Verdict(promise="P5", outcome=D, reason="", accepted="known", skips=("skipped:x",))
    only = msgspec.structs.replace(run(H), verdicts=(run(H).verdicts[0], partly))
    assert exit_code([only]) is ExitCode.KEPT
    assert exceeded([only], Bounds(skipped=0)) == ("1 promises skipped, as a whole or in part, --max-skipped is 0",)


def test_exit_code_of_several() -> None:
    assert exit_code([]) is ExitCode.UNKNOWN
    assert exit_code([run(H), run(S)]) is ExitCode.KEPT
    assert exit_code([run(S)]) is ExitCode.SKIPPED
    assert exit_code([run(H), run(U)]) is ExitCode.UNKNOWN
    assert exit_code([run(U), run(D)]) is ExitCode.BROKEN


def test_every_outcome_has_its_code() -> None:
    assert [outcome.exit_code for outcome in (H, D, U, S)] == [0, 1, 2, 4]
