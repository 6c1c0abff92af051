# SPDX-License-Identifier: Apache-2.0
"""What counts for and against a run: every promise that is broken, and of the others those the experiment lists."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.errors import ExitCode
from chaos.experiment.model import Experiment
from chaos.history.records import Asked, Header, History, Record
from chaos.judge import findings
from chaos.judge.findings import Finding
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome, RunVerdict, Verdict
from chaos.promises import PROMISES
from tests.unit.core.build import ALL, changed, moved, moved_es, shipped

KNOWN = findings.load()
MOVE, ES = "move-across-cgroups", "move-across-cgroups-es"


def promising(*promises: str, name: str = MOVE) -> Experiment:
    return msgspec.structs.replace(shipped(name), promises=promises)


def of(verdict: RunVerdict, promise: str) -> Verdict:
    return next(judged for judged in verdict.verdicts if judged.promise == promise)


def on(kernel: str, history: History) -> History:
    def change(record: Record) -> Record:
        return msgspec.structs.replace(record, kernel=kernel) if isinstance(record, Header) else record

    return changed(history, change)


def lost_fd(kernel: str = "6.12.117") -> History:
    """Finding 0001, as the kernels show it, in P5."""
    return on(kernel, moved(status_error=errno.EBADF))


# -- every checker reads every run --------------------------------------------------------------------------


def test_a_deviation_of_a_promise_that_is_not_listed_counts() -> None:
    verdict = judge(promising("P1"), moved(status_error=errno.EINVAL))
    assert verdict.exit_code is ExitCode.BROKEN
    assert verdict.outcome is Outcome.BROKEN


@pytest.mark.parametrize("name", ALL)
def test_every_promise_is_judged_and_those_that_are_listed_say_so(name: str) -> None:
    verdict = judge(shipped(name), ALL[name]())
    assert {judged.promise for judged in verdict.verdicts} == PROMISES.keys()
    assert [judged.promise for judged in verdict.verdicts if judged.listed] == list(shipped(name).promises)


def test_what_is_not_listed_is_shown_and_counts_neither_for_nor_against_the_run() -> None:
    verdict = judge(promising("P1"), moved())
    assert of(verdict, "P10").outcome is Outcome.UNKNOWN and not of(verdict, "P10").listed
    assert (verdict.outcome, verdict.exit_code) == (Outcome.KEPT, ExitCode.KEPT)
    # P1 is kept, and was not to be: then nothing is.
    assert judge(promising("P10"), moved()).exit_code is ExitCode.UNKNOWN


def test_a_finding_excuses_a_deviation_that_is_not_listed_whatever_else_is_unknown_of_that_promise() -> None:
    def change(record: Record) -> Record | None:
        return None if type(record).__name__ == "Counted" else record

    history = changed(lost_fd(), change)
    alone = of(judge(promising("P1"), history, known=KNOWN), "P5")
    assert (alone.outcome, alone.accepted[:12], alone.listed) == (Outcome.BROKEN, "finding 0001", False)
    assert judge(promising("P1"), history, known=KNOWN).exit_code is ExitCode.KEPT
    assert judge(promising("P1"), history).exit_code is ExitCode.BROKEN
    assert judge(promising("P1", "P5"), history, known=KNOWN).exit_code is ExitCode.BROKEN  # there it has to be kept


# -- a finding has versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "code"),
    [
        ("6.12.117", ExitCode.KEPT),
        ("6.12.130", ExitCode.KEPT),  # nobody has said that it was mended
        ("6.12.94", ExitCode.BROKEN),  # older than the first on which it was seen
        ("6.12.95-rc1", ExitCode.BROKEN),
        ("6.12.96-rc1", ExitCode.KEPT),
        ("6.12", ExitCode.BROKEN),
        ("6.1.192", ExitCode.KEPT),
        ("6.6.117", ExitCode.BROKEN),
    ],
)
def test_a_finding_excuses_from_where_it_was_seen(kernel: str, code: ExitCode) -> None:
    assert judge(promising("P1", "P5"), lost_fd(kernel), known=KNOWN).exit_code is code


def mended(version: str) -> list[Finding]:
    one = KNOWN[0]
    kernels = {**one.kernels, "6.12": msgspec.structs.replace(one.kernels["6.12"], fixed=version)}
    return [msgspec.structs.replace(one, kernels=kernels), *KNOWN[1:]]


@pytest.mark.parametrize(
    ("kernel", "code"),
    [
        ("6.12.129", ExitCode.KEPT),
        ("6.12.130", ExitCode.BROKEN),
        ("6.12.131", ExitCode.BROKEN),
        ("6.1.200", ExitCode.KEPT),
    ],
)
def test_its_regression_is_not_excused(kernel: str, code: ExitCode) -> None:
    verdict = judge(promising("P1", "P5"), lost_fd(kernel), known=mended("6.12.130"))
    assert verdict.exit_code is code
    told = "finding 0001: the firmware's file descriptor is lost in the move, known, but not on this version"
    assert of(verdict, "P5").elsewhere == (told if code is ExitCode.BROKEN else "")


# -- one that is not seen any more --------------------------------------------------------------------------


def test_a_finding_that_is_not_seen_where_it_shows_is_told() -> None:
    (note,) = judge(shipped(MOVE), on("6.12.130", moved()), known=KNOWN).notes
    assert note == f"finding 0001 was not seen on 6.12.130 in {MOVE}, which shows it: fixed?"


@pytest.mark.parametrize(
    ("history", "name"),
    [
        (lost_fd("6.12.130"), MOVE),
        (on("6.12.94", moved()), MOVE),  # nobody said that it is there
        (on("6.6.117", moved()), MOVE),
        (changed(moved(), lambda r: None if isinstance(r, Asked) else r), "kill-source-in-move"),  # not shown by it
        (History(moved().records[:-1], "line 9 is damaged"), MOVE),  # a run that shows nothing
    ],
)
def test_nothing_is_told_of_others(history: History, name: str) -> None:
    assert judge(shipped(name), history, known=KNOWN).notes == ()


def test_nothing_is_told_to_who_does_not_accept_findings() -> None:
    assert judge(shipped(MOVE), on("6.12.130", moved())).notes == ()


# -- a signature says what was skipped ----------------------------------------------------------------------


def test_what_was_skipped_stands_in_the_signature() -> None:
    assert of(judge(shipped(ES), moved_es()), "P5").signature == "skipped:es-cannot-run"


# -- nothing kept -------------------------------------------------------------------------------------------


def test_nothing_kept_is_not_all_kept() -> None:
    """All that the experiment lists is broken as a written finding has it."""
    verdict = judge(promising("P5"), lost_fd(), known=KNOWN)
    assert of(verdict, "P5").accepted
    assert verdict.exit_code is ExitCode.UNKNOWN
