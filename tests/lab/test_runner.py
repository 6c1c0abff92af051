# SPDX-License-Identifier: Apache-2.0
"""The runner in the lab: scripts that are not among the experiments, and deaths in the middle of a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaos.errors import ExitCode
from chaos.experiment import load, model
from chaos.history import records
from chaos.history.records import Asked, Counted, Done, End, Fault, Handover, Held, Invoke, Note, Observation, Record
from chaos.runner.order import Order
from tests.lab.conftest import Sevchaos

pytestmark = pytest.mark.lab

EIO, EINVAL, EBUSY = 5, 22, 16
NOTHING = {"groups": [], "processes": [], "charges": 0, "namespaces": 0, "tracing": []}
RESILIENCE = Path(model.__file__).parents[2] / "experiments/resilience"
KILL_DESTINATION = RESILIENCE / "kill-destination-in-move.yaml"
MOVE = RESILIENCE / "move-across-cgroups.yaml"


def order(path: Path) -> bytes:
    return msgspec.json.encode(Order(experiment=load.load(path), seed=1, host="lab")) + b"\n"


class Run:
    """One run of a script, as its history tells it."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.end = records[-1]

    def of(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]

    def answers(self, f: str) -> list[int]:
        """Errno of each operation of this name, in order; -1 where nobody can say."""
        dones = {done.op: done for done in self.of(Done)}
        found = [dones[invoke.op] for invoke in self.of(Invoke) if invoke.f == f]
        return [-1 if done.outcome == "info" else done.errno for done in found]


Carry = Any


@pytest.fixture
def carry_out(in_lab: Sevchaos, kernel: str, tmp_path: Path) -> Carry:
    """Carries out a script on VMMs a, b and c, each in the cgroup of its name."""

    def run(vms: str, *steps: str) -> Run:
        path = tmp_path / "script.yaml"
        script = "\n".join(f"  - {{do: {step}}}" for step in steps)
        vmms = "{a: {cgroup: a}, b: {cgroup: b}, c: {cgroup: c}}"
        head = "name: script\nwhy: a test\npromises: [P1]\nquestions: own"
        path.write_text(f"{head}\nvmms: {vmms}\nvms: {vms}\nscript:\n{script}\n")
        done = in_lab("python3", "-m", "chaos.runner.main", options=("--kernel", kernel), stdin=order(path))
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        return Run([records.decode(line) for line in done.stdout.splitlines()])

    return run


def current(run: Run, label: str, group: str) -> int:
    seen = next(o for o in run.of(Observation) if o.label == label)
    return int(seen.misc[group]["current"]["sev"])


def assert_clean(run: Run) -> None:
    assert isinstance(run.end, End)
    end = next(o for o in run.of(Observation) if o.label == "end")
    assert end.guests == 0 and end.dying == 0
    assert not any(sum(files["current"].values()) for files in end.misc.values())


CHAIN = (
    "{v1: {vmm: a, kind: sev}, v2: {vmm: b, kind: plain}, v3: {vmm: c, kind: plain, vcpus: 3}, "
    "v4: {vmm: a, kind: plain, vcpus: 4}}"
)


def test_a_guest_is_handed_on_and_on(carry_out: Carry) -> None:
    """A destination becomes a source, and the guest comes back to the process that it began in."""
    run = carry_out(
        CHAIN,
        *(f"launch, vm: v{n}" for n in (1, 2, 3)), "run, vm: v1, every: 1", "count, vm: v1, ticks: 20",
        "migrate, source: v1, destination: v2", "count, vm: v2, ticks: 20",
        "migrate, source: v2, destination: v3", "count, vm: v3, ticks: 20", "observe, label: third",
        "launch, vm: v4", "migrate, source: v3, destination: v4", "close, vm: v1", "close, vm: v2", "close, vm: v3",
        "count, vm: v4, ticks: 20", "observe, label: back",
    )  # fmt: skip
    assert run.end.complete, run.end.reason
    ticks = [counted.ticks for counted in run.of(Counted)]
    assert all(later >= earlier + 20 for earlier, later in itertools.pairwise(ticks))
    assert not any(counted.stale for counted in run.of(Counted))
    assert [current(run, "third", group) for group in "abc"] == [0, 0, 1]
    assert [current(run, "back", group) for group in "abc"] == [1, 0, 0]
    assert_clean(run)


TRIO = "{old: {vmm: a, kind: sev}, new: {vmm: a, kind: plain}, third: {vmm: b, kind: plain}}"


def test_refused_moves_are_answers_and_the_script_goes_on(carry_out: Carry) -> None:
    run = carry_out(
        TRIO,
        "launch, vm: old", "launch, vm: new", "launch, vm: third",
        "move, source: new, destination: third",  # not encrypted
        "move, source: old, destination: old",
        "move, source: old, destination: new",
        "move, source: old, destination: third",  # dead
        "move, source: new, destination: old",  # into the dead
        "ask, vm: new", "ask, vm: old", "status, vm: old",
    )  # fmt: skip
    assert run.end.complete, run.end.reason
    assert run.answers("move") == [EINVAL, EINVAL, 0, EINVAL, EIO]
    live, *dead = run.of(Asked)
    assert not any(answer.errno == EIO for answer in live.answers)
    assert [asked.vm for asked in dead] == ["old", "old"]  # the second time at the end, without being told
    assert all(answer.errno == EIO != answer.control for asked in dead for answer in asked.answers)
    assert run.answers("guest_status") == [EIO]
    assert_clean(run)


PAIR = "{old: {vmm: a, kind: sev}, new: {vmm: b, kind: sev, memory: other}}"


def test_a_migration_whose_move_is_refused_is_taken_back(carry_out: Carry) -> None:
    run = carry_out(
        PAIR, "launch, vm: old", "launch, vm: new", "run, vm: old, every: 1", "count, vm: old, ticks: 20",
        "migrate, source: old, destination: new", "count, vm: old, ticks: 20",
        "fault, fault: kill, target: b, options: {signal: SEGV}", "status, vm: old",
    )  # fmt: skip
    assert run.end.complete, run.end.reason
    assert run.answers("move") == [EINVAL]
    phases = [invoke.phase for invoke in run.of(Invoke) if invoke.phase]
    assert list(dict.fromkeys(phases)) == ["connect", "pause", "send-state", "send-fd", "move", "abort"]
    (ended,) = run.of(Handover)
    assert (ended.outcome, ended.phase, ended.guest) == ("refused", "move", "old")
    assert [fault.struck for fault in run.of(Fault)] == [None, True, None]
    assert_clean(run)


HELD = ("launch, vm: old", "launch, vm: new", "run, vm: old, every: 0", "count, vm: old, ticks: 9",
        "move, source: old, destination: new, wait: false")  # fmt: skip
TWO = "{old: {vmm: a, kind: sev}, new: {vmm: b, kind: plain}}"


def test_a_script_that_ends_in_a_hold_is_torn_down(carry_out: Carry) -> None:
    run = carry_out(TWO, *HELD, "hold, vm: new", "count, vm: old, ticks: 9")
    assert not run.end.complete and "an operation on new is under way" in run.end.reason
    assert [held.reached for held in run.of(Held)] == [True]
    (note,) = [note for note in run.of(Note) if note.topic == "error"]
    assert note.step == 6 and note.text == run.end.reason
    assert run.answers("move") == [0]
    assert_clean(run)


def test_a_hold_that_nothing_keeps_is_not_reached(carry_out: Carry) -> None:
    run = carry_out(TWO, *HELD[:2], HELD[4], "hold, vm: new, within: 5")
    assert not run.end.complete and "ended before it was stopped" in run.end.reason
    assert [held.reached for held in run.of(Held)] == [False]
    assert_clean(run)


def test_what_is_refused_at_launch_ends_the_script_and_leaves_nothing(carry_out: Carry) -> None:
    vms = ", ".join(f"v{n}: {{vmm: a, kind: sev, memory: m{n}}}" for n in range(9))
    run = carry_out(f"{{{vms}}}", *(f"launch, vm: v{n}" for n in range(9)))
    assert not run.end.complete and "step 8 (launch): init of v8" in run.end.reason and "EBUSY" in run.end.reason
    assert run.answers("init") == [0] * 8 + [EBUSY]
    assert_clean(run)


def test_whoever_dies_in_the_middle_of_a_run_nothing_is_left(in_lab: Sevchaos, kernel: str, tmp_path: Path) -> None:
    (tmp_path / "order.json").write_bytes(order(KILL_DESTINATION))
    (tmp_path / "migration.json").write_bytes(order(MOVE))
    script = Path(__file__).parent / "kill_runner.py"
    copies = (script, tmp_path / "order.json", tmp_path / "migration.json")
    options = ("--kernel", kernel, *(word for path in copies for word in ("--copy", str(path))))
    done = in_lab("python3", "kill_runner.py", "order.json", "migration.json", options=options)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert all(left == NOTHING for left in said["killed"].values()), said["killed"]
    assert all(left == NOTHING for left in said["migrating"].values()), said["migrating"]
    asked = said["asked"]
    assert (asked["code"], asked["left"]) == (ExitCode.INTERRUPTED, NOTHING)
    assert asked["end"]["type"] == "End" and asked["end"]["reason"] == "interrupted by SIGTERM"
    assert said["unread"] == {"code": ExitCode.INTERRUPTED, "left": NOTHING}
    both = said["both"]
    assert both["spared"] == [] and both["left"] == NOTHING
    assert both["before"]["groups"] and not both["before"]["processes"]
    group, instance = both["cleaned"]
    assert group in both["before"]["groups"] and instance in both["before"]["tracing"]


def test_what_cgroup_kill_passes_over_is_cleaned_away_all_the_same(in_lab: Sevchaos, kernel: str) -> None:
    """On kernels with finding 0012 the first word of each line is "lives", on others "ended"."""
    programs = Path(__file__).parent / "programs"
    done = in_lab("python3", "programs/leaderless.py", options=["--kernel", kernel, "--copy", str(programs)])
    assert done.returncode == 0, done.stderr.decode()
    assert [line.split()[1:] for line in done.stdout.decode().splitlines()] == [["-9", "False"]] * 2
