# SPDX-License-Identifier: Apache-2.0
"""The table of docs/faults.md, its last two columns from real runs.

    python bench/fault_table.py                  every fault that an experiment of the catalogue applies
    python bench/fault_table.py kill stop        only these; the rows of the others stay as they are
    python bench/fault_table.py limit=NAME       in the experiment NAME, not in the shortest that applies it
    python bench/fault_table.py --words          no runs: only what the faults say of themselves

Each fault is carried out in an experiment that applies it, and in that again with the fault withheld:
then it must leave no evidence, and nothing may have held. If either is not so the row is not written, and this ends
with 1. Whatever stands in the page outside of the tables is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import experiments
from chaos import experiment, fault, history_file
from chaos.cli.explain_verb import describe
from chaos.history import Fault
from chaos.steps import Strike, walk

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
HEADINGS = ("fault", "what it does", "where it may strike", "what it needs", "what proves it", "a run", "withheld")
ROW = re.compile(r"^\| `([a-z-]+)` \|")


class Wrong(Exception):
    """What a run shows is not what the table is to say."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="FAULT")
    parser.add_argument("--kernel", default="debian:6.12")
    parser.add_argument("--words", action="store_true")
    options = parser.parse_args(arguments)
    shown = dict(_shown(PAGE.read_text()))
    failed = 0
    for given in [] if options.words else options.names or fault.names():
        name, _, chosen = given.partition("=")
        try:
            shown[name] = seen(name, chosen or shortest(name), options.kernel)
            print(f"{name}: {shown[name][0]}", flush=True)
        except Wrong as wrong:
            failed = 1
            print(f"{name}: {wrong}", file=sys.stderr, flush=True)
        PAGE.write_text(written(PAGE.read_text(), shown))
    PAGE.write_text(written(PAGE.read_text(), shown))
    return failed


def seen(name: str, chosen: str, kernel: str) -> tuple[str, str]:
    """What a run of the experiment with the fault shows, and one without it. Raises `Wrong`."""
    with tempfile.TemporaryDirectory() as runs:
        run = _carried_out(chosen, kernel, runs)
        evidence = _evidence(run, name)
        if not evidence or not all(record.struck for record in evidence):
            raise Wrong(f"in {chosen} it did not strike")
        withheld = _carried_out(chosen, kernel, runs, "--withhold", name)
        without = _evidence(withheld, name)
        outcomes = [verdict["outcome"] for verdict in withheld["verdicts"]]
        if any(record.struck for record in without):
            raise Wrong(f"in {chosen}, withheld, it left evidence all the same: {without[0].detail}")
        if "held" in outcomes or "unknown" not in outcomes:
            raise Wrong(f"{chosen} was {', '.join(outcomes)} with it withheld")
        where = f"`{chosen}` on {run['kernel']}"
        missed = without[0].detail if without else "the run did not come to it"
        return f"{where}: {evidence[0].detail}", f"nothing held: {missed}"


def shortest(name: str) -> str:
    """Of the catalogue's experiments that apply the fault the one with the fewest steps. Raises `Wrong`."""
    found = []
    for title, path in experiments.catalogue().items():
        steps = [step for _, step in walk(experiment.load(path).script)]
        if any(isinstance(step, Strike) and step.fault == name for step in steps):
            found.append((len(steps), title))
    if not found:
        raise Wrong("no experiment of the catalogue applies it")
    return min(found)[1]


def _carried_out(title: str, kernel: str, runs: str, *more: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "chaos.cli", "run", title, "--kernel", kernel, "--json", "-q", "--runs", runs, *more]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise Wrong(f"{title} could not be run: {done.stderr.strip()}")
    run: dict[str, Any] = json.loads(done.stdout)[0]
    return run


def _evidence(run: dict[str, Any], name: str) -> list[Fault]:
    records = history_file.read(Path(run["directory"]) / "history.jsonl").records
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
    run, withheld = shown.get(name, ("not yet", "not yet"))
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
