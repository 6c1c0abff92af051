# SPDX-License-Identifier: Apache-2.0
"""The parts of a night, and which of them are done.

A part that passed leaves `NAME.done`, which says what it passed with: the tree, and the kernel as it was in Debian's
archive. With the same of both it is not repeated, so that a night that was interrupted goes on where it stopped; with
another of either it is.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import experiments
from chaos.controller.outcomes import OutcomeDifference
from chaos.lab.kernel.find import find_kernel
from tests.nightly import mutation
from tests.nightly.catalogue import against_tables, carry_out

ROOT = Path(__file__).parent.parent.parent
STATE = ROOT / "build" / "nightly"
_TREE = ("chaos", "faults", "experiments", "reports", "tests", "pyproject.toml")
_MADE = ("__pycache__", ".mypy_cache")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class NightlyPart:
    """`carry_out` takes a directory of its own and a voice, and says whether all was well. `identity` is what besides
    the tree its outcome rests on."""

    name: str
    carry_out: Callable[[Path, Say], bool]
    identity: Callable[[], str]


def parts(kernels: Sequence[str]) -> tuple[NightlyPart, ...]:
    """All there are. What else needs a night (kills of the runner) is to be a line here."""
    return (*map(_catalogue, kernels), *map(_lab, kernels), *map(_jump_labels, kernels), _mutation())


def _catalogue(kernel: str) -> NightlyPart:
    """The whole catalogue on one kernel, each run against the table."""

    def carry(directory: Path, say: Say) -> bool:
        report = carry_out(kernel, list(experiments.catalogue()), directory / "runs")
        (directory / "report.json").write_bytes(report)
        return told(against_tables(report, whole=True), say)

    return NightlyPart(f"catalogue-{kernel}", carry, lambda: find_kernel(kernel).identity)


def _lab(kernel: str) -> NightlyPart:
    """What is marked nightly in tests/lab: every defect that a test plants in this kernel is found; and of
    a kernel that is tested at night alone all the rest."""

    def carry(directory: Path, say: Say) -> bool:
        chosen = f"{kernel}] or {kernel}-"  # a test's id ends so; 6.1 is no part of 6.12
        argv = [sys.executable, "-m", "pytest", "-q", "-m", "nightly", "-k", chosen, "tests/lab"]
        with (directory / "pytest.log").open("wb") as log:
            done = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        say(f"the tests in tests/lab ended with {done.returncode}; see {directory / 'pytest.log'}")
        return done.returncode == 0

    return NightlyPart(f"lab-{kernel}", carry, lambda: find_kernel(kernel).identity)


def _jump_labels(kernel: str) -> NightlyPart:
    """The lab's kernel lives through a minute of patching its jump labels (docs/lab.md, "How it works")."""

    def carry(directory: Path, say: Say) -> bool:
        argv = [sys.executable, "-m", "chaos.cli", "lab", "run", "--kernel", kernel, "--timeout", "300"]
        argv += ["--copy", str(ROOT / "bench" / "jump_labels.py"), "--", "python3", "jump_labels.py"]
        with (directory / "lab.log").open("wb") as log:
            done = subprocess.run(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        say((directory / "lab.log").read_text(errors="replace").rpartition("\n")[0].rpartition("\n")[2])
        return done.returncode == 0

    return NightlyPart(f"jump-labels-{kernel}", carry, lambda: find_kernel(kernel).identity)


def _mutation() -> NightlyPart:
    """Every mutant of the judge that survives is known. A module that was tried with this tree is not tried again."""

    def carry(directory: Path, say: Say) -> bool:
        return mutation.carry_out(mutation.modules(), say)

    return NightlyPart("mutation", carry, lambda: "no kernel")


def told(differences: Sequence[OutcomeDifference], say: Say) -> bool:
    """Say each of them, and whether none counts."""
    for difference in differences:
        say(str(difference))
    counted = sum(difference.counts for difference in differences)
    say(f"{len(differences)} differences from the table of outcomes, {counted} of them count")
    return not counted


def run(part: NightlyPart, say: Say, *, again: bool, state: Path = STATE) -> bool:
    """Carry it out, unless it is done; whether it passed."""
    name = part.name.replace("/", "-").replace(":", "-")
    done = state / f"{name}.done"
    passed_with = f"{tree()} {part.identity()}\n"
    if not again and done.is_file() and done.read_text() == passed_with:
        say(f"{part.name}: passed before with this tree and kernel; --again repeats it")
        return True
    done.unlink(missing_ok=True)
    directory = state / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with (directory / "told.txt").open("w") as kept:

        def both(line: str) -> None:
            print(line, file=kept, flush=True)
            say(f"{part.name}: {line}")

        passed = part.carry_out(directory, both)
        if tree() != passed_with.split(maxsplit=1)[0]:
            both("the tree changed meanwhile, so this was of no one version; it is to be repeated")
            return False
    if passed:
        done.write_text(passed_with)
    return passed


def tree(root: Path = ROOT) -> str:
    """A digest of all files that an outcome rests on."""
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for name in _TREE:
        top = root / name
        found = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (path for path in found if path.is_file() and not set(path.parts) & set(_MADE))
