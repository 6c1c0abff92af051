# SPDX-License-Identifier: Apache-2.0
"""Tests that boot the lab. They run the command itself, as a user would, and look at what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import pytest

from chaos.errors import ExitCode, NoKernel
from chaos.lab.kernel.find import default_kernels, find_kernel, night_kernels
from tests.nightly.catalogue import against_tables

T = TypeVar("T")
Sevchaos = Callable[..., "subprocess.CompletedProcess[bytes]"]


class Once(Protocol[T]):
    def __call__(self, key: Hashable, make: Callable[[], T]) -> T: ...


# What a lab command may take on a busy machine, cold boot included. A lab that hangs says so before.
DEADLINE = 900.0
# By verb, after how many seconds a run, or a program in the lab, is taken to hang. A run takes three to twenty.
PATIENCE = {("run",): "120", ("lab", "run"): "200"}


AT_NIGHT = [
    kernel if kernel in default_kernels() else pytest.param(kernel, marks=pytest.mark.nightly)
    for kernel in night_kernels()
]
"""Every kernel there is a table for; those that are no default are for the night."""


@pytest.fixture(params=AT_NIGHT)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def skip_unless_built(kernel: str) -> None:
    """Of one that takes half an hour to build no test is the reason."""
    try:
        find_kernel(kernel)
    except NoKernel as lacking:
        pytest.skip(f"{lacking.message}: {lacking.remedy}")


def command(*arguments: str) -> list[str]:
    """What starts `sevchaos ARGUMENTS…`. What hangs is told to say so itself, with all that it can say of where."""
    program = [sys.executable, "-m", "chaos.cli"]
    for verb, seconds in PATIENCE.items():
        if arguments[: len(verb)] == verb and "--timeout" not in arguments:
            return [*program, *verb, "--timeout", seconds, *arguments[len(verb) :]]
    return [*program, *arguments]


@pytest.fixture(scope="module")
def once() -> Once[Any]:
    """What the tests of a file share and is dear to have: made for the first that asks for it by this key."""
    made: dict[Hashable, Any] = {}

    def get(key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    return get


@pytest.fixture
def sevchaos() -> Sevchaos:
    """Runs `sevchaos ARGUMENTS…` and gives exit code, stdout and stderr."""

    def run(*arguments: str, stdin: bytes = b"", within: float = DEADLINE) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=within, check=False)
        except subprocess.TimeoutExpired as late:  # which says what was run, and not how far it came
            said = (late.stderr or b"")[-2000:].decode(errors="replace")
            pytest.fail(f"sevchaos {' '.join(arguments)} took more than {within:g} s; it had said: {said}")

    return run


@pytest.fixture
def in_lab(sevchaos: Sevchaos) -> Sevchaos:
    """Runs `sevchaos lab run OPTIONS… -- ARGV…`."""

    def run(*argv: str, options: Sequence[str] = (), stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return sevchaos("lab", "run", "--quiet", *options, "--", *argv, stdin=stdin)

    return run


def as_expected(done: subprocess.CompletedProcess[bytes]) -> bytes:
    """The output of a `sevchaos run --json --accept-known` all of whose runs ended as they should: no outcome counts
    against them, and those of the catalogue came out as the table of outcomes of their kernel says (docs/outcomes.md).

    Its assertion shows the verdicts that did not: nobody has the run directories of a CI that failed.
    """
    runs = json.loads(done.stdout)["runs"] if done.stdout else []
    unexpected = [
        {"experiment": run["experiment"], "damage": run["damage"], **verdict}
        for run in runs
        if run["exit_code"]
        for verdict in run["verdicts"]
        if verdict["outcome"] in ("broken", "unknown") and not verdict["accepted"]
        if verdict["listed"] or verdict["outcome"] == "broken"
    ]
    shown = "\n".join(json.dumps(verdict) for verdict in unexpected)
    assert done.returncode == ExitCode.KEPT, f"{done.stderr.decode()}\n{shown}"
    differences = against_tables(done.stdout, whole=False)
    shown = "\n".join(str(difference) for difference in differences)
    print(shown)  # also what is only told
    assert not any(difference.counts for difference in differences), shown
    return done.stdout
