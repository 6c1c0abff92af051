# SPDX-License-Identifier: Apache-2.0
"""Runs that an earlier version stored (6f20727, on Debian's 6.12.117) are judged by this one.

What their records lack for a question that is asked today is unknown, with that reason; it is never what they say.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from chaos.cli.check_verb import check_
from chaos.errors import ExitCode, UsageError
from chaos.history.records import FORMAT

STORED = Path(__file__).parents[1] / "data" / "runs-6f20727"
RUNS = sorted(STORED.glob("*/*"))
KEPT = ("held", "kept")  # the word was changed after they were stored


class Judged(msgspec.Struct):
    promise: str
    outcome: str


class ToldRun(msgspec.Struct):
    experiment: str
    damage: str
    verdicts: tuple[Judged, ...]

    def outcomes(self) -> dict[str, str]:
        return {verdict.promise: verdict.outcome for verdict in self.verdicts}


class Report(msgspec.Struct):
    runs: tuple[ToldRun, ...]


class Stored(msgspec.Struct):
    experiment: str
    verdicts: tuple[Judged, ...]


def check(*paths: Path) -> Result:
    return CliRunner().invoke(check_, ["--json", *map(str, paths)], standalone_mode=False)


def judged(directory: Path) -> ToldRun:
    done = check(directory)
    assert done.exception is None, done.exception
    (run,) = msgspec.json.decode(done.stdout, type=Report).runs
    return run


def newly_kept(stored: Sequence[Judged], now: dict[str, str]) -> set[str]:
    """Promises that are kept today, and that were judged then to be anything else."""
    return {was.promise for was in stored if was.outcome not in KEPT and now.get(was.promise) in KEPT}


def test_there_are_stored_runs() -> None:
    assert {run.parent.name for run in RUNS} == {"kill-destination-in-move", "move-across-cgroups"}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
def test_a_stored_run_is_judged_and_nothing_becomes_kept(run: Path) -> None:
    stored = msgspec.json.decode((run / "verdict.json").read_bytes(), type=Stored)
    now = judged(run)
    assert (now.experiment, now.damage) == (stored.experiment, "")
    outcomes = now.outcomes()
    assert {was.promise for was in stored.verdicts} <= set(outcomes), "a promise it was stored with has no outcome"
    assert newly_kept(stored.verdicts, outcomes) == set()
    deviated = {was.promise for was in stored.verdicts if was.outcome == "deviated"}
    assert not {promise for promise in deviated if outcomes[promise] == "skipped"}


def test_the_comparison_sees_a_promise_that_became_kept() -> None:
    was = [Judged("P1", "unknown"), Judged("P5", "deviated"), Judged("P9", "held")]
    assert newly_kept(was, {"P1": "held", "P5": "kept", "P9": "held"}) == {"P1", "P5"}
    assert newly_kept(was, {"P1": "unknown", "P5": "broken", "P9": "unknown"}) == set()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
def test_without_its_records_nothing_of_a_stored_run_is_kept(run: Path, tmp_path: Path) -> None:
    """It is the records that are judged, and not the verdict that lies beside them."""
    cut = Path(shutil.copytree(run, tmp_path / "cut"))
    (cut / "history.jsonl").write_bytes((run / "history.jsonl").read_bytes().split(b"\n")[0] + b"\n")
    assert not set(judged(cut).outcomes().values()) & set(KEPT)


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1])
def test_another_format_is_refused_in_one_line(number: int, tmp_path: Path) -> None:
    other = Path(shutil.copytree(RUNS[0], tmp_path / "other"))
    history = other / "history.jsonl"
    history.write_bytes(history.read_bytes().replace(b'"format":%d' % FORMAT, b'"format":%d' % number, 1))
    done = check(other)
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code is ExitCode.USAGE
    assert done.exception.message == f"{other} has a history of format {number}, this version reads {FORMAT}"
    assert done.stdout == ""


def test_stored_runs_name_nothing_of_the_machine_that_made_them() -> None:
    for path in (path for path in STORED.rglob("*") if path.is_file()):
        text = path.read_text()
        assert not any(place in text for place in ("/home", "/root", "/tmp", "/work", "/usr", "/var")), path
