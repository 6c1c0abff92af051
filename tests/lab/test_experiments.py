# SPDX-License-Identifier: Apache-2.0
"""The first experiments on stock kernels, judged from their history as a reader of it would."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from chaos.errors import ExitCode
from chaos.history.records import Asked, Counted, Done, Fault, Header, Held, History, Invoke, Note, Observation
from chaos.judge.timeline import During
from tests.lab.conftest import Once, Sevchaos
from tests.lab.told import Told, carried_out, charges

pytestmark = pytest.mark.lab

FIRST = ("move-across-cgroups", "move-across-cgroups-es", "kill-destination-in-move", "kill-source-in-move")
LOCKS_VCPUS = ("sev_lock_vcpus_for_migration", "kvm_lock_all_vcpus")  # before 6.16, and from then on
EIO = 5


@pytest.fixture
def told(once: Once[Told], kernel: str, sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """All four on one kernel."""
    return once(kernel, lambda: carried_out(sevchaos, tmp_path_factory.mktemp("runs"), kernel, *FIRST))


def test_histories_are_whole(told: Told) -> None:
    for name in FIRST:
        read = told.history(name)
        assert read.damage == ""
        assert read.end is not None and read.end.complete
        assert isinstance(read.records[0], Header) and read.records[0].seed == 7


def test_the_charge_follows_a_move(told: Told) -> None:
    read = told.history("move-across-cgroups")
    assert charges(read, "before") == {".": {"sev": 1}, "source": {"sev": 1}, "destination": {}}
    assert charges(read, "after") == {".": {"sev": 1}, "source": {}, "destination": {"sev": 1}}
    assert charges(read, "end") == {".": {}, "source": {}, "destination": {}}
    assert told.outcomes("move-across-cgroups")["P1"] == "kept"


def charged(told: History, f: str) -> list[tuple[str, ...]]:
    """(function, key, cgroup) of what the kernel was seen to charge and give back in the operations of this name."""
    during = During(told)
    ops = [invoke.op for invoke, _ in told.operations() if invoke.f == f]
    events = [event for op in ops for event in during.events.get(op, ()) if "key" in event.values]
    return [(event.function, str(event.values["key"]), str(event.values.get("cgroup", ""))) for event in events]


@pytest.mark.parametrize(("name", "key"), [("move-across-cgroups", "sev"), ("move-across-cgroups-es", "sev_es")])
def test_the_kernels_own_events_show_who_charges_whom(told: Told, name: str, key: str) -> None:
    """A moved SEV-ES context is charged as a plain one: finding 0002, in the kernel's own words."""
    read = told.history(name)
    assert not [r.text for r in read.records if isinstance(r, Note) and "kernel events" in r.text]
    assert charged(read, "init") == [("misc_cg_try_charge", key, "source")]
    assert charged(read, "move") == [
        ("misc_cg_try_charge", "sev", "destination"), ("misc_cg_uncharge", "sev", "source")
    ]  # fmt: skip
    assert charged(read, "close") == [("misc_cg_uncharge", key, "destination")]


def test_the_kernels_own_events_show_the_steps_of_a_move_that_was_killed(told: Told) -> None:
    read = told.history("kill-destination-in-move")
    (move,) = (invoke for invoke, _ in read.operations() if invoke.f == "move")
    steps = [(event.event, event.function) for event in During(read).events[move.op]]
    assert steps[0] == ("enter", "sev_vm_move_enc_context_from")
    # Whichever thread of a dying process is the last closes its VM: this one, or the agent's first.
    assert [step for step in steps if step != ("enter", "sev_vm_destroy")][-1] == ("leave", steps[0][1])
    locks = {("enter", name) for name in LOCKS_VCPUS}
    waits = [number for number, step in enumerate(steps) if step in locks]
    assert len(waits) == 2 and steps.index(("leave", "misc_cg_try_charge")) < waits[0]
    assert charged(read, "move") == [
        ("misc_cg_try_charge", "sev", "destination"), ("misc_cg_uncharge", "sev", "destination")
    ]  # fmt: skip


def test_the_guest_counts_on_where_it_stopped(told: Told) -> None:
    counted = [r for r in told.history("move-across-cgroups").records if isinstance(r, Counted)]
    assert [record.vm for record in counted] == ["old", "new"]
    assert counted[1].ticks >= counted[0].ticks + 100
    assert [record.stale for record in counted] == [0, 0]


@pytest.mark.parametrize("name", ["move-across-cgroups", "move-across-cgroups-es"])
def test_every_descriptor_of_the_source_answers_eio(told: Told, name: str) -> None:
    asked = next(r for r in told.history(name).records if isinstance(r, Asked))
    assert asked.vm == "old" and asked.agent == "source"
    assert len(asked.answers) > 10
    assert {answer.errno for answer in asked.answers} == {EIO}
    assert EIO not in {answer.control for answer in asked.answers}
    assert told.outcomes(name)["P3"] == "kept"


def test_guests_are_looked_at_and_the_dead_are_asked_to_the_very_end(told: Told) -> None:
    """By the runner, after the script: what the vCPUs say when they are taken out, and the source once more."""
    records = told.history("move-across-cgroups").records
    last = next(r.step for r in records if isinstance(r, Observation) and r.label == "end")
    ended = [r for r in records if getattr(r, "step", -1) == last and isinstance(r, Invoke | Asked)]
    assert [r.f if isinstance(r, Invoke) else "ask" for r in ended][:3] == ["pause", "ask", "close"]
    paused, asked = ended[:2]
    assert isinstance(paused, Invoke) and isinstance(asked, Asked)
    assert (paused.args["vm"], asked.vm, asked.device) == ("new", "old", 0)
    said = next(r.value for r in records if isinstance(r, Done) and r.op == paused.op)
    assert (said["astray"], said["torn"], said["ended"]) == ([], [], "")
    assert {answer.fd for answer in asked.answers} == {"vm", "vcpu 0", "device"}


def test_both_cgroups_are_charged_while_the_move_waits(told: Told) -> None:
    read = told.history("kill-destination-in-move")
    held = next(r for r in read.records if isinstance(r, Held))
    assert held.reached and held.state == "D"
    assert held.sleeping in LOCKS_VCPUS
    assert charges(read, "held") == {".": {"sev": 2}, "source": {"sev": 1}, "destination": {"sev": 1}}
    assert charges(read, "after") == {".": {"sev": 1}, "source": {"sev": 1}, "destination": {}}


def test_after_the_destination_was_killed_everything_holds(told: Told) -> None:
    name = "kill-destination-in-move"
    assert set(told.outcomes(name).values()) == {"kept"}
    read = told.history(name)
    counted = [r.ticks for r in read.records if isinstance(r, Counted)]
    assert counted[-1] >= counted[0] + 100
    asked = next(r for r in read.records if isinstance(r, Asked))
    assert EIO not in {answer.errno for answer in asked.answers}


def test_a_dead_process_cannot_be_asked(told: Told) -> None:
    name = "kill-source-in-move"
    assert told.outcomes(name)["P3"] == "unknown"
    assert "not askable" in told.accepted(name)["P3"]
    assert {promise for promise, outcome in told.outcomes(name).items() if outcome != "kept"} == {"P3"}
    assert charges(told.history(name), "after") == {".": {"sev": 1}, "source": {}, "destination": {"sev": 1}}


def test_planned_faults_took_effect(told: Told) -> None:
    for name in ("kill-destination-in-move", "kill-source-in-move"):
        events = [r for r in told.history(name).records if isinstance(r, Fault)]
        assert [r.event for r in events] == ["apply", "evidence", "undo"]
        assert events[1].struck is True


def test_deviations_are_findings_and_stay_visible(told: Told) -> None:
    for name in ("move-across-cgroups", "move-across-cgroups-es"):
        deviated = {p for p, outcome in told.outcomes(name).items() if outcome == "broken"}
        assert deviated, "stock kernels lose the firmware's descriptor in a move; see docs/findings"
        assert all("finding" in told.accepted(name)[promise] for promise in deviated)
        assert told.runs[name]["outcome"] == "broken"


def test_without_accept_known_a_deviation_counts(sevchaos: Sevchaos, tmp_path: Path) -> None:
    done = sevchaos("run", "move-across-cgroups", "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.BROKEN


def test_a_stored_run_is_judged_again_the_same(told: Told, sevchaos: Sevchaos) -> None:
    directories = [told.runs[name]["directory"] for name in FIRST]
    done = sevchaos("check", "--accept-known", "--json", *directories)
    assert done.returncode == ExitCode.KEPT
    again = Told(done.stdout)
    assert [again.outcomes(name) for name in FIRST] == [told.outcomes(name) for name in FIRST]


def test_inside_the_lab_with_its_own_sev_the_verdicts_are_the_same(told: Told, kernel: str, sevchaos: Sevchaos) -> None:
    inside = ["sevchaos", "run", *FIRST, "--host", "local", "--accept-known", "--json", "--runs", "/tmp/runs"]
    done = sevchaos("lab", "run", "--quiet", "--kernel", kernel, "--", *inside)
    assert done.returncode == ExitCode.KEPT, done.stderr.decode()
    local = Told(done.stdout)
    assert {run["host"] for run in local.runs.values()} == {"local"}
    for name in FIRST:
        # Nobody stands between driver and firmware there, so P13 cannot be asked; and the run leaves ASIDs to the host,
        # so P9 cannot see whether one of those is lost. Everything else that is listed is as in the lab.
        instead = {"P13": "skipped"} | ({"P9": "skipped"} if told.outcomes(name)["P9"] == "kept" else {})
        listed = {v["promise"] for v in local.runs[name]["verdicts"] if v["listed"]}
        seen, due = local.outcomes(name), {**told.outcomes(name), **instead}
        assert {p: seen[p] for p in listed} == {p: due[p] for p in listed}


def test_twenty_restores_of_one_snapshot_give_twenty_equal_verdicts(sevchaos: Sevchaos, tmp_path: Path) -> None:
    twenty = ("--repeat", "20", "--fresh", "--seed", "0", "--json", "--runs", str(tmp_path))
    done = sevchaos("run", "kill-destination-in-move", *twenty)
    assert done.returncode == ExitCode.KEPT
    runs = msgspec.json.decode(done.stdout)["runs"]
    assert [(run["seed"], run["earlier"]) for run in runs] == [(seed, 0) for seed in range(20)]
    verdicts = Counter(tuple((v["promise"], v["outcome"]) for v in run["verdicts"]) for run in runs)
    assert list(verdicts.values()) == [20]


def test_runs_that_leave_no_trace_share_a_lab_and_say_so(sevchaos: Sevchaos, tmp_path: Path) -> None:
    """The second run has none before it, because the first left a deviation of the accounts of SEV-ES there."""
    names = ("move-across-cgroups-es", "kill-destination-in-move", "kill-source-in-move")
    told = carried_out(sevchaos, tmp_path, "debian:6.12", *names)
    assert [(name, run["earlier"]) for name, run in told.runs.items()] == list(zip(names, (0, 0, 1), strict=True))
