# SPDX-License-Identifier: Apache-2.0
"""Tables of outcomes: written and read the same, made from reports, and a run that is not as its table says is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import experiments
from chaos.controller import outcomes
from chaos.controller.outcomes import Expectation, OutcomeTable, PromiseOutcome, RunOutcome
from chaos.errors import InternalError, NoKernel, UsageError
from chaos.judge.findings import load as load_findings
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome
from chaos.lab.kernel.find import default_kernels, night_kernels
from chaos.promises import PROMISES
from reports import as_json
from reports.run import Run
from tests.nightly import catalogue, parts
from tests.nightly.__main__ import main
from tests.unit.core.build import moved, shipped

FIT, BROKEN, UNKNOWN, SKIPPED = tuple(Outcome)  # in the enumeration's own order, whatever its words
KERNEL = "6.12.117"
GOOD = {"P1": PromiseOutcome(FIT), "P4": PromiseOutcome(FIT), "P7": PromiseOutcome(FIT)}
LOST = {**GOOD, "P4": PromiseOutcome(BROKEN, "owner-died"), "P7": PromiseOutcome(BROKEN, "ok-for-EBADF")}
TABLE = OutcomeTable(
    KERNEL,
    {
        "crossed": Expectation((GOOD, LOST), "the guest is lost or not, as the moves meet"),
        "steady": Expectation((GOOD,)),
    },
)


def ran(name: str, way: outcomes.Way, *, kernel: str = KERNEL, explained: str = "P4 P7") -> RunOutcome:
    return RunOutcome(name, kernel, f"runs/{name}/1", way, frozenset(explained.split()))


def test_a_table_is_text_and_back() -> None:
    text = outcomes.write(TABLE)
    assert outcomes.parse(text) == TABLE
    assert text.splitlines()[:2] == [outcomes.SPDX, outcomes.HEAD]
    assert f"\ncrossed\n  chance: the guest is lost or not, as the moves meet\n  P1   {FIT.value}\n" in text
    assert f"  or\n  P1   {FIT.value}\n  P4   {BROKEN.value:<9} owner-died\n" in text
    assert all(line == line.rstrip() for line in text.splitlines())


ENTRIES = st.builds(PromiseOutcome, st.sampled_from(Outcome), st.from_regex(r"[a-z0-9:+_-]{0,20}", fullmatch=True))
WAYS = st.dictionaries(st.sampled_from(list(PROMISES)), ENTRIES, min_size=1)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{2,20}", fullmatch=True)
EXPECTATIONS = st.builds(
    lambda ways: Expectation(tuple(ways), "as it falls" if len(ways) > 1 else ""),
    st.lists(WAYS, min_size=1, max_size=3, unique_by=lambda way: str(sorted(map(str, way.items())))),
)


@given(st.dictionaries(NAMES, EXPECTATIONS, max_size=4))
def test_any_table_is_text_and_back(found: dict[str, Expectation]) -> None:
    table = OutcomeTable("6.1.192", found)
    assert outcomes.parse(outcomes.write(table)) == table


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected 'kernel x.y.z'"),
        ("steady\n  P1 {fit}\n", "expected 'kernel x.y.z'"),
        ("kernel 6.12\n", "expected 'kernel x.y.z'"),
        ("  P1 {fit}\n", ":1: 'P1 {fit}'|:1: '  P1"),
        ("kernel 6.1.1\nkernel 6.1.2\n", ":2: 'kernel 6.1.2'"),
        ("kernel 6.1.1\na\n  P15 {fit}\n", ":3: 'P15 {fit}': expected a promise"),
        ("kernel 6.1.1\na\n  P1\n", ":3: 'P1': expected a promise"),
        ("kernel 6.1.1\na\n  P1 {fit} x y\n", ":3: .*expected a promise"),
        ("kernel 6.1.1\na\n  P1 {fit}\n  P1 {fit}\n", ":4: .*once in each way"),
        ("kernel 6.1.1\na\n  P1 fine\n", ":3: 'P1 fine': expected one of {fit}, "),
        ("kernel 6.1.1\na\n", ":2: .*has no promise"),
        ("kernel 6.1.1\na\n  P1 {fit}\n  or\n", ":2: .*has no promise"),
        ("kernel 6.1.1\na\n  P1 {fit}\n  or\n  P1 {broken} x\n", ":2: .*has 2 ways and no 'chance:'"),
        ("kernel 6.1.1\na\n  chance: w\n  P1 {fit}\n  or\n  P1 {fit}\n", ":2: .*two ways .* are the same"),
        ("kernel 6.1.1\na\n  P1 {fit}\na\n  P1 {fit}\n", ":4: 'a': expected the name of an experiment, once"),
    ],
)
def test_what_is_no_table_is_refused(text: str, why: str) -> None:
    words = {"fit": FIT.value, "broken": BROKEN.value}
    with pytest.raises(InternalError, match=why.format(**words)):
        outcomes.parse(text.format(**words))


def test_a_table_is_made_from_the_reports_that_the_commands_print() -> None:
    experiment = shipped("move-across-cgroups")
    history = moved(status_error=9)
    run = Run(experiment, history, judge(experiment, history, known=load_findings()), Path("runs/here"))
    report = as_json.render([run]).encode()
    (read,) = outcomes.read_report(report)
    assert (read.experiment, read.kernel, read.directory) == (experiment.name, KERNEL, "runs/here")
    assert {(p, e.outcome, e.signature) for p, e in read.way.items()} == {
        (v.promise, v.outcome, v.signature) for v in run.verdict.verdicts if v.listed
    }
    assert any(not v.listed for v in run.verdict.verdicts), "what is not listed is not in the table"
    assert read.way["P5"] == PromiseOutcome(BROKEN, "guest_status-after-move:EBADF")
    assert read.explained == {"P5"}
    assert outcomes.make([read]).experiments == {experiment.name: Expectation((read.way,))}
    with pytest.raises(UsageError, match="no report of runs"):
        outcomes.read_report(b'{"runs": [{}]}')


def test_what_nothing_explains_does_not_become_expected() -> None:
    with pytest.raises(UsageError, match=r"no finding and no experiment explains crossed P7: "):
        outcomes.make([ran("crossed", LOST, explained="P4")], before=TABLE)
    unknown = {"P1": PromiseOutcome(UNKNOWN)}
    with pytest.raises(UsageError, match="explains steady P1: unknown"):
        outcomes.make([ran("steady", unknown)])
    assert outcomes.make([ran("steady", {"P1": PromiseOutcome(SKIPPED)})]).experiments


def test_what_comes_out_in_two_ways_needs_a_reason() -> None:
    runs = [ran("steady", GOOD), ran("steady", LOST)]
    with pytest.raises(UsageError, match=rf"steady came out in 2 ways on {KERNEL}: P4: .* or .*; P7: ") as refused:
        outcomes.make(runs, before=TABLE)
    assert "'chance: WHY' under its name" in refused.value.remedy
    with pytest.raises(UsageError, match="of 2"):
        outcomes.make([ran("steady", GOOD), ran("steady", GOOD, kernel="6.1.192")])
    with pytest.raises(UsageError, match="is damaged: it breaks off"):
        outcomes.make([replace(ran("steady", GOOD), damage="it breaks off")])


def test_ways_that_were_seen_earlier_stay_as_long_as_they_can_be() -> None:
    """On the same kernel, and if they are about the same promises; a reason also stays on another kernel."""
    made = outcomes.make([ran("crossed", GOOD)], before=TABLE)
    assert made.experiments["crossed"] == TABLE.experiments["crossed"]
    more = {**GOOD, "P9": PromiseOutcome(FIT)}
    made = outcomes.make([ran("crossed", more)], before=TABLE)
    assert made.experiments["crossed"] == Expectation((more,), TABLE.experiments["crossed"].chance)
    made = outcomes.make([ran("crossed", GOOD, kernel="6.12.118")], before=TABLE)
    assert made.experiments["crossed"] == Expectation((GOOD,), TABLE.experiments["crossed"].chance)


def compared(*runs: RunOutcome, names: str = "crossed steady", table: OutcomeTable = TABLE) -> list[str]:
    """What counts has a mark before it."""
    found = outcomes.compare(table, runs, names.split())
    return [f"{'!' * d.counts}{d.experiment} {d.promise}: {d.expected} -> {d.seen}" for d in found]


def test_runs_as_the_table_has_them_differ_in_nothing() -> None:
    assert compared(ran("crossed", GOOD), ran("steady", GOOD)) == []
    assert compared(ran("crossed", LOST), ran("steady", GOOD), ran("steady", GOOD)) == []


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ({**GOOD, "P1": PromiseOutcome(BROKEN, "x")}, f"!steady P1: {FIT.value} -> {BROKEN.value} x"),
        ({**GOOD, "P1": PromiseOutcome(UNKNOWN)}, f"!steady P1: {FIT.value} -> {UNKNOWN.value}"),
        ({**GOOD, "P1": PromiseOutcome(SKIPPED)}, f"!steady P1: {FIT.value} -> {SKIPPED.value}"),
        ({**GOOD, "P1": PromiseOutcome(FIT, "x")}, f"!steady P1: {FIT.value} -> {FIT.value} x"),
        ({p: e for p, e in GOOD.items() if p != "P1"}, f"!steady P1: {FIT.value} -> not judged"),
        ({**GOOD, "P9": PromiseOutcome(FIT)}, f"!steady P9: not judged -> {FIT.value}"),
    ],
)
def test_whatever_differs_on_the_tables_own_kernel_counts(way: outcomes.Way, told: str) -> None:
    """Also what a finding explains: then the table or the project is to change, and somebody has to say so."""
    assert compared(ran("crossed", GOOD), ran("steady", way, explained="P1")) == [told]


def test_better_than_expected_is_a_difference_too() -> None:
    table = OutcomeTable(KERNEL, {"steady": Expectation((LOST,))})
    found = compared(ran("steady", GOOD), names="steady", table=table)
    assert found == [
        f"!steady P4: {BROKEN.value} owner-died -> {FIT.value}",
        f"!steady P7: {BROKEN.value} ok-for-EBADF -> {FIT.value}",
    ]


def test_what_is_left_to_chance_is_left_to_its_ways_and_no_others() -> None:
    half = {**GOOD, "P4": LOST["P4"]}
    (told,) = compared(ran("crossed", half), ran("steady", GOOD))
    assert told.startswith(("!crossed P4: ", "!crossed P7: "))
    assert "or in another of its 2 ways" in told


def test_what_did_not_run_and_what_is_in_no_table_is_told() -> None:
    assert compared(ran("crossed", GOOD)) == ["!steady : a run -> not carried out"]
    new = compared(ran("crossed", GOOD), ran("steady", GOOD), ran("new", GOOD), names="crossed steady new")
    assert new == ["!new : an entry -> not in the table"]
    assert compared(names="crossed") == ["!crossed : a run -> not carried out"]


def test_on_a_newer_kernel_only_a_break_that_no_finding_explains_counts() -> None:
    newer = "6.12.140"
    better = ran("crossed", GOOD, kernel=newer)
    for entry, explained, mark in (
        (PromiseOutcome(BROKEN, "x"), "", "!"),
        (PromiseOutcome(BROKEN, "x"), "P1", ""),
        (PromiseOutcome(UNKNOWN), "", ""),
    ):
        run = ran("steady", {**GOOD, "P1": entry}, kernel=newer, explained=explained)
        assert compared(better, run) == [f"{mark}steady P1: {FIT.value} -> {entry}"]
    assert compared(better, names="steady crossed") == ["!steady : a run -> not carried out"]
    assert compared(ran("new", GOOD, kernel=newer), names="new") == ["!new : an entry -> not in the table"]


def test_a_difference_says_all_there_is_to_say() -> None:
    (difference,) = outcomes.compare(TABLE, [ran("steady", {**GOOD, "P1": PromiseOutcome(BROKEN, "x")})], ["steady"])
    assert str(difference) == (
        f"steady P1 on 6.12.117: {BROKEN.value} x, expected {FIT.value} (table of 6.12.117) (runs/steady/1); if the "
        "new outcome is right, `make outcomes` and say why in the commit; else mend what changed it"
    )


@pytest.mark.parametrize(
    ("kernel", "table"),
    [("6.12.117", "6.12.117"), ("6.12.118", "6.12.117"), ("6.12.9", "6.12.10"), ("6.1.200", "6.1.192")],
)
def test_which_table_fits_a_kernel(kernel: str, table: str) -> None:
    """Its own, or the newest older one of its series, or the oldest; and versions are numbers."""
    tables = [OutcomeTable(k, {}) for k in ("6.12.117", "6.12.10", "6.1.192", "6.12.20")]
    assert outcomes.fitting(tables, kernel).kernel == table


def test_a_series_without_a_table_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no table of outcomes is of the series of kernel 7\.2\.1"):
        outcomes.fitting(outcomes.load(), "7.2.1")


def test_the_committed_tables_are_as_they_would_be_written_and_of_the_whole_catalogue() -> None:
    tables = outcomes.load()
    assert {f"debian:{table.kernel.rpartition('.')[0]}" for table in tables} == {*night_kernels()}
    for table in tables:
        path = catalogue.TABLES / f"{table.kernel}{outcomes.SUFFIX}"
        assert path.read_text() == outcomes.write(table)
        assert set(table.experiments) == set(experiments.catalogue())


def test_the_committed_tables_are_of_what_each_experiment_promises() -> None:
    for table in outcomes.load():
        for name, expectation in table.experiments.items():
            for way in expectation.ways:
                assert set(way) == set(experiments.find(name).promises), (table.kernel, name)


def test_the_committed_tables_expect_no_break_without_a_finding() -> None:
    """And no unknown that its experiment does not state."""
    known = {(d.promise, d.signature) for finding in load_findings() for d in finding.deviations}
    for table in outcomes.load():
        for name, expectation in table.experiments.items():
            stated = {(p, unaskable.signature) for p, unaskable in experiments.find(name).unaskable.items()}
            for way in expectation.ways:
                for promise, entry in way.items():
                    if entry.outcome in (BROKEN, UNKNOWN):
                        reasons = known if entry.outcome is BROKEN else stated
                        assert (promise, entry.signature) in reasons, (table.kernel, name, promise, str(entry))


def accepted(run: RunOutcome, promise: str) -> str:
    return "for a reason" if promise in run.explained else ""


def report(*runs: RunOutcome) -> bytes:
    told = {
        "runs": [
            {
                "experiment": run.experiment,
                "kernel": run.kernel,
                "directory": run.directory,
                "damage": run.damage,
                "verdicts": [
                    {"promise": p, "outcome": e.outcome, "signature": e.signature, "accepted": accepted(run, p)}
                    for p, e in run.way.items()
                ],
            }
            for run in runs
        ]
    }
    return msgspec.json.encode(told)


def as_the_table_has_it() -> list[RunOutcome]:
    table = outcomes.fitting(outcomes.load(), KERNEL)
    promises = " ".join(PROMISES)
    return [
        ran(name, expectation.ways[0], kernel=table.kernel, explained=promises)
        for name, expectation in table.experiments.items()
    ]


def test_a_report_of_the_whole_catalogue_against_its_table() -> None:
    runs = as_the_table_has_it()
    assert catalogue.against_tables(report(*runs), whole=True) == []
    assert [d.seen for d in catalogue.against_tables(report(*runs[1:]), whole=True)] == ["not carried out"]
    assert catalogue.against_tables(report(*runs[1:]), whole=False) == []
    altered = replace(runs[0], way={**runs[0].way, "P1": PromiseOutcome(UNKNOWN)})
    assert [d.promise for d in catalogue.against_tables(report(altered), whole=False)] == ["P1"]
    assert catalogue.against_tables(report(replace(runs[0], experiment="of-my-own")), whole=False) == []


def test_tables_are_written_for_a_whole_catalogue_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "TABLES", tmp_path)
    runs = as_the_table_has_it()
    with pytest.raises(UsageError, match=f"no run of {runs[0].experiment} on {runs[0].kernel}"):
        catalogue.write_tables(runs[1:])
    (path,) = catalogue.write_tables(runs)
    (there,) = [table for table in outcomes.load() if table.kernel == runs[0].kernel]
    assert path.read_text() == outcomes.write(there)
    (path,) = catalogue.write_tables(runs[:1], whole=False)
    assert path.read_text() == outcomes.write(there)
    altered = replace(runs[0], way={**runs[0].way, "P1": PromiseOutcome(SKIPPED, "skipped:the-run")})
    catalogue.write_tables([altered], whole=False)
    changed = outcomes.parse(path.read_text(), path.name).experiments
    assert {name for name, of in there.experiments.items() if of != changed[name]} == {runs[0].experiment}


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., tuple[bool, list[str]]]:
    """Runs a part that passes or not, and gives whether it passed and what it said."""

    def run(passes: bool, identity: str, again: bool = False) -> tuple[bool, list[str]]:
        said: list[str] = []

        def carry_out(directory: Path, say: parts.Say) -> bool:
            say("carried out")
            return passes

        of_night = parts.NightlyPart("a:b", carry_out, lambda: identity)
        return parts.run(of_night, said.append, again=again, state=tmp_path), said

    return run


def test_a_part_that_passed_is_not_repeated_unless_asked_or_anything_changed(
    part: Callable[..., tuple[bool, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = (True, ["a:b: carried out"])
    assert part(True, "one") == carried
    passed, said = part(True, "one")
    assert passed and "passed before" in said[0]
    assert part(True, "one", again=True) == carried
    assert part(True, "another kernel") == carried
    assert part(False, "another kernel", again=True)[0] is False
    assert part(True, "another kernel") == carried, "what failed is repeated"
    monkeypatch.setattr(parts, "tree", lambda: "another-tree")
    assert part(True, "another kernel") == carried


def test_the_digest_of_the_tree_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    seen = {parts.tree(tmp_path)}
    for path, text in (("faults/a.py", "1"), ("faults/a.py", "2"), ("faults/b.txt", "2"), ("pyproject.toml", "x")):
        (tmp_path / path).write_text(text)
        seen.add(parts.tree(tmp_path))
    assert len(seen) == 5


def test_a_part_that_cannot_be_carried_out_has_not_passed_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[str] = []

    def run(part: parts.NightlyPart, say: parts.Say, *, again: bool) -> bool:
        carried.append(part.name)
        if len(carried) == 1:
            raise NoKernel("the archive does not answer")
        return True

    monkeypatch.setattr(parts, "run", run)
    done = CliRunner().invoke(main, ["run"])
    assert done.exit_code == 1
    assert carried == [part.name for part in parts.parts(night_kernels())]
    assert f"FAILED  {carried[0]}\npassed  {carried[1]}" in done.output


def test_the_makefile_names_the_kernels_that_are_tested() -> None:
    text, default = (parts.ROOT / "Makefile").read_text(), " ".join(default_kernels())
    assert f"\nkernels := {default}\n" in text
    at_night = " ".join(night_kernels()).replace(default, "$(kernels)")
    assert f"\nnightly outcomes: kernels := {at_night}\n" in text


def test_a_night_has_its_parts_on_every_kernel_and_the_mutants_of_the_judge() -> None:
    names = [part.name for part in parts.parts(("debian:6.1", "debian:6.12"))]
    of_kernels = ("catalogue", "lab", "jump-labels")
    every = [f"{part}-debian:{kernel}" for part in of_kernels for kernel in ("6.1", "6.12")]
    assert names == [*every, "mutation"]
