# SPDX-License-Identifier: Apache-2.0
"""Tables of outcomes: what each promise of each experiment comes to on one kernel, and what differs from it.

A table is the text file `experiments/outcomes/RELEASE.txt`, made from the verdicts of runs and never by hand, with one
exception: the reason why an experiment may come out in more than one way.

    kernel 6.12.117                                     the kernel of all its runs, x.y.z

    move-across-cgroups                                 an experiment, and under it
      P1   kept                                         a line for each promise that was judged: outcome, and signature
      P5   broken    guest_status-after-move:EBADF      if it has one

    moves-crossed
      chance: two threads meet in the move or not       why its outcome is left to chance, by hand, and then
      P4   kept                                         the ways in which a whole run may come out,
      or                                                told apart by this word
      P4   broken    owner-died-in-move

A kernel that has a table must match it to the letter. Any other is compared with the newest older table of its series:
then a difference is the kernel's own until shown otherwise. It is told, and counts against the project only if a
promise is broken that no finding explains, or if an experiment was not carried out or is in no table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

import msgspec

from chaos.errors import InternalError, UsageError
from chaos.judge.verdict import Outcome
from chaos.linux.version import order, series
from chaos.promises import PROMISES

SPDX = "# SPDX-License-Identifier: Apache-2.0"
HEAD = "# What each promise of each experiment comes to on this kernel, in the lab. Made by `make outcomes`."
SUFFIX = ".txt"
CHANCE = "chance:"
OR = "or"

_KERNEL = re.compile(r"kernel (\d+\.\d+\.\d+)")
_NAME = re.compile(r"[a-z0-9-]+")
_REFRESH = "if the new outcome is right, `make outcomes` and say why in the commit; else mend what changed it"


@dataclass(frozen=True, slots=True)
class PromiseOutcome:
    """What one promise came to. `signature` is "" if the verdict has none."""

    outcome: Outcome
    signature: str = ""

    def __str__(self) -> str:
        return f"{self.outcome.value} {self.signature}".rstrip()


Way = Mapping[str, PromiseOutcome]  # promise → outcome: how one whole run came out


@dataclass(frozen=True, slots=True)
class Expectation:
    """The ways in which an experiment may come out: one, or several and `chance`, the reason for that."""

    ways: tuple[Way, ...]
    chance: str = ""


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """`kernel` is x.y.z; `experiments` maps the name of an experiment to what is expected of it."""

    kernel: str
    experiments: Mapping[str, Expectation]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One judged run. `explained` are the promises whose outcome a finding or the experiment itself accounts for."""

    experiment: str
    kernel: str
    directory: str
    way: Way
    explained: frozenset[str] = frozenset()
    damage: str = ""


@dataclass(frozen=True, slots=True)
class OutcomeDifference:
    """One thing that is not as the table has it. `promise` is "" if it is about the experiment as a whole. `counts` is
    whether it makes a comparison fail."""

    experiment: str
    promise: str
    expected: str
    seen: str
    kernel: str
    remedy: str
    counts: bool
    table: str
    directory: str = ""

    def __str__(self) -> str:
        where = f"{self.experiment} {self.promise}".rstrip()
        run = f" ({self.directory})" if self.directory else ""
        told = "" if self.counts else "told, does not count: "
        expected = f"expected {self.expected} (table of {self.table})"
        return f"{told}{where} on {self.kernel}: {self.seen}, {expected}{run}; {self.remedy}"


def load() -> tuple[OutcomeTable, ...]:
    """The tables that come with this version. Raises `InternalError` if one of them is wrong."""
    found = [path for path in files("experiments").joinpath("outcomes").iterdir() if path.name.endswith(SUFFIX)]
    tables = {path.name: parse(path.read_text(encoding="utf-8"), path.name) for path in found}
    for name, table in tables.items():
        if name != table.kernel + SUFFIX:
            raise InternalError(f"experiments/outcomes/{name} is of kernel {table.kernel}", remedy="rename it")
    return tuple(sorted(tables.values(), key=lambda table: order(table.kernel)))


def fitting(tables: Iterable[OutcomeTable], kernel: str) -> OutcomeTable:
    """The table of this kernel; of those of its series the newest that is not newer, or the oldest if all are newer.

    Raises `UsageError` if its series has none.
    """
    mine = (table for table in tables if series(table.kernel) == series(kernel))
    of_series = sorted(mine, key=lambda table: order(table.kernel))
    if not of_series:
        raise UsageError(
            f"no table of outcomes is of the series of kernel {kernel}",
            remedy="make one: .venv/bin/python -m tests.nightly outcomes KERNEL",
        )
    older = [table for table in of_series if order(table.kernel) <= order(kernel)]
    return older[-1] if older else of_series[0]


# ---- The report of a run, and the text of a table


class _Verdict(msgspec.Struct, frozen=True):
    promise: str
    outcome: Outcome
    signature: str
    accepted: str
    listed: bool = True


class _Run(msgspec.Struct, frozen=True):
    experiment: str
    kernel: str
    directory: str
    damage: str
    verdicts: tuple[_Verdict, ...]


class _Report(msgspec.Struct, frozen=True):
    runs: tuple[_Run, ...]


def _telling(run: _Run) -> list[_Verdict]:
    """The verdicts of the promises that the experiment lists, and of any other what is broken and no finding explains:
    no table has that."""
    return [v for v in run.verdicts if v.listed or (v.outcome is Outcome.BROKEN and not v.accepted)]


def read_report(report: bytes) -> tuple[RunOutcome, ...]:
    """The runs of a report as `sevchaos run --json` and `sevchaos check --json` write it. Raises `UsageError`."""
    try:
        runs = msgspec.json.decode(report, type=_Report).runs
    except msgspec.DecodeError as error:
        raise UsageError(f"this is no report of runs: {error}", remedy="give what `--format json` printed") from error
    return tuple(
        RunOutcome(
            experiment=run.experiment,
            kernel=run.kernel,
            directory=run.directory,
            way={verdict.promise: PromiseOutcome(verdict.outcome, verdict.signature) for verdict in _telling(run)},
            explained=frozenset(verdict.promise for verdict in _telling(run) if verdict.accepted),
            damage=run.damage,
        )
        for run in runs
    )


def parse(text: str, name: str = "table") -> OutcomeTable:
    """The table in this text. Raises `InternalError`, which says the line and what is allowed there."""
    kernel = ""
    experiments: dict[str, Expectation] = {}
    lines = [(n, line.rstrip()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    blocks: list[list[tuple[int, str]]] = []
    for number, line in lines:
        if not line.startswith(" "):
            blocks.append([])
        elif not blocks:
            raise _wrong(name, number, line, "the name of an experiment comes before its lines")
        blocks[-1].append((number, line.strip()))
    for (number, line), *below in blocks:
        found = _KERNEL.fullmatch(line)
        if found and not kernel and not below:
            kernel = found.group(1)
        elif not kernel or not _NAME.fullmatch(line) or line in experiments:
            allowed = "'kernel x.y.z'" if not kernel else "the name of an experiment, once"
            raise _wrong(name, number, line, f"expected {allowed}")
        else:
            experiments[line] = _expectation(name, number, below)
    if not kernel:
        raise _wrong(name, 1, "", "expected 'kernel x.y.z'")
    return OutcomeTable(kernel, experiments)


def _expectation(name: str, heading: int, lines: Sequence[tuple[int, str]]) -> Expectation:
    chance = ""
    ways: list[dict[str, PromiseOutcome]] = [{}]
    for number, line in lines:
        if line.startswith(CHANCE):
            chance = line.removeprefix(CHANCE).strip()
        elif line == OR:
            ways.append({})
        else:
            promise, *said = line.split()
            if promise not in PROMISES or promise in ways[-1] or not 1 <= len(said) <= 2:
                raise _wrong(name, number, line, "expected a promise, its outcome and its signature, once in each way")
            if said[0] not in set(Outcome):
                raise _wrong(name, number, line, f"expected one of {', '.join(Outcome)}")
            ways[-1][promise] = PromiseOutcome(Outcome(said[0]), *said[1:])
    if not all(ways):
        raise _wrong(name, heading, "", "a way of this experiment has no promise")
    if any(way in ways[:n] for n, way in enumerate(ways)):
        raise _wrong(name, heading, "", "two ways of this experiment are the same")
    if len(ways) > 1 and not chance:
        raise _wrong(name, heading, "", f"this experiment has {len(ways)} ways and no '{CHANCE}' that says why")
    return Expectation(tuple(ways), chance)


def _wrong(name: str, number: int, line: str, why: str) -> InternalError:
    return InternalError(f"experiments/outcomes/{name}:{number}: {line!r}: {why}")


def write(table: OutcomeTable) -> str:
    """Its text, in order of names and promises, so that what changed is all that a diff shows."""
    lines = [SPDX, HEAD, f"kernel {table.kernel}"]
    for name, expectation in sorted(table.experiments.items()):
        lines += ["", name]
        if expectation.chance:
            lines.append(f"  {CHANCE} {expectation.chance}")
        for number, way in enumerate(expectation.ways):
            if number:
                lines.append(f"  {OR}")
            for promise in sorted(way, key=list(PROMISES).index):
                entry = way[promise]
                lines.append(f"  {promise:<4} {entry.outcome.value:<9} {entry.signature}".rstrip())
    return "\n".join(lines) + "\n"


# ---- Making one


def make(runs: Sequence[RunOutcome], *, before: OutcomeTable | None = None) -> OutcomeTable:
    """The table that these runs of one kernel are as expected by.

    `before` gives the reasons for chance, and the ways seen earlier of an experiment left to chance, as long as they
    are about the same promises. Raises `UsageError` if the runs are of several kernels, if the history of one is
    damaged, if a promise is broken or unknown for no written reason (a table must not make that expected), or if an
    experiment came out in several ways and nobody has said why.
    """
    kernels = {run.kernel for run in runs}
    if len(kernels) != 1:
        raise UsageError(f"a table is of one kernel, and these runs are of {len(kernels)}", remedy="make one for each")
    damaged = next((run for run in runs if run.damage), None)
    if damaged is not None:
        raise UsageError(f"the history of {damaged.directory} is damaged: {damaged.damage}", remedy="run it again")
    (kernel,) = kernels
    unexplained = [f"{run.experiment} {promise}: {run.way[promise]}" for run in runs for promise in _unexplained(run)]
    if unexplained:
        raise UsageError(
            f"on {kernel} no finding and no experiment explains {'; '.join(dict.fromkeys(unexplained))}",
            remedy="judge with --accept-known; if that was done: run it again, or write the finding",
        )
    known = {} if before is None else before.experiments
    same = before is not None and before.kernel == kernel
    ordered = sorted(runs, key=lambda run: run.experiment)
    experiments: dict[str, Expectation] = {}
    for name, group in groupby(ordered, key=lambda run: run.experiment):
        ways = _distinct(run.way for run in group)
        old = known.get(name)
        chance = old.chance if old is not None else ""
        if len(ways) > 1 and not chance:
            raise UsageError(
                f"{name} came out in {len(ways)} ways on {kernel}: {_apart(ways)}",
                remedy=f"if that is chance, put '{CHANCE} WHY' under its name in the newest table of {series(kernel)}",
            )
        if chance and same and old is not None:
            ways = _distinct((*ways, *(way for way in old.ways if set(way) == set(ways[0]))))
        experiments[name] = Expectation(tuple(sorted(ways, key=_worse)), chance)
    return OutcomeTable(kernel, experiments)


def _unexplained(run: RunOutcome) -> list[str]:
    """The promises whose outcome counts against the run."""
    bad = (Outcome.BROKEN, Outcome.UNKNOWN)
    return [promise for promise, entry in run.way.items() if entry.outcome in bad and promise not in run.explained]


def _distinct(ways: Iterable[Way]) -> list[Way]:
    found: list[Way] = []
    for way in ways:
        if way not in found:
            found.append(way)
    return found


def _worse(way: Way) -> tuple[int, str]:
    """First those in which most was kept."""
    return sum(entry.outcome.exit_code != 0 for entry in way.values()), str(sorted(map(str, way.items())))


def _apart(ways: Sequence[Way]) -> str:
    """The promises in which they differ, and what each came to."""
    promises = sorted({p for way in ways for p in way if any(other.get(p) != way[p] for other in ways)})
    return "; ".join(f"{p}: {' or '.join(dict.fromkeys(_said(way, p) for way in ways))}" for p in promises)


def _said(way: Way, promise: str) -> str:
    return str(way[promise]) if promise in way else "not judged"


# ---- Comparing with one


def compare(table: OutcomeTable, runs: Sequence[RunOutcome], names: Collection[str]) -> tuple[OutcomeDifference, ...]:
    """What of these runs of one kernel is not as the table has it.

    `names` are the experiments that were to be carried out: one of them without a run is told, and one without an entry
    in the table. For the whole catalogue, give `names` as its names together with those of the table.
    """
    done = {run.experiment for run in runs}
    kernel = next((run.kernel for run in runs), table.kernel)
    missing = (
        OutcomeDifference(
            experiment=name,
            promise="",
            expected="a run",
            seen="not carried out",
            kernel=kernel,
            remedy="if it is gone from the catalogue, `make outcomes`; else see why it did not run",
            counts=True,
            table=table.kernel,
        )
        for name in sorted(set(names) - done)
    )
    return (*missing, *(difference for run in runs for difference in _differences(table, run)))


def _differences(table: OutcomeTable, run: RunOutcome) -> Iterator[OutcomeDifference]:
    expectation = table.experiments.get(run.experiment)
    own = table.kernel == run.kernel
    if expectation is None:
        yield OutcomeDifference(
            experiment=run.experiment,
            promise="",
            expected="an entry",
            seen="not in the table",
            kernel=run.kernel,
            remedy="an experiment that is new needs `make outcomes`",
            counts=True,
            table=table.kernel,
            directory=run.directory,
        )
        return
    if run.way in expectation.ways:
        return
    nearest = min(expectation.ways, key=lambda way: len(_unlike(way, run.way)))
    others = f", or in another of its {len(expectation.ways)} ways" if len(expectation.ways) > 1 else ""
    for promise in _unlike(nearest, run.way):
        seen = run.way.get(promise)
        broken = seen is not None and seen.outcome is Outcome.BROKEN and promise not in run.explained
        yield OutcomeDifference(
            experiment=run.experiment,
            promise=promise,
            expected=_said(nearest, promise) + others,
            seen=_said(run.way, promise),
            kernel=run.kernel,
            remedy=_remedy(own, broken),
            counts=own or broken,
            table=table.kernel,
            directory=run.directory,
        )


def _unlike(one: Way, other: Way) -> list[str]:
    return [promise for promise in PROMISES if one.get(promise) != other.get(promise)]


def _remedy(own: bool, broken: bool) -> str:
    if own:
        return _REFRESH
    if broken:
        return "no finding explains it: see whether the kernel or the project changed, and write the finding or mend it"
    return "the kernel is another one: if that explains it, `make outcomes` for it"
