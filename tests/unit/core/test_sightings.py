# SPDX-License-Identifier: Apache-2.0
"""Whether a finding is seen on a kernel, and the table that says so."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from chaos.cli import findings_verb
from chaos.controller import campaign
from chaos.judge import findings, sightings
from chaos.judge.findings import Deviation, Finding, Versions
from chaos.judge.sightings import KernelSightings, Sighting, SightingOutcome
from chaos.judge.verdict import Outcome, RunVerdict, Verdict
from reports import sighting_table

FINDING = Finding(
    id="0001",
    title="one thing is another",
    document="docs/findings/0001.md",
    deviations=(Deviation(promise="P1", signature="one+two"), Deviation(promise="P9", signature="left")),
    kernels={"6.12": Versions(seen=("6.12.117",)), "6.1": Versions(seen=("6.1.170",), fixed="6.1.176")},
    shown_by=("move-across-cgroups",),
)


def test_what_is_written_is_told_by_version_in_the_order_of_versions() -> None:
    versions = [told.version for told in sightings.written(findings.load())]
    assert versions.index("6.1.192") < versions.index("6.12.95") < versions.index("6.12.117") < versions.index("7.3.4")


def verdict(promise: str, outcome: Outcome, *deviations: str, listed: bool = True) -> Verdict:
    return Verdict(
        promise=promise,
        outcome=outcome,
        reason=f"why {promise}",
        signature="+".join(deviations),
        deviations=deviations,
        listed=listed,
    )


def run_of(*verdicts: Verdict) -> RunVerdict:
    return RunVerdict(
        experiment="e", kernel="7.3.4", host="lab", seed=0, outcome=Outcome.KEPT, verdicts=verdicts
    )  # its own outcome plays no part


KEPT, BROKEN, UNKNOWN, SKIPPED = Outcome.KEPT, Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED


@pytest.mark.parametrize(
    ("verdicts", "seen", "reason"),
    [
        ([verdict("P1", BROKEN, "one"), verdict("P9", KEPT)], SightingOutcome.SEEN, "P1 broken: one"),
        ([verdict("P1", UNKNOWN), verdict("P9", BROKEN, "left", "more")], SightingOutcome.SEEN, "P9 broken: left+more"),
        ([verdict("P9", BROKEN, "left", listed=False), verdict("P1", KEPT)], SightingOutcome.SEEN, "P9 broken: left"),
        ([verdict("P1", KEPT), verdict("P9", KEPT)], SightingOutcome.NOT_SEEN, "P1 kept: why P1; P9 kept: why P9"),
        ([verdict("P1", KEPT), verdict("P9", UNKNOWN, listed=False)], SightingOutcome.NOT_SEEN, "P1 kept: why P1"),
        ([verdict("P1", KEPT), verdict("P4", BROKEN, "one")], SightingOutcome.NOT_SEEN, "P1 kept: why P1"),
        ([verdict("P1", KEPT), verdict("P9", UNKNOWN)], SightingOutcome.UNKNOWN, "P9 unknown: why P9"),
        ([verdict("P1", BROKEN, "three"), verdict("P9", KEPT)], SightingOutcome.UNKNOWN, "P1 broken: three"),
        (
            [verdict("P1", BROKEN, "three", listed=False), verdict("P9", KEPT)],
            SightingOutcome.UNKNOWN,
            "P1 broken: three",
        ),
        ([verdict("P1", KEPT), verdict("P9", SKIPPED)], SightingOutcome.UNKNOWN, "P9 skipped: why P9"),
        (
            [verdict("P1", SKIPPED), verdict("P9", SKIPPED)],
            SightingOutcome.SKIPPED,
            "P1 skipped: why P1; P9 skipped: why P9",
        ),
        ([verdict("P4", KEPT)], SightingOutcome.UNKNOWN, ""),
        ([], SightingOutcome.UNKNOWN, ""),
    ],
)
def test_what_a_run_says_of_a_finding(verdicts: list[Verdict], seen: SightingOutcome, reason: str) -> None:
    assert sightings.sighting(FINDING, run_of(*verdicts), [FINDING]) == Sighting(FINDING, seen, reason)


def test_what_is_another_finding_by_itself_does_not_show_one_that_comes_with_it() -> None:
    company = (Deviation(promise="P5", signature="cut-off"),)
    both = (Deviation(promise="P5", signature="cut-off+stopped"),)
    first = msgspec.structs.replace(FINDING, id="0002", deviations=company)
    second = msgspec.structs.replace(FINDING, id="0003", deviations=both)
    seen, absent, unknown = SightingOutcome.SEEN, SightingOutcome.NOT_SEEN, SightingOutcome.UNKNOWN
    for signatures, told in (
        (("cut-off",), [seen, absent]),
        (("cut-off", "stopped"), [seen, seen]),
        (("cut-off", "as-nobody-has-seen"), [seen, unknown]),
    ):
        run = run_of(verdict("P5", BROKEN, *signatures))
        assert [sightings.sighting(one, run, [first, second]).seen for one in (first, second)] == told


def test_what_is_written_is_of_exact_versions_and_silent_about_others() -> None:
    other = msgspec.structs.replace(FINDING, id="0002", kernels={"6.1": Versions(seen=("6.1.192",))})
    assert sightings.written([FINDING, other]) == [
        KernelSightings("", "6.1.170", (Sighting(FINDING, SightingOutcome.SEEN),)),
        KernelSightings("", "6.1.176", (Sighting(FINDING, SightingOutcome.NOT_SEEN, "fixed"),)),
        KernelSightings(
            "", "6.1.192", (Sighting(FINDING, SightingOutcome.NOT_SEEN, "fixed"), Sighting(other, SightingOutcome.SEEN))
        ),
        KernelSightings("", "6.12.117", (Sighting(FINDING, SightingOutcome.SEEN),)),
    ]


def shown(columns: list[KernelSightings], *, looked: bool = True) -> list[str]:
    stream = StringIO()
    sighting_table.show([FINDING], columns, looked=looked, file=stream)
    return stream.getvalue().splitlines()


def test_the_table_has_a_row_a_finding_and_a_column_a_kernel_and_the_reasons_below() -> None:
    columns = [
        KernelSightings("debian:7.3", "7.3.4", (Sighting(FINDING, SightingOutcome.SEEN, "P1 broken: one"),)),
        KernelSightings("~/src/linux", "", (Sighting(FINDING, SightingOutcome.UNKNOWN, "P1 unknown: it panicked"),)),
    ]
    told = shown(columns)
    assert told[0].split() == ["debian:7.3", "~/src/linux"]
    assert told[1].split() == ["finding", "7.3.4", "no", "version"]
    assert told[3].split() == ["0001", "one", "thing", "is", "another", "seen", "unknown"]
    assert told[-1] == "0001 on ~/src/linux: unknown: P1 unknown: it panicked"
    assert not any("P1 broken" in line for line in told)


def test_what_is_fixed_is_told_as_fixed() -> None:
    told = shown(
        [KernelSightings("", "6.1.176", (Sighting(FINDING, SightingOutcome.NOT_SEEN, "fixed"),))], looked=False
    )
    assert told[2].split()[-1] == "fixed"
    assert "nobody has looked" in told[-1]


def test_the_verb_tells_what_is_written_without_starting_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "carry_out_all", None)  # what would start a lab
    done = CliRunner().invoke(findings_verb.findings_, ["--json"], standalone_mode=False)
    data = msgspec.json.decode(done.stdout)
    assert (done.return_value, [finding["id"] for finding in data["findings"]]) == (0, [f.id for f in findings.load()])
    seen = {(kernel["version"], s["finding"]) for kernel in data["kernels"] for s in kernel["sightings"]}
    assert {(v, f.id) for f in findings.load() for of in f.kernels.values() for v in of.seen} <= seen


@pytest.mark.parametrize(("outcome", "code"), [(KEPT, 0), (BROKEN, 2), (UNKNOWN, 2), (SKIPPED, 0)])
def test_the_verb_asks_one_run_of_each_finding_and_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Outcome, code: int
) -> None:
    """Exit code 2 only where nobody can say: here also what is broken, since it is broken as no finding says."""
    asked: list[tuple[str, str]] = []

    async def pretend(planned: Any, _jobs: int, _campaign: Any, _tell: Any) -> list[Any]:
        asked.extend((run.host.describe().kernel_source, run.experiment.name) for run in planned)
        return [pretended(run.experiment, outcome) for run in planned]

    monkeypatch.setattr(campaign, "carry_out_all", pretend)
    monkeypatch.setattr("chaos.controller.lab_host.LabHost._memory", 1 << 30)
    monkeypatch.setattr("chaos.lab.qemu.find_qemu", lambda: SimpleNamespace(version=(10, 0, 2)))
    options = ["--kernel", "debian:6.1", "--kernel", "debian:7.3", "--runs", str(tmp_path), "--json"]
    done = CliRunner().invoke(findings_verb.findings_, options, standalone_mode=False)
    shown_by = list(dict.fromkeys(f.shown_by[0] for f in findings.load()))
    assert asked == [(kernel, name) for kernel in ("debian:6.1", "debian:7.3") for name in shown_by]
    kernels = msgspec.json.decode(done.stdout)["kernels"]
    assert [(k["kernel"], k["version"], len(k["sightings"])) for k in kernels] == [
        ("debian:6.1", "7.3.4", len(findings.load())),
        ("debian:7.3", "7.3.4", len(findings.load())),
    ]
    assert done.return_value == code


def pretended(experiment: Any, outcome: Outcome) -> Any:
    signatures = ("as-nobody-has-seen",) if outcome is BROKEN else ()
    verdicts = [verdict(promise, outcome, *signatures) for promise in experiment.promises]
    return SimpleNamespace(experiment=experiment, verdict=run_of(*verdicts))
