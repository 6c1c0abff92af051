# SPDX-License-Identifier: Apache-2.0
"""The report for people: what was done, what was seen, what each promise came to, and why.

Every part begins with a line that says what its rows mean. On a terminal it has colours; elsewhere it is plain text
of 100 columns.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from chaos.history.reading import charged
from chaos.history.records import Asked, Counted, Observation
from chaos.judge import findings
from chaos.judge.findings import Finding
from chaos.judge.verdict import UNBOUNDED, Bounds, Outcome, RunVerdict, Verdict, exceeded, exit_code, tally
from chaos.promises import PROMISES
from reports import sentences
from reports.output import bare_table, plain, put_out
from reports.run import Run
from reports.sentences import clean

__all__ = ["WIDTH", "Run", "render", "report", "show"]

WIDTH = 104  # of the table of all promises, with the longest name of an experiment
TOLD_AT_LENGTH = 16  # of more runs than this, only those that count against the exit code
MOMENTS_ACROSS = 6  # more observations than this are shown a row each

_STYLES = {Outcome.KEPT: "green", Outcome.BROKEN: "bold red", Outcome.UNKNOWN: "yellow", Outcome.SKIPPED: "cyan"}
_MARKS = {Outcome.KEPT: "kept", Outcome.BROKEN: "FAIL", Outcome.UNKNOWN: "????", Outcome.SKIPPED: "skip"}
_NOT_COUNTED = {**_MARKS, Outcome.BROKEN: "fail", Outcome.UNKNOWN: "(??)"}
_PARTLY = {"FAIL": "F/sk", "fail": "f/sk", "????": "?/sk", "(??)": "?/sk"}
_UNLISTED = {Outcome.KEPT: "ok", Outcome.UNKNOWN: "?", Outcome.SKIPPED: "-"}
_LEGEND = (
    "FAIL: broken, fail: broken as a written finding says, ????: unknown, (??): unknown as the experiment states, "
    "skip: this host cannot, F/sk, f/sk, ?/sk: that, and skipped in part. Not put to the test, so not counted: ok: "
    "kept, ?: unknown, -: skipped"
)
_WORST = (Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED, Outcome.KEPT)


def show(runs: Sequence[Run], file: TextIO | None = None, *, bounds: Bounds = UNBOUNDED) -> None:
    """Print the report, on stdout unless told otherwise."""
    stream = file if file is not None else sys.stdout
    known = findings.load()
    put_out(report(runs, known, bounds), stream, WIDTH)


def render(
    runs: Sequence[Run], known: Sequence[Finding] = (), *, bounds: Bounds = UNBOUNDED, width: int = WIDTH
) -> str:
    """The report as plain text, whatever the environment says about terminals."""
    return plain(report(runs, known, bounds), width)


def report(runs: Sequence[Run], known: Sequence[Finding] = (), bounds: Bounds = UNBOUNDED) -> RenderableType:
    """The report. `known` are the written findings to point out beside deviations that were not accepted."""
    told = runs if len(runs) <= TOLD_AT_LENGTH else [run for run in runs if run.verdict.exit_code]
    parts = [part for run in told for part in _run(run, known)]
    if len(runs) > 1 or exceeded([run.verdict for run in runs], bounds):
        parts += _summary([run.verdict for run in runs], bounds)
    return Group(*parts)


def _run(run: Run, known: Sequence[Finding]) -> Iterator[RenderableType]:
    verdict = run.verdict
    yield Rule(Text(verdict.experiment, style="bold"), align="left")
    where = "the lab (software PSP, nothing is encrypted)" if verdict.host == "lab" else clean(verdict.host)
    header = run.history.header
    earlier = header.earlier if header is not None else 0
    after = f", after {earlier} other run{'s' * (earlier > 1)} there" if earlier else ""
    yield Text(f"kernel {clean(verdict.kernel) or 'unknown'}, host: {where or 'unknown'}, seed {verdict.seed}{after}")
    yield Text(clean(run.experiment.why), style="italic")
    if run.history.damage:
        yield Text(f"The history is damaged: {clean(run.history.damage)}", style="bold red")
    yield from _steps(run)
    yield from _charges(run)
    yield from _asked(run)
    yield from _counted(run)
    yield from _verdicts(run, known)
    for note in verdict.notes:
        yield Text(f"\nnote: {clean(note)}", style="yellow")
    yield Text(f"\nrecords: {clean(str(run.directory))}\n", style="dim", overflow="fold")
    yield Text.assemble("the run: ", (sentences.result_of(verdict.exit_code, verdict.tally), _STYLES[verdict.outcome]))


def _table(*columns: str) -> Table:
    table = bare_table()
    for column in columns:
        table.add_column(Text(clean(column)), overflow="fold")
    return table


def _part(title: str, meaning: str, *body: RenderableType) -> Iterator[RenderableType]:
    """A part of the report: its title, what its rows mean, and the rows."""
    yield Text.assemble("\n", (title, "bold"), " ", (meaning, "dim"))
    for renderable in body:
        yield Padding(renderable, (0, 0, 0, 2))


def _steps(run: Run) -> Iterator[RenderableType]:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(justify="right", style="dim")
    grid.add_column(overflow="fold", ratio=3)
    grid.add_column(overflow="fold", ratio=2)
    for number in range(len(run.experiment.script)):
        said = sentences.result(run.experiment, run.history, number)
        grid.add_row(str(number), Text(sentences.step(run.experiment, number)), Text(said, style="bold"))
    yield from _part("Done.", "A row is a step of the script, with what came of it:", grid)


def _charges(run: Run) -> Iterator[RenderableType]:
    moments = [record for record in run.history.records if isinstance(record, Observation)]
    if not moments:
        yield from _part("Charges.", "No counter was read.")
        return
    cgroups = list(dict.fromkeys(cgroup for moment in moments for cgroup in sorted(moment.misc)))
    across = len(moments) <= MOMENTS_ACROSS
    labels = [moment.label for moment in moments]
    cells = [[_charged(moment, cgroup) for moment in moments] for cgroup in cgroups]
    cells.append(["?" if moment.guests is None else str(moment.guests) for moment in moments])
    names = [*cgroups, "firmware's guests"]
    if across:
        table = _table("cgroup", *labels)
        rows = zip(names, cells, strict=True)
    else:
        table = _table("moment", *names)
        rows = zip(labels, map(list, zip(*cells, strict=True)), strict=True)
    for name, row in rows:
        table.add_row(Text(clean(name)), *(Text(cell, style="" if cell not in "-0" else "dim") for cell in row))
    meaning = (
        f"misc.current by {'cgroup and observation' if across else 'observation and cgroup'} ('.' is the run's root):"
    )
    yield from _part("Charges.", meaning, table)


def _charged(moment: Observation, cgroup: str) -> str:
    current = moment.misc.get(cgroup, {}).get("current")
    if current is None:
        return "gone"
    return ", ".join(f"{clean(key)} {charged(value)}" for key, value in sorted(current.items()) if value) or "-"


def _asked(run: Run) -> Iterator[RenderableType]:
    records = [record for record in run.history.records if isinstance(record, Asked)]
    if not records:
        return
    lines: list[RenderableType] = []
    for record in records:
        lines.append(Text(f"{clean(record.vm)}, in {clean(record.agent)}: {sentences.asked(record)}"))
        groups = list(sentences.by_errno(record))
        if len(groups) > 1:
            lines += [Padding(Text(f"{name}: {ioctls}", style="dim"), (0, 0, 0, 2)) for name, ioctls in groups]
    meaning = "ioctls on the VM answering EIO (and on a live control VM):"
    yield from _part("Asked.", meaning, *lines)


def _counted(run: Run) -> Iterator[RenderableType]:
    table = _table("step", "VM", "VMM", "ticks", "stale", "read from")
    records = [record for record in run.history.records if isinstance(record, Counted)]
    for r in records:
        row = (str(r.step), clean(r.vm), clean(r.agent), str(r.ticks), str(r.stale), clean(r.where))
        table.add_row(*map(Text, row))  # as Text: a string would be searched for markup
    meaning = "A row is a reading of the guest's own counter, which must go on where it stopped:"
    if records:
        yield from _part("Guest.", meaning, table)


def _verdicts(run: Run, known: Sequence[Finding]) -> Iterator[RenderableType]:
    verdict = run.verdict
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for judged in verdict.verdicts:
        if not judged.counts:
            continue
        said = Text.assemble((PROMISES.get(judged.promise, ""), "bold"), "\n", clean(judged.reason))
        for line in sentences.details(judged, run.history, known):
            said.append(f"\n{line}")
        if judged.accepted:
            said.append(f"\n{sentences.accepted(judged)}")
        grid.add_row(Text(clean(judged.promise)), Text(judged.outcome.value, style=_style(judged)), said)
    yield from _part("Verdict.", "A row is a promise of the kernel, and whether it was kept:", grid)
    if others := list(_unlisted(verdict)):
        yield Text(f"\nNot put to the test, so not counted: {'; '.join(others)}", style="dim")


def _unlisted(verdict: RunVerdict) -> Iterator[str]:
    """What the promises came to that the experiment does not list: "kept P8, P13"."""
    for outcome in (Outcome.KEPT, Outcome.UNKNOWN, Outcome.SKIPPED):
        promises = [clean(v.promise) for v in verdict.verdicts if not v.counts and v.outcome is outcome]
        if promises:
            yield f"{outcome.value} {', '.join(promises)}"


def _style(judged: Verdict) -> str:
    return "magenta" if judged.accepted else _STYLES[judged.outcome]


def _summary(verdicts: Sequence[RunVerdict], bounds: Bounds) -> Iterator[RenderableType]:
    """A table for each kernel: a promise a column and an experiment a row, of several runs the worst. Then what is to
    be noted, and what all of it comes to."""
    yield Rule(Text("all runs", style="bold"), align="left")
    for kernel in dict.fromkeys(verdict.kernel for verdict in verdicts):
        of_kernel = [verdict for verdict in verdicts if verdict.kernel == kernel]
        title = f"Summary of kernel {clean(kernel)}."
        yield from _part(title, f"A row is an experiment, a column a promise. {_LEGEND}.", _summary_table(of_kernel))
    yield Text("")
    for note, times in Counter(note for verdict in verdicts for note in verdict.notes).items():
        yield Text(f"note: {clean(note)}{f' ({times} runs)' if times > 1 else ''}", style="yellow")
    for more in exceeded(verdicts, bounds):
        yield Text(f"more than allowed: {more}", style="bold red")
    skipped = sum(all(v.outcome is Outcome.SKIPPED for v in verdict.verdicts if v.counts) for verdict in verdicts)
    if skipped:
        yield Text(f"{skipped} of {len(verdicts)} runs were skipped as a whole", style="cyan")
    yield Text(f"all {len(verdicts)} runs: {sentences.result_of(exit_code(verdicts, bounds), tally(verdicts))}")


def _summary_table(verdicts: Sequence[RunVerdict]) -> Table:
    """As narrow as it can be: with all promises and the longest name it fits a line of WIDTH places."""
    groups: dict[str, list[RunVerdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.experiment, []).append(verdict)
    asked = {judged.promise for verdict in verdicts for judged in verdict.verdicts}
    promises = [promise for promise in PROMISES if promise in asked]
    repeated = len(verdicts) > len(groups)
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=0
    )  # the box has a space between columns
    for column in ("experiment", *(["runs"] if repeated else []), *promises):
        table.add_column(column, no_wrap=True)
    for experiment, group in groups.items():
        cells = [_cell([j for verdict in group for j in verdict.verdicts if j.promise == p]) for p in promises]
        table.add_row(Text(clean(experiment)), *([str(len(group))] if repeated else []), *cells)
    return table


def _cell(judged: Sequence[Verdict]) -> Text:
    if not judged:
        return Text("")
    if not any(verdict.counts for verdict in judged):
        worst = min(judged, key=lambda verdict: _WORST.index(verdict.outcome))
        return Text(_UNLISTED[worst.outcome], style="dim")
    judged = [verdict for verdict in judged if verdict.counts]
    worst = min(judged, key=lambda verdict: (bool(verdict.accepted), _WORST.index(verdict.outcome)))
    if worst.outcome in (Outcome.KEPT, Outcome.SKIPPED):  # what was accepted is no better than what was kept
        worst = min(judged, key=lambda verdict: _WORST.index(verdict.outcome))
    mark = (_NOT_COUNTED if worst.accepted else _MARKS)[worst.outcome]
    return Text(_PARTLY.get(mark, mark) if worst.skips else mark, style=_style(worst))
