# SPDX-License-Identifier: Apache-2.0
"""known.yaml and the pages under docs/findings say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import experiments
from chaos.judge import findings
from chaos.judge.findings import Finding

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
