# SPDX-License-Identifier: Apache-2.0
"""The reports say what a run showed, in plain text of some columns, and let nothing in a history steer a terminal."""

from __future__ import annotations

import errno
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import experiments
from chaos.experiment.load import decode, encode
from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep, MigrateStep
from chaos.history.records import Asked, Fault, Handover, Held, History, Kernel, Note, Observation, Record
from chaos.judge import findings
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome, Verdict
from chaos.promises import PROMISES
from reports import as_json, junit, ktap, sentences, text
from reports.text import Run
from tests.unit.core.build import ALL, Builder, changed, destination_killed, moved, moved_es, shipped, source_killed

KNOWN = findings.load()
MOVE = "move-across-cgroups"


def run(history: History, name: str, *, accept: bool = False) -> Run:
    verdict = judge(shipped(name), history, known=KNOWN if accept else ())
    return Run(shipped(name), history, verdict, Path("runs") / name / "20260101T000000-7")


def shown(history: History, name: str, *, accept: bool = False) -> str:
    return text.render([run(history, name, accept=accept)], KNOWN)


@pytest.mark.parametrize("name", ALL)
def test_a_report_fits_into_its_columns(name: str) -> None:
    report = shown(ALL[name](), name)
    assert max(len(line) for line in report.splitlines()) <= text.WIDTH
    assert report.isprintable() is False and report.replace("\n", "").isprintable()
    assert name in report
    assert "kernel 6.12.117, host: the lab (software PSP, nothing is encrypted), seed 7" in report
    assert f"records: runs/{name}/20260101T000000-7" in report


def test_the_charges_before_and_after() -> None:
    report = shown(destination_killed(), "kill-destination-in-move")
    rows = [line.split() for line in report.splitlines()]
    assert ["cgroup", "start", "before", "held", "after", "end"] in rows
    assert [".", "-", "sev", "1", "sev", "2", "sev", "1", "-"] in rows
    assert ["destination", "-", "-", "sev", "1", "-", "-"] in rows
    assert ["firmware's", "guests", "0", "1", "1", "1", "0"] in rows


def test_steps_and_what_came_of_them() -> None:
    report = shown(destination_killed(), "kill-destination-in-move")
    for said in (
        "launch old: a SEV guest with 1 vCPU",
        "move was killed",
        "reached: state D in",
        "struck",
        "900 ticks",
    ):
        assert said in report
    assert "guest_status failed: EBADF" in shown(moved(status_error=errno.EBADF), "move-across-cgroups")
    assert "a SEV-ES guest with 2 vCPUs" in shown(moved_es(), "move-across-cgroups-es")


def test_a_migration_in_words() -> None:
    lost = Handover(
        t=1, step=6, source="old", destination="new", attempt=1, outcome="lost", phase="resume", guest="",
        why="the VMM of new is dead",
    )  # fmt: skip
    assert sentences.handed_over(lost) == "lost in resume (the VMM of new is dead)"
    done = msgspec.structs.replace(lost, attempt=2, outcome="committed", why="", stood=(1_000_000, 12_340_000))
    assert sentences.handed_over(done) == "attempt 2: committed, stood still for 12.3 ms"
    kill = FaultStep(fault="kill", target="destination")
    step = MigrateStep(source="old", destination="new", supervise="retry", before={"send-fd": (kill,)})
    experiment = msgspec.structs.replace(shipped("move-across-cgroups"), script=(step,))
    assert sentences.step(experiment, 0) == (
        "hand old over to new: state, descriptor, move, resume, in up to 2 attempts; "
        "before send-fd, apply the fault kill to destination"
    )


def test_a_run_that_was_cut_off() -> None:
    history = moved()
    cut = History(history.records[:40], "it breaks off after record 39")
    report = shown(cut, "move-across-cgroups")
    assert "The history is damaged: it breaks off after record 39" in report
    assert report.count("not reached") >= 3
    assert "?" in text.render([run(cut, "move-across-cgroups")] * 2)


def test_an_empty_history() -> None:
    report = shown(History((), "it is empty"), "move-across-cgroups")
    assert "No counter was read." in report
    assert "kernel unknown, host: unknown" in report


def test_a_finding_is_named_and_stays_a_deviation() -> None:
    history = moved(status_error=errno.EBADF)
    report = shown(history, "move-across-cgroups")
    assert "signature:\n" in report or "signature: " in report
    assert "this is finding 0001: the firmware's file descriptor is lost in the move" in report
    assert "--accept-known" in report
    assert "the run: broken; 6 kept, 1 broken; exit code 1" in report
    report = shown(history, "move-across-cgroups", accept=True)
    assert "broken (known: finding 0001" in report
    assert "the run: nothing counted against it; 6 kept, 1 broken as known; exit code 0" in report
    assert "unknown (not askable here" in shown(source_killed(), "kill-source-in-move", accept=True)


def test_kernel_events_of_a_deviation_are_told_in_their_order_with_the_operation_that_made_them() -> None:
    b = Builder(MOVE)
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.observe("before", {"source": 1})
    done = b.move("old", "new", "destination")
    b.records[done.seq] = done = msgspec.structs.replace(done, tid=333)
    left = b.traced(333, "misc_cg_try_charge", "leave", t=done.ended, returned=0)
    entered = b.traced(333, "misc_cg_try_charge", t=done.began, key="sev", amount=1, cgroup="destination")
    other = b.traced(999, "misc_cg_uncharge", t=done.t, key="sev", amount=1, cgroup="destination")
    b.observe("after", {"source": 1, "destination": 1})
    b.observe("later", {"destination": 0, "source": 0})
    history = b.finish()
    expected = (
        f"{entered.seq}: move of new entered misc_cg_try_charge (key sev, amount 1, cgroup destination)",
        f"{left.seq}: move of new left misc_cg_try_charge (returned 0)",
        f"{other.seq}: thread 999 entered misc_cg_uncharge (key sev, amount 1, cgroup destination)",
    )
    one = run(history, MOVE)
    verdict = next(judged for judged in one.verdict.verdicts if judged.promise == "P1")
    lines = list(sentences.details(verdict, history))
    assert tuple(lines[-3:]) == expected
    for form in (text.render([one], KNOWN), ktap.render([one], KNOWN), junit.render([one], KNOWN)):
        plain = " ".join(form.replace("#", " ").split())
        assert " ".join(expected[1:2]) in plain


def test_answers_that_are_not_all_the_same_are_listed_by_errno() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            first, *rest = record.answers
            return msgspec.structs.replace(record, answers=(msgspec.structs.replace(first, errno=0), *rest))
        return record

    report = shown(changed(moved(), change), "move-across-cgroups")
    assert "old, in source: 57 of 58 EIO (VM beside it: none)" in report
    assert "EIO: vm KVM_GET_CLOCK, vm KVM_MEMORY_ENCRYPT_OP GUEST_STATUS" in report
    assert "ok: vm KVM_CHECK_EXTENSION" in report
    assert "ok: vm" not in shown(moved(), "move-across-cgroups")


def test_many_observations_are_a_row_each() -> None:
    b = Builder("move-across-cgroups")
    b.begin()
    for number in range(7):
        b.observe(f"moment-{number}")
    report = shown(b.finish(), "move-across-cgroups")
    assert ["moment", ".", "destination", "source", "firmware's", "guests"] in [s.split() for s in report.splitlines()]


def test_what_could_not_be_read() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Observation):
            return msgspec.structs.replace(record, guests=None, misc={**record.misc, "source": {}})
        return record

    rows = [line.split() for line in shown(changed(moved(), change), "move-across-cgroups").splitlines()]
    assert ["firmware's", "guests", "?", "?", "?", "?"] in rows
    assert ["source", "gone", "gone", "gone", "gone"] in rows


def test_several_runs_are_summed_up() -> None:
    runs = [run(ALL[name](), name, accept=True) for name in ALL]
    runs.append(run(moved(status_error=errno.EBADF), "move-across-cgroups"))
    lines = text.render(runs).splitlines()
    rows = [line.split() for line in lines]
    assert ["Summary", "of", "kernel", "6.12.117.", "A", "row", "is"] in [row[:7] for row in rows]
    assert ["experiment", "runs", *PROMISES] in rows
    cells = {
        row[0]: dict(zip(PROMISES, row[2:], strict=True))
        for row in rows
        if row and row[1:2] in (["1"], ["2"]) and len(row) == 2 + len(PROMISES)
    }
    moves, killed, es = cells["move-across-cgroups"], cells["kill-source-in-move"], cells["move-across-cgroups-es"]
    assert [moves[promise] for promise in ("P1", "P5", "P9", "P10")] == ["kept", "FAIL", "kept", "?"]
    assert [killed[promise] for promise in ("P1", "P3")] == ["kept", "(??)"]
    assert (es["P5"], es["P4"]) == ("skip", "kept")
    known = run(moved(status_error=errno.EBADF), "move-across-cgroups", accept=True)
    assert "fail" in text.render([known, run(moved(), "move-across-cgroups")])
    assert max(len(line) for line in lines) <= text.WIDTH


def test_a_summary_of_the_whole_catalogue_keeps_a_line_for_each_experiment() -> None:
    one = run(moved(), MOVE, accept=True)
    every = tuple(
        Verdict(promise=promise, outcome=Outcome.BROKEN, reason="", accepted="a finding") for promise in PROMISES
    )
    runs = [
        Run(
            one.experiment,
            one.history,
            msgspec.structs.replace(one.verdict, experiment=name, verdicts=every),
            one.directory,
        )
        for name in experiments.catalogue()
    ]
    summary = text.render(runs).partition("Summary")[2].splitlines()
    assert max(len(line) for line in summary) <= text.WIDTH
    rows = [line.split() for line in summary]
    assert all([name, *["fail"] * len(PROMISES)] in rows for name in experiments.catalogue())


def test_nothing_in_a_history_steers_a_terminal() -> None:
    evil = "\x1b[31m[red]evil[/red]\x07\u2028"

    def change(record: Record) -> Record:
        if isinstance(record, Held):
            return msgspec.structs.replace(record, sleeping=evil)
        if isinstance(record, Observation):
            return msgspec.structs.replace(record, label=f"{record.label}{evil}", misc={**record.misc, evil: {}})
        if isinstance(record, Asked):
            answers = (msgspec.structs.replace(record.answers[0], errno=0, ioctl=evil), *record.answers[1:])
            return msgspec.structs.replace(record, answers=answers)
        return record

    b = Builder("kill-destination-in-move", kernel=evil)
    b.kernel(f"BUG: {evil}")
    b.count(evil, evil, 1)
    for history in (changed(destination_killed(), change), b.finish()):
        report = shown(history, "kill-destination-in-move")
        assert report.replace("\n", "").isprintable()
    assert "[red]evil[/red]" in report


def test_it_is_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    text.show([run(moved(), "move-across-cgroups")], stream)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue() == shown(moved(), "move-across-cgroups")


def test_it_has_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    text.show([run(moved(), "move-across-cgroups")], stream)
    assert "\x1b[" in stream.getvalue()


def test_it_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    text.show([run(moved(), "move-across-cgroups")])
    assert "move-across-cgroups" in capsys.readouterr().out


EVERY_STEP = b"""{"name": "all", "why": "w", "promises": ["P1"], "vmms": {"m": {"cgroup": "c"}},
 "vms": {"v": {"vmm": "m", "kind": "sev"}, "w": {"vmm": "m", "kind": "plain", "vcpus": 2}}, "script": [
 {"do": "launch", "vm": "v"}, {"do": "launch", "vm": "w"}, {"do": "run", "vm": "v", "every": 0},
 {"do": "run", "vm": "v", "every": 8}, {"do": "count", "vm": "v", "ticks": 1}, {"do": "pause", "vm": "v"},
 {"do": "migrate", "source": "v", "destination": "w"}, {"do": "move", "source": "v", "destination": "w"},
 {"do": "join", "vm": "w"}, {"do": "hold", "vm": "w"}, {"do": "ask", "vm": "v"},
 {"do": "status", "vm": "v"}, {"do": "observe", "label": "l"},
 {"do": "fault", "fault": "kill", "target": "m", "options": {"signal": 9}}, {"do": "close", "vm": "v"},
 {"do": "create", "vm": "v"}, {"do": "call", "vm": "v", "operation": "launch_start"}, {"do": "undo", "fault": "kill",
 "target": "m"}, {"do": "arm", "hold": "h", "kernel": {"function": "f", "vmm": "m", "nth": 2}},
 {"do": "arm", "hold": "i", "firmware": {"command": "GUEST_STATUS"}}, {"do": "arm", "hold": "j", "page": {"vm": "v"}},
 {"do": "release", "hold": "h"}, {"do": "init", "vm": "w", "command": "init2", "flags": 2, "ghcb": 1},
 {"do": "init", "vm": "w", "each": "features"}, {"do": "vcpu", "vm": "w", "id": 7},
 {"do": "together", "steps": [{"do": "mirror", "source": "v", "vm": "w"},
  {"do": "moves", "destination": "v", "sources": ["v", "w"], "rounds": 9, "threads": 2}],
  "meanwhile": [{"do": "ask", "vm": "v"}]},
 {"do": "command", "vm": "w", "ids": "0-3,5"}, {"do": "move", "destination": "w", "fd": "pipe", "flags": 1}]}"""


def everything() -> Experiment:
    return decode(EVERY_STEP)


def test_every_step_has_its_words() -> None:
    experiment = everything()
    said = [sentences.step(experiment, number) for number in range(len(experiment.script))]
    assert len(set(said)) == len(experiment.script)
    assert "an empty VM with 2 vCPUs" in said[1]
    assert said[2:4] == ["let v run, without ever leaving the guest", "let v run, reporting every 8 ticks"]
    assert said[13] == "apply the fault kill signal=9 to m"
    assert said[-6:] == [
        "init2, flags 0x2, ghcb 0x1 of w",
        "init with every bit of features alone of w",
        "create vCPU 7 of w",
        "at one moment: make w a mirror of v; 9 rounds of moves into v from v, w by 2 threads; meanwhile ask every "
        "descriptor of v, in its own process, whether it is dead",
        "give w the SEV commands 0-3,5, without data",
        "move the context of a wrong descriptor (pipe), with flags 0x1 into w",
    ]
    assert decode(encode(experiment)) == experiment


def test_results_of_steps() -> None:
    experiment = everything()
    b = Builder()
    b.add(Held(t=b.tick(), op=1, step=0, hold="vcpu-running", reached=False, state="R", sleeping=""))
    b.add(Held(t=b.tick(), op=1, step=1, hold="vcpu-running", reached=True, state="D", sleeping=""))
    b.count("v", "m", 5, step=2, stale=2)
    b.add(Fault(t=b.tick(), fault="kill", event="evidence", step=3, target="m", struck=None))
    b.add(Note(t=b.tick(), topic="skipped", text="not here", step=4))
    b.invoke("pause", "m", step=5, vm="v")
    b.do("init", "m", step=6, vm="v", error=errno.EIO, firmware=0x17)
    b.done(b.invoke("init", "m", step=6, vm="v"), "fail", error=errno.ENOMEM, value={"call": "KVM_CREATE_VCPU"})
    history = b.history()
    assert [sentences.result(experiment, history, number) for number in range(8)] == [
        "not reached in time",
        "reached: state D",
        "5 ticks, 2 stale",
        "nothing shows that it struck",
        "not here",
        "pause never answered",
        "init failed: EIO (firmware status 0x17), init failed: ENOMEM, of KVM_CREATE_VCPU",
        "not reached",
    ]
    b.do("exit", "m", step=len(experiment.script))
    assert sentences.result(experiment, b.history(), 7) == "not reached"
    assert sentences.result(experiment, b.end(), 7) == ""  # complete: the step left no record


def test_the_machine_s_report() -> None:
    runs = [
        run(moved(status_error=errno.EBADF), "move-across-cgroups", accept=True),
        run(moved_es(), "move-across-cgroups-es"),
    ]
    told = json.loads(as_json.render(runs))
    first, second = told["runs"]
    assert (told["format"], told["exit_code"]) == (2, 0)
    assert {key: first[key] for key in ("experiment", "kernel", "host", "seed", "outcome", "exit_code", "damage")} == {
        "experiment": "move-across-cgroups", "kernel": "6.12.117", "host": "lab", "seed": 7, "outcome": "broken",
        "exit_code": 0, "damage": "",
    }  # fmt: skip
    assert first["directory"] == "runs/move-across-cgroups/20260101T000000-7"
    assert first["verdicts"][3]["signature"] == "guest_status-after-move:EBADF"
    assert first["verdicts"][3]["accepted"].startswith("finding 0001")
    assert second["outcome"] == "kept"


def test_kernel_lines_are_quoted_whole() -> None:
    b = Builder("move-across-cgroups")
    b.kernel("Oops: 0002 [#1] PREEMPT SMP")
    assert isinstance(b.records[-1], Kernel)
    assert "the kernel said: Oops: 0002 [#1] PREEMPT SMP" in shown(b.finish(), "move-across-cgroups")


def test_many_answers_of_a_step_are_counted() -> None:
    b = Builder()
    b.begin()
    for number in range(9):
        refused = b.invoke("command", "source", step=0, vm="old", id=number)
        b.done(refused, "fail", error=errno.EINVAL, value={"call": f"KVM_MEMORY_ENCRYPT_OP {number}"})
    b.done(b.invoke("command", "source", step=0, vm="old", id=16), "fail", error=errno.EFAULT)
    said = sentences.result(everything(), b.finish(), 0)
    assert said == "9 times: command failed: EINVAL, command failed: EFAULT"


@pytest.mark.parametrize("render", [text.render, as_json.render, junit.render, ktap.render])
def test_a_report_says_held_of_operations_only(render: Callable[[list[Run]], str]) -> None:
    """Promises are kept; *held* is an operation that is stopped inside the kernel, and here none was."""
    reports = render([run(moved(), "move-across-cgroups"), run(moved(status_error=errno.EBADF), "move-across-cgroups")])
    assert "kept" in reports or "ok" in reports
    assert not re.search(r"\bheld\b|\bdeviated\b", reports)
