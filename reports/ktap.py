# SPDX-License-Identifier: Apache-2.0
"""The report for kernel people: KTAP version 1, a test a run and a subtest a promise.

    kept                    ok
    broken                  not ok
    broken, accepted        ok ... # XFAIL and the finding, as kselftest's ksft_test_result_xfail() has it
    unknown                 not ok ... # ERROR and the reason
    unknown, accepted       ok ... # SKIP and why it cannot be asked
    skipped                 ok ... # SKIP and the reason
    not listed              the same if it is kept or broken, otherwise ok ... # SKIP, which says so

A run is ok if nothing in it counts against it: exactly if its own exit code is 0 or 4. What a verdict rests on stands
in diagnostic lines before its result. In a result line a number sign begins a directive, so texts lose theirs there,
and stand in full before it. Where more was skipped or unknown than --max-skipped or --max-unknown allow, a last test is
not ok. The last line says of all promises that count how many ended how.

https://docs.kernel.org/dev-tools/ktap.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from chaos.errors import ExitCode
from chaos.judge.findings import Finding
from chaos.judge.verdict import UNBOUNDED, Bounds, Outcome, Verdict, exceeded, exit_code, tally
from reports import sentences
from reports.run import Run
from reports.sentences import clean

VERSION = "KTAP version 1"


def render(runs: Sequence[Run], known: Sequence[Finding] = (), bounds: Bounds = UNBOUNDED) -> str:
    """The runs as KTAP, without a line end.

    `known` are the written findings to point out at deviations that were not accepted.
    """
    verdicts = [run.verdict for run in runs]
    more = exceeded(verdicts, bounds)
    lines = [VERSION, f"1..{len(runs) + bool(more)}"]
    for number, run in enumerate(runs, start=1):
        lines += (f"  {line}" for line in _subtests(run, known))
        lines.append(_parent(number, run))
    if more:
        lines.append(f"not ok {len(runs) + 1} how much may be skipped or unknown # ERROR {_inline('; '.join(more))}")
    last = sentences.result_of(exit_code(verdicts, bounds), tally(verdicts))
    lines.append(_comment(f"all runs: {last}"))
    return "\n".join(lines)


def _subtests(run: Run, known: Sequence[Finding]) -> Iterator[str]:
    verdict = run.verdict
    yield VERSION
    yield f"1..{len(verdict.verdicts)}"
    yield _comment(f"{sentences.title(run.verdict)}, seed {verdict.seed}")
    if run.history.damage:
        yield _comment(f"the history is damaged: {run.history.damage}")
    for number, judged in enumerate(verdict.verdicts, start=1):
        for line in _diagnosis(judged, run, known):
            yield _comment(f"{judged.promise}: {line}")
        yield _result(number, judged)
    count = Counter(_kind(judged) for judged in verdict.verdicts)
    kinds = ("pass", "fail", "xfail", "xpass", "skip", "error")
    yield _comment(f"Totals: {' '.join(f'{kind}:{count[kind]}' for kind in kinds)}")  # as ksft_print_cnts() has it
    yield _comment(f"records: {run.directory}")
    for note in verdict.notes:
        yield _comment(f"note: {note}")
    yield _comment(f"the run: {sentences.result_of(verdict.exit_code, verdict.tally)}")


def _diagnosis(judged: Verdict, run: Run, known: Sequence[Finding]) -> Iterator[str]:
    """What the result line has no room for."""
    if judged.accepted or "#" in judged.reason or not judged.listed:
        yield f"{judged.outcome}: {judged.reason}"
    yield from sentences.details(judged, run.history, known)


def _kind(judged: Verdict) -> str:
    if judged.accepted:
        return "xfail" if judged.outcome is Outcome.BROKEN else "skip"
    if judged.outcome is Outcome.UNKNOWN and not judged.listed:
        return "skip"
    kinds = {Outcome.KEPT: "pass", Outcome.BROKEN: "fail", Outcome.UNKNOWN: "error", Outcome.SKIPPED: "skip"}
    return kinds[judged.outcome]


def _result(number: int, judged: Verdict) -> str:
    line = f"{number} {_inline(sentences.promise(judged))}"
    reason = sentences.accepted(judged) if judged.accepted else judged.reason
    if not judged.listed and judged.outcome in (Outcome.UNKNOWN, Outcome.SKIPPED):
        reason = sentences.unlisted(judged)
    match _kind(judged):
        case "pass":
            return f"ok {line}"
        case "fail":
            return f"not ok {line} # broken: {_inline(reason)}"
        case "error":
            return f"not ok {line} # ERROR {_inline(reason)}"
        case kind:
            return f"ok {line} # {kind.upper()} {_inline(reason)}"


def _parent(number: int, run: Run) -> str:
    counted = [judged for judged in run.verdict.verdicts if judged.counts]
    kinds = [_kind(judged) for judged in counted]
    line = f"{number} {_inline(sentences.title(run.verdict))}"
    if run.verdict.exit_code not in (ExitCode.KEPT, ExitCode.SKIPPED):
        if not kinds:
            return f"not ok {line} # ERROR no promise was judged"
        shown = run.verdict.left or any(kind in ("pass", "fail", "error") for kind in kinds)
        return f"not ok {line}" if shown else f"not ok {line} # ERROR nothing was kept"
    if known := kinds.count("xfail"):
        return f"ok {line} # XFAIL {known} known deviation{'s' if known > 1 else ''}"
    if all(kind == "skip" for kind in kinds):
        return f"ok {line} # SKIP nothing could be asked"
    return f"ok {line}"


def _comment(text: str) -> str:
    return f"# {clean(text)}"


def _inline(text: str) -> str:
    return clean(text).replace("#", "")
