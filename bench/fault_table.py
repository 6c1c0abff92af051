# SPDX-License-Identifier: Apache-2.0
"""The table of docs/faults.md, its last two columns from real runs.

    python bench/fault_table.py                  every fault that an experiment of the catalogue applies
    python bench/fault_table.py kill stop        only these; the rows of the others stay as they are
    python bench/fault_table.py limit=NAME       in the experiment NAME, not in the shortest that applies it
    python bench/fault_table.py --words          no runs: only what the faults say of themselves

Each fault is carried out in an experiment that applies it, and in that again with the fault withheld: then it must
leave no evidence, and nothing may have been kept. If that is not so the row says *not yet*, and this ends with 1.
Whatever stands in the page outside of the tables is left alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import experiments
from chaos import fault
from chaos.cli.explain_verb import describe
from chaos.experiment import load, model
from chaos.experiment.steps import FaultStep, walk
from chaos.history import file
from chaos.history.records import Fault
from chaos.lab.kernel.find import default_kernels

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
HEADINGS = ("fault", "what it does", "where it may strike", "what it needs", "what proves it", "a run", "withheld")
ROW = re.compile(r"^\| `([a-z-]+)` \|")
CELL = re.compile(r"`(?P<title>[a-z0-9-]+)` on (?P<kernels>[0-9. and]+): ")
NOT_YET = ("not yet", "not yet")


Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """What one run says of the fault."""

    title: str
    kernel: str
    told: str


class NotProven(Exception):
    """What a run shows is not what the table is to say."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="FAULT")
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    parser.add_argument("--words", action="store_true")
    options = parser.parse_args(arguments)
    shown = dict(_shown(PAGE.read_text()))
    problems: list[str] = []
    chosen = {} if options.words else dict(_chosen(options.names or fault.names(), problems))
    for kernel in (options.kernel or default_kernels()) if chosen else ():
        found = seen(chosen, kernel, problems)
        shown |= {name: _cells_of(*found[name], shown.get(name)) if name in found else NOT_YET for name in chosen}
        PAGE.write_text(written(PAGE.read_text(), shown))
    PAGE.write_text(written(PAGE.read_text(), shown))
    for told in problems:
        print(told, file=sys.stderr)
    return bool(problems)


def _chosen(given: Iterable[str], problems: list[str]) -> Iterator[tuple[str, str]]:
    """Of each fault the experiment that it is shown in."""
    for each in given:
        name, _, title = each.partition("=")
        try:
            yield name, title or shortest(name)
        except NotProven as told:
            problems.append(f"{name}: {told}")


def _cells_of(run: Shown, withheld: Shown, before: tuple[str, str] | None) -> tuple[str, str]:
    """In the words of this kernel; the others are named on which the same experiment showed it."""
    cell = CELL.match(before[0]) if before else None
    kernels = {run.kernel, *(cell["kernels"].split(" and ") if cell and cell["title"] == run.title else ())}
    ordered = sorted(kernels, key=lambda kernel: [int(number) for number in kernel.split(".")])
    return f"`{run.title}` on {' and '.join(ordered)}: {run.told}", f"nothing kept: {withheld.told}"


def seen(chosen: Mapping[str, str], kernel: str, problems: list[str]) -> dict[str, tuple[Shown, Shown]]:
    """What each fault's experiment shows with the fault, and without it. What is not so is told in `problems`."""
    found = {}
    with tempfile.TemporaryDirectory() as runs:
        whole = _carried_out(chosen.values(), kernel, runs)
        for group in _groups(chosen):
            withheld = _carried_out([chosen[name] for name in group], kernel, runs, withhold=group)
            for name in group:
                try:
                    found[name] = _with(name, whole.get(chosen[name])), _without(name, withheld.get(chosen[name]))
                    print(f"{name} on {kernel}: {found[name][0].told}; withheld: {found[name][1].told}", flush=True)
                except NotProven as told:
                    problems.append(f"{name} on {kernel}, in {chosen[name]}: {told}")
    return found


def _groups(chosen: Mapping[str, str]) -> list[list[str]]:
    """Faults that can be withheld in one go: no experiment of a group applies two of it, so that it cannot end unknown
    for want of another one."""
    groups: list[list[str]] = []
    for name in chosen:
        for group in groups:
            if not any(_applies(chosen[a], b) for a, b in ((name, o) for o in group)) and not any(
                _applies(chosen[other], name) for other in group
            ):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _with(name: str, run: Run | None) -> Shown:
    """Raises `NotProven` unless the fault took effect."""
    if run is None:
        raise NotProven("it could not be run")
    evidence = _evidence(run, name)
    if not evidence or not all(record.struck for record in evidence):
        raise NotProven("it did not strike")
    return Shown(run["experiment"], run["kernel"], evidence[0].detail)


def _without(name: str, run: Run | None) -> Shown:
    """Raises `NotProven` if the fault left evidence though it was withheld, or anything was kept."""
    if run is None:
        raise NotProven("withheld, it could not be run")
    evidence = _evidence(run, name)
    if any(record.struck for record in evidence):
        raise NotProven(f"withheld, it left evidence all the same: {evidence[0].detail}")
    outcomes = [verdict["outcome"] for verdict in run["verdicts"] if verdict["listed"]]
    if "kept" in outcomes or "unknown" not in outcomes:
        raise NotProven(f"withheld, it was {', '.join(outcomes)}")
    return Shown(run["experiment"], run["kernel"], evidence[0].detail if evidence else "the run did not come to it")


def shortest(name: str) -> str:
    """Of the catalogue's experiments that apply the fault the one with the fewest steps. Raises `NotProven`."""
    found = [(len(list(walk(made.script))), title) for title, made in _catalogue().items() if _applies(title, name)]
    if not found:
        raise NotProven("no experiment of the catalogue applies it")
    return min(found)[1]


@functools.cache
def _catalogue() -> dict[str, model.Experiment]:
    return {title: load.load(path) for title, path in experiments.catalogue().items()}


def _applies(title: str, name: str) -> bool:
    steps = (step for _, step in walk(_catalogue()[title].script))
    return any(isinstance(step, FaultStep) and step.fault == name for step in steps)


def _carried_out(titles: Iterable[str], kernel: str, runs: str, *, withhold: Iterable[str] = ()) -> dict[str, Run]:
    """The runs by experiment. The lab is booted once for all of them."""
    argv = [sys.executable, "-m", "chaos.cli", "run", *dict.fromkeys(titles), "--kernel", kernel]
    argv += ["--json", "-q", "--runs", runs, *(word for name in withhold for word in ("--withhold", name))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(f"nothing could be run: {done.stderr.strip()}")
    return {run["experiment"]: run for run in json.loads(done.stdout)["runs"]}


def _evidence(run: Run, name: str) -> list[Fault]:
    records = file.read(Path(run["directory"]) / "history.jsonl").records
    return [r for r in records if isinstance(r, Fault) and r.fault == name and r.event == "evidence"]


def families() -> dict[str, list[str]]:
    """The faults of each module of `faults`, by its name."""
    found: dict[str, list[str]] = {}
    for point in sorted(entry_points(group=fault.GROUP), key=lambda point: point.name):
        found.setdefault(point.module.rpartition(".")[2], []).append(point.name)
    return found


def written(page: str, shown: dict[str, tuple[str, str]]) -> str:
    """The page with the table of every family's section made anew."""
    for family, names in families().items():
        table = "\n".join((_cells(HEADINGS), "|" + "---|" * len(HEADINGS), *(row(name, shown) for name in names)))
        part = re.compile(rf"(^## {family}\n(?:(?!^\||^## ).*\n)*)((?:^\|.*\n)*)", re.MULTILINE)
        if part.search(page) is None:
            page = f"{page.rstrip()}\n\n## {family}\n\n"
        page = part.sub(lambda found, table=table: found[1] + table + "\n", page, count=1)  # type: ignore[misc]
    return page


def row(name: str, shown: dict[str, tuple[str, str]]) -> str:
    told = describe(name)
    run, withheld = shown.get(name, NOT_YET)
    return _cells((f"`{name}`", told["does"], told["where"], told["needs"], told["proof"], run, withheld))


def _cells(values: Sequence[str]) -> str:
    clean = (" ".join(value.split()).replace("|", "\\|") for value in values)
    return f"| {' | '.join(clean)} |"


def _shown(page: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The last two columns of every row of the page."""
    for line in page.splitlines():
        found = ROW.match(line)
        if found:
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            yield found[1], (cells[-2], cells[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
