# SPDX-License-Identifier: Apache-2.0
"""JUnit and KTAP, read back by parsers as strict as their formats."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.errors import ExitCode
from chaos.history.records import History
from chaos.judge import findings
from chaos.judge.verdict import Bounds, Outcome, RunVerdict, Verdict, worst
from chaos.promises import PROMISES
from reports import as_json, junit, ktap, text
from reports.run import Run
from tests.unit.core.build import ALL, moved, shipped
from tests.unit.core.test_reports import KNOWN, run

NAME = "move-across-cgroups"
EVIL = "\x1b[31m]]>&<\"'\n # SKIP ok 1\x00\ud800\ufffe\u2028 é #"


def made_of(*verdicts: Verdict, kernel: str = "6.12.117", directory: str = "runs/x") -> Run:
    outcome = worst(verdict.outcome for verdict in verdicts if verdict.counts)
    verdict = RunVerdict(experiment=NAME, kernel=kernel, host="lab", seed=7, outcome=outcome, verdicts=verdicts)
    return Run(shipped(NAME), History(()), verdict, Path(directory))


def judged(outcome: Outcome, *, accepted: str = "", reason: str = "why", promise: str = "P4") -> Verdict:
    return Verdict(promise=promise, outcome=outcome, reason=reason, accepted=accepted, records=(1, 2), signature="s")


KINDS = [
    judged(Outcome.KEPT),
    judged(Outcome.BROKEN),
    judged(Outcome.BROKEN, accepted="finding 0001: lost"),
    judged(Outcome.UNKNOWN),
    judged(Outcome.UNKNOWN, accepted="not askable here: dead"),
    judged(Outcome.SKIPPED),
]
OTHERS = [msgspec.structs.replace(judged(outcome, promise="P2"), listed=False) for outcome in Outcome]

# -- JUnit ----------------------------------------------------------------------------------------------------

# element → (attributes it must have, attributes it may have, elements it may contain in this order)
SCHEMA: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": ({"name", "tests", "failures", "errors", "skipped"}, set(), ["testsuite"]),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time"},
        set(),
        ["properties", "testcase", "system-out"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname"}, set(), ["skipped", "error", "failure"]),
    "skipped": ({"message"}, set(), []),
    "error": ({"message", "type"}, set(), []),
    "failure": ({"message", "type"}, set(), []),
    "system-out": (set(), set(), []),
}


def check(element: ET.Element) -> None:
    must, may, children = SCHEMA[element.tag]
    assert must <= set(element.attrib) <= must | may
    order = [children.index(child.tag) for child in element]
    assert order == sorted(order)
    if element.tag == "testcase":
        assert len(element) <= 1
    if element.tag in ("testsuites", "testsuite"):
        cases = list(element.iter("testcase"))
        assert int(element.attrib["tests"]) == len(cases) > 0 or element.tag == "testsuites"
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(element.attrib[count]) == sum(case.find(tag) is not None for case in cases)
    for child in element:
        check(child)


def parsed(*runs: Run) -> ET.Element:
    document = junit.render(runs, KNOWN)
    assert document.isascii()
    root = ET.fromstring(document)
    assert root.tag == "testsuites"
    check(root)
    return root


def child_of(case: ET.Element) -> ET.Element:
    (only,) = case
    return only


@pytest.mark.parametrize("name", ALL)
def test_junit_of_the_shipped_experiments(name: str) -> None:
    root = parsed(run(ALL[name](), name, accept=True), run(ALL[name](), name))
    suite = root[0]
    assert suite.attrib["name"] == f"{name} on 6.12.117 (lab)"
    assert 0 < float(suite.attrib["time"]) < 1
    cases = suite.findall("testcase")
    assert {case.attrib["classname"] for case in cases} == {f"linux-6_12_117.{name}"}
    listed = list(shipped(name).promises)
    assert [case.attrib["name"].split()[0] for case in cases][: len(listed)] == listed
    assert {case.attrib["name"].split()[0] for case in cases} == PROMISES.keys()
    assert "; exit code 0" in (suite.findtext("system-out") or "").splitlines()[-1]
    properties = {item.attrib["name"]: item.attrib["value"] for item in suite.iter("property")}
    assert properties["seed"] == "7"
    assert properties["exit_code"] == "0"


def test_junit_tells_every_outcome_from_a_pass() -> None:
    root = parsed(made_of(*KINDS))
    _, deviated, known, unknown, unaskable, skipped = root[0].findall("testcase")
    assert len(root[0].findall("testcase")[0]) == 0
    assert (child_of(deviated).tag, child_of(deviated).attrib) == ("failure", {"type": "broken", "message": "why"})
    assert "signature: s" in (child_of(deviated).text or "")
    assert child_of(known).tag == "skipped"
    assert child_of(known).attrib["message"].startswith("broken (known: finding 0001: lost)")
    assert (child_of(known).text or "").startswith("why\n")
    assert (child_of(unknown).tag, child_of(unknown).attrib) == ("error", {"type": "unknown", "message": "why"})
    assert child_of(unaskable).attrib["message"].startswith("unknown (not askable here: dead)")
    assert (child_of(skipped).tag, child_of(skipped).attrib) == ("skipped", {"message": "why"})
    assert {key: root.attrib[key] for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6", "failures": "1", "errors": "1", "skipped": "3"
    }  # fmt: skip


def test_junit_points_out_a_written_finding() -> None:
    (failure,) = parsed(run(moved(status_error=errno.EBADF), NAME)).iter("failure")
    assert "this is finding 0001" in (failure.text or "")
    skipped = parsed(run(moved(status_error=errno.EBADF), NAME, accept=True)).iter("skipped")
    assert "finding 0001" in next(skipped).attrib["message"]


def test_junit_of_a_run_without_promises_is_no_pass() -> None:
    assert [error.attrib["message"] for error in parsed(made_of()).iter("error")] == ["no promise was judged"]


def test_junit_of_a_damaged_history() -> None:
    root = parsed(run(History((), "it is empty"), NAME))
    listed = len(shipped(NAME).promises)
    assert [case[0].tag for case in root.iter("testcase")] == ["error"] * listed + ["skipped"] * (
        len(PROMISES) - listed
    )
    assert ("damage", "it is empty") in {(p.attrib["name"], p.attrib["value"]) for p in root.iter("property")}
    assert parsed().attrib["tests"] == "0"


# -- KTAP -----------------------------------------------------------------------------------------------------


@dataclass
class Parsed:
    """`kind` as kselftest counts it."""

    kind: str
    description: str
    diagnostic: str
    subtests: list[Parsed]
    comments: list[str]


# As tools/testing/kunit/kunit_parser.py reads it: a description has no number sign.
RESULT = re.compile(r"(ok|not ok) ([0-9]+)(?: ([^#]*?))?(?: # (?:(SKIP|TODO|XFAIL|TIMEOUT|ERROR)(?: |$))?(.*))?")


def read_ktap(told: str) -> list[Parsed]:
    lines = told.split("\n")
    tests = level_of(lines, 0)
    assert not lines
    return tests


def level_of(lines: list[str], depth: int) -> list[Parsed]:
    """The tests of one level; takes the lines that it has read."""
    indent = "  " * depth
    assert lines.pop(0) == f"{indent}KTAP version 1"
    plan = re.fullmatch(rf"{indent}1\.\.([0-9]+)", lines.pop(0))
    assert plan
    tests: list[Parsed] = []
    comments: list[str] = []
    subtests: list[Parsed] = []
    while lines and lines[0].startswith(indent):
        line = lines[0].removeprefix(indent)
        if line == "  KTAP version 1":
            subtests = level_of(lines, depth + 1)
            continue
        lines.pop(0)
        if line.startswith("#"):
            comments.append(line)
            continue
        found = RESULT.fullmatch(line)
        assert found, line
        assert int(found[2]) == len(tests) + 1
        tests.append(Parsed(kind_of(found), found[3], found[5] or "", subtests, comments))
        comments, subtests = [], []
    assert len(tests) == int(plan[1])
    return tests


def kind_of(found: re.Match[str]) -> str:
    well, directive = found[1] == "ok", found[4]
    if directive == "ERROR":
        assert not well
    if directive in ("SKIP", "XFAIL"):
        assert well
    if directive is None:
        return "pass" if well else "fail"
    return directive.lower()


def ktap_of(*runs: Run) -> list[Parsed]:
    return read_ktap(ktap.render(runs, KNOWN))


@pytest.mark.parametrize("name", ALL)
def test_ktap_of_the_shipped_experiments(name: str) -> None:
    accepting, strict = ktap_of(run(ALL[name](), name, accept=True), run(ALL[name](), name))
    assert accepting.description == f"{name} on 6.12.117 (lab)"
    listed = list(shipped(name).promises)
    assert [test.description.split()[0] for test in accepting.subtests][: len(listed)] == listed
    assert {test.description.split()[0] for test in accepting.subtests} == PROMISES.keys()
    assert accepting.kind == "pass"
    assert strict.kind == ("fail" if name == "kill-source-in-move" else "pass")


def test_ktap_tells_every_outcome_from_a_pass() -> None:
    (test,) = ktap_of(made_of(*KINDS))
    assert [sub.kind for sub in test.subtests] == ["pass", "fail", "xfail", "error", "skip", "skip"]
    assert test.subtests[2].diagnostic.startswith("broken (known: finding 0001: lost)")
    assert test.subtests[3].diagnostic == "why"
    assert test.subtests[0].description == f"P4 {PROMISES['P4']}"
    assert "# P4: expected: ; seen: ; signature: s" in test.subtests[1].comments
    assert test.kind == "fail"
    assert "# Totals: pass:1 fail:1 xfail:1 xpass:0 skip:2 error:1" in ktap.render([made_of(*KINDS)])


@pytest.mark.parametrize(
    ("verdicts", "kind"),
    [
        ([0], "pass"),
        ([0, 5], "pass"),
        ([0, 4], "pass"),
        ([0, 2], "xfail"),
        ([2, 3], "fail"),
        ([3], "fail"),
        ([5, 4], "error"),  # nothing was kept, and not all was skipped
        ([2], "error"),
        ([0, 6], "pass"),
        ([0, 7], "fail"),
        ([6], "error"),
        ([5], "skip"),
        ([], "error"),
    ],
)
def test_a_run_in_ktap_is_what_its_promises_are(verdicts: list[int], kind: str) -> None:
    (test,) = ktap_of(made_of(*([*KINDS, OTHERS[2], OTHERS[1]][number] for number in verdicts)))
    assert test.kind == kind


@given(st.lists(st.sampled_from([*KINDS, *OTHERS])))
def test_a_run_in_ktap_is_ok_exactly_if_its_exit_code_is(verdicts: list[Verdict]) -> None:
    only = made_of(*verdicts)
    well = only.verdict.exit_code in (ExitCode.KEPT, ExitCode.SKIPPED)
    assert (ktap_of(only)[0].kind in ("pass", "xfail", "skip")) == well


def test_ktap_points_out_a_written_finding() -> None:
    (test,) = ktap_of(run(moved(status_error=errno.EBADF), NAME))
    kinds = {sub.description.split()[0]: sub.kind for sub in test.subtests}
    assert Counter(kinds[promise] for promise in shipped(NAME).promises) == {"pass": 6, "fail": 1}
    assert set(kinds.values()) == {"pass", "fail", "skip"}
    (failed,) = (sub for sub in test.subtests if sub.kind == "fail")
    assert any("this is finding 0001" in comment for comment in failed.comments)
    (test,) = ktap_of(run(moved(status_error=errno.EBADF), NAME, accept=True))
    assert test.kind == "xfail"
    assert test.diagnostic == "1 known deviation"
    assert ktap_of() == []


def test_what_is_not_listed_fails_no_ci_unless_it_is_broken() -> None:
    harmless = made_of(KINDS[0], *(other for other in OTHERS if other.outcome is not Outcome.BROKEN))
    (test,) = ktap_of(harmless)
    assert [sub.kind for sub in test.subtests] == ["pass", "pass", "skip", "skip"]
    assert test.kind == "pass"
    assert test.subtests[2].diagnostic == "unknown (not put to the test), not counted"
    root = parsed(harmless)
    assert (root.attrib["failures"], root.attrib["errors"], root.attrib["skipped"]) == ("0", "0", "2")
    assert parsed(made_of(KINDS[0], OTHERS[1])).attrib["failures"] == "1"


def test_more_skipped_than_may_be_fails_a_ci() -> None:
    only, bounds = made_of(KINDS[0], KINDS[5]), Bounds(skipped=0)
    passed, failed = read_ktap(ktap.render([only], KNOWN, bounds))
    assert (passed.kind, failed.kind) == ("pass", "error")
    root = ET.fromstring(junit.render([only], KNOWN, bounds))
    check(root)
    assert root.attrib["errors"] == "1"
    assert json.loads(as_json.render([only], bounds))["exit_code"] == 2
    assert "exit code 2" in text.render([only], bounds=bounds).splitlines()[-1]


def test_the_last_line_says_how_many_ended_how() -> None:
    one = made_of(*KINDS[:3], *KINDS[4:])
    said = "broken; 1 kept, 1 broken, 1 skipped, 1 broken as known, 1 unknown as stated; exit code 1"
    assert ktap.render([one]).splitlines()[-1] == f"# all runs: {said}"
    assert text.render([one]).splitlines()[-1] == f"the run: {said}"
    assert (parsed(one)[0].findtext("system-out") or "").splitlines()[-1] == f"the run: {said}"
    told = json.loads(as_json.render([one, one]))
    assert told["counts"] == {key: 2 * number for key, number in told["runs"][0]["counts"].items()}
    assert told["counts"]["accepted_broken"] == told["counts"]["accepted_unknown"] == 2
    assert text.render([made_of(KINDS[0])]).splitlines()[-1] == "the run: all kept; 1 kept; exit code 0"
    accepted = text.render([made_of(KINDS[0], KINDS[2])]).splitlines()[-1]
    assert accepted == "the run: nothing counted against it; 1 kept, 1 broken as known; exit code 0"


def test_a_note_is_told_and_fails_nothing() -> None:
    noted = made_of(KINDS[0])
    noted = dataclasses.replace(noted, verdict=msgspec.structs.replace(noted.verdict, notes=("fixed?",)))
    assert ktap_of(noted)[0].kind == "pass" and "  # note: fixed?" in ktap.render([noted]).splitlines()
    assert "note: fixed?" in (parsed(noted)[0].findtext("system-out") or "")
    assert json.loads(as_json.render([noted]))["runs"][0]["notes"] == ["fixed?"]
    assert "note: fixed?" in text.render([noted])
    assert "note: fixed? (20 runs)" in text.render([noted] * 20)


# -- both -----------------------------------------------------------------------------------------------------


texts = st.sampled_from([EVIL, "", "[#1] # SKIP", "# XFAIL", " not ok 1", "ok 1"]) | st.text(max_size=30)


@given(texts, texts, st.sampled_from(KINDS), st.sampled_from(["6.12.117", EVIL, ""]))
def test_no_text_can_change_an_outcome(reason: str, other: str, kind: Verdict, kernel: str) -> None:
    accepted = f"finding {other}" if kind.accepted else ""
    evil = msgspec.structs.replace(
        kind, reason=reason, expected=other, seen=other, signature=other, accepted=accepted, promise=f"P{other}"
    )
    plain, only = made_of(kind), made_of(evil, kernel=kernel, directory=f"runs/{EVIL}")
    (test,), (expected,) = ktap_of(only), ktap_of(plain)
    assert [sub.kind for sub in test.subtests] == [sub.kind for sub in expected.subtests]
    assert test.kind == expected.kind
    shape = [[child.tag for child in case] for case in parsed(only).iter("testcase")]
    assert shape == [[child.tag for child in case] for case in parsed(plain).iter("testcase")]


def test_what_is_legible_of_a_text_stays() -> None:
    (test,) = ktap_of(made_of(judged(Outcome.UNKNOWN, reason="Oops: 0002 [#1] PREEMPT é")))
    assert test.subtests[0].diagnostic == "Oops: 0002 [1] PREEMPT é"
    assert "# P4: unknown: Oops: 0002 [#1] PREEMPT é" in test.subtests[0].comments
    (error,) = parsed(made_of(judged(Outcome.UNKNOWN, reason="<b>&\"' é\x07"))).iter("error")
    assert error.attrib["message"] == "<b>&\"' é�"


def test_the_findings_are_those_that_are_given() -> None:
    one = run(moved(status_error=errno.EBADF), NAME)
    assert "this is finding" not in junit.render([one])
    assert "this is finding" not in ktap.render([one])
    assert findings.load() == KNOWN
