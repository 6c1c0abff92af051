# SPDX-License-Identifier: Apache-2.0
"""known.yaml and the pages under docs/findings say the same."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

import experiments
from chaos.judge import findings
from chaos.judge.findings import Deviation, Finding
from chaos.judge.verdict import Outcome, Verdict
from chaos.linux.version import order

ROOT = Path(__file__).parents[3]
PAGES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "findings").glob("[0-9]*.md")}


def test_every_finding_has_its_page_and_every_page_its_finding() -> None:
    assert {finding.document for finding in findings.load()} == PAGES


@pytest.mark.parametrize("finding", findings.load(), ids=lambda finding: finding.id)
def test_the_page_says_what_the_finding_says(finding: Finding) -> None:
    text = (ROOT / finding.document).read_text()
    assert Path(finding.document).name.startswith(f"{finding.id}-")
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    assert heading == f"# Finding {finding.id}: {finding.title}"
    deviations = re.findall(r"^\| breaks \| (P\d+), `(.*)` \|$", text, re.MULTILINE)
    assert deviations == [(deviation.promise, deviation.signature) for deviation in finding.deviations]
    (kernels,) = re.findall(r"^\| kernels \| (.*) \|$", text, re.MULTILINE)
    assert kernels.split(", ") == [version for versions in finding.kernels.values() for version in versions.seen]
    (fixed,) = re.findall(r"^\| fixed in \| (.*) \|$", text, re.MULTILINE)
    mended = [versions.fixed for versions in finding.kernels.values() if versions.fixed]
    assert fixed == (", ".join(mended) or "no kernel yet")
    (shown,) = re.findall(r"^\| shown by \| (.*) \|$", text, re.MULTILINE)
    assert shown.split(", ") == [f"`{name}`" for name in finding.shown_by]


@pytest.mark.parametrize("finding", findings.load(), ids=lambda finding: finding.id)
def test_what_shows_a_finding_is_in_the_catalogue_and_lists_a_promise_that_it_breaks(finding: Finding) -> None:
    for name in finding.shown_by:
        listed = experiments.find(name).promises
        assert {deviation.promise for deviation in finding.deviations} & set(listed)


def two_at_once() -> Finding:
    """A finding that shows in two ways at once, in a promise."""
    deviation = Deviation(promise="P7", signature="one+two")
    return msgspec.structs.replace(findings.load()[0], deviations=(deviation,))


def seen_as(*deviations: str, listed: bool = True, more: tuple[str, ...] = ()) -> Verdict:
    return Verdict(
        promise="P7",
        outcome=Outcome.BROKEN,
        reason="so it is",
        signature="+".join(sorted((*deviations, *more))),
        deviations=deviations,
        listed=listed,
    )


def test_versions_are_put_in_order_and_what_is_none_comes_first() -> None:
    assert [order(kernel) for kernel in ("", "next", "6.12.117", "6.12", "6.12-rc3")] == [
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (6, 12, 117, 1),
        (6, 12, 0, 1),
        (6, 12, 0, 0),
    ]


def test_a_finding_is_elsewhere_only_where_it_is_not_here() -> None:
    finding = two_at_once()
    here = next(iter(finding.kernels.values())).first
    verdict = seen_as("one", "two")
    assert findings.matching(verdict, here, [finding]) is finding
    assert findings.elsewhere(verdict, here, [finding]) is None
    assert findings.matching(verdict, "2.6.32", [finding]) is None
    assert findings.elsewhere(verdict, "2.6.32", [finding]) is finding


def test_of_a_promise_that_is_not_listed_all_deviations_are_compared_and_nothing_else() -> None:
    finding = two_at_once()
    here = next(iter(finding.kernels.values())).first
    for listed, more, found in ((False, ("part-unknown",), True), (True, ("part-unknown",), False), (True, (), True)):
        verdict = seen_as("one", "two", listed=listed, more=more)
        assert (findings.matching(verdict, here, [finding]) is not None) is found
    assert findings.matching(seen_as("one", listed=False), here, [finding]) is None


def test_a_finding_is_seen_if_any_part_of_its_signature_is() -> None:
    finding = two_at_once()
    here, name = next(iter(finding.kernels.values())).first, finding.shown_by[0]
    assert findings.unseen(name, [seen_as("two")], here, [finding]) == []
    assert findings.unseen(name, [seen_as("two+three")], here, [finding]) == [], "in company"
    assert findings.unseen(name, [seen_as("three")], here, [finding]) == [finding]
