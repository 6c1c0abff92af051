# SPDX-License-Identifier: Apache-2.0
"""The report for CI systems: JUnit XML, a test suite a run and a test case a promise.

    kept                    passes
    broken                  <failure type="broken">
    broken, accepted        <skipped>, which names the finding
    unknown                 <error type="unknown">: nothing was shown, which is no pass
    unknown, accepted       <skipped>, which says why it cannot be asked
    skipped                 <skipped>
    not listed              the same if it is kept or broken, otherwise <skipped>, which says so

Where more was skipped or unknown than --max-skipped or --max-unknown allow, a test case of its own is an <error>. What
counts is told in the <system-out> of each suite: how many promises ended how, and what else is to be noted.

Why accepted deviations are skipped and do not pass: there is no "expected failure" in this format, CI systems drop the
properties of a test case, and pytest reports its own expected failures this way.

The dialect is the common part of what Jenkins, GitLab and GitHub's actions read: https://github.com/testmoapp/junitxml
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from chaos.judge.findings import Finding
from chaos.judge.verdict import UNBOUNDED, Bounds, Outcome, Verdict, exceeded
from reports import sentences
from reports.run import Run
from reports.sentences import clean


def render(runs: Sequence[Run], known: Sequence[Finding] = (), bounds: Bounds = UNBOUNDED) -> str:
    """The runs as an XML document of ASCII alone, which is right in any locale, without a line end.

    `known` are the written findings to point out in deviations that were not accepted.
    """
    root = ET.Element("testsuites", name="sevchaos")
    suites = [_suite(run, known) for run in runs]
    if more := exceeded([run.verdict for run in runs], bounds):
        suites.append(_exceeded(more))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.extend(suites)
    ET.indent(root)
    document: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=True)
    return document.decode("ascii")


def _suite(run: Run, known: Sequence[Finding]) -> ET.Element:
    verdict = run.verdict
    suite = ET.Element("testsuite", name=sentences.title(verdict), time=f"{_seconds(run):.3f}")
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(run):
        ET.SubElement(properties, "property", name=name, value=clean(value))
    # A dot separates packages for most readers, and a kernel's version has dots.
    classname = f"linux-{verdict.kernel.replace('.', '_') or 'unknown'}.{verdict.experiment}"
    cases = [_case(clean(classname), judged, run, known) for judged in verdict.verdicts]
    cases = cases or [_nothing(clean(classname))]
    suite.extend(cases)
    suite.set("tests", str(len(cases)))
    _count(suite, cases)
    told = (f"records: {run.directory}", *(f"note: {note}" for note in verdict.notes))
    lines = (*told, f"the run: {sentences.result_of(verdict.exit_code, verdict.tally)}")
    ET.SubElement(suite, "system-out").text = "\n".join(map(clean, lines))
    return suite


def _count(suite: ET.Element, cases: Sequence[ET.Element]) -> None:
    for count, element in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(element) is not None for case in cases)))


def _exceeded(more: Sequence[str]) -> ET.Element:
    """A suite for what is said of all runs together."""
    suite = ET.Element("testsuite", name="all runs", time="0.000", tests="1")
    case = ET.SubElement(suite, "testcase", classname="sevchaos", name="how much may be skipped or unknown")
    ET.SubElement(case, "error", type="unknown", message="; ".join(more))
    _count(suite, [case])
    return suite


def _properties(run: Run) -> Iterator[tuple[str, str]]:
    verdict = run.verdict
    yield "kernel", verdict.kernel
    yield "host", verdict.host
    yield "seed", str(verdict.seed)
    yield "outcome", verdict.outcome
    yield "exit_code", str(int(verdict.exit_code))
    tally = verdict.tally
    for name in tally.__struct_fields__:
        yield f"promises_{name}", str(getattr(tally, name))
    if run.history.damage:
        yield "damage", run.history.damage


def _case(classname: str, judged: Verdict, run: Run, known: Sequence[Finding]) -> ET.Element:
    case = ET.Element("testcase", classname=classname, name=sentences.promise(judged))
    if judged.accepted:
        element = ET.SubElement(case, "skipped", message=sentences.accepted(judged))
    elif judged.outcome is Outcome.BROKEN:
        element = ET.SubElement(case, "failure", type="broken", message=clean(judged.reason))
    elif judged.outcome is not Outcome.KEPT and not judged.listed:
        element = ET.SubElement(case, "skipped", message=sentences.unlisted(judged))
    elif judged.outcome is Outcome.UNKNOWN:
        element = ET.SubElement(case, "error", type="unknown", message=clean(judged.reason))
    elif judged.outcome is Outcome.SKIPPED:
        element = ET.SubElement(case, "skipped", message=clean(judged.reason))
    else:
        return case
    element.text = "\n".join((clean(judged.reason), *sentences.details(judged, run.history, known)))
    return case


def _nothing(classname: str) -> ET.Element:
    """A suite without a test case would look like one that passed."""
    case = ET.Element("testcase", classname=classname, name="the run")
    ET.SubElement(case, "error", type="unknown", message="no promise was judged")
    return case


def _seconds(run: Run) -> float:
    """From the first record to the last, by the host's clock."""
    records = run.history.records
    return max(0.0, (records[-1].t - records[0].t) / 1e9) if records else 0.0
