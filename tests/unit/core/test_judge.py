# SPDX-License-Identifier: Apache-2.0
"""From a history to a verdict on the run: what makes a run void, and what is accepted."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.errors import ExitCode, InternalError
from chaos.experiment.model import Unaskable
from chaos.experiment.steps import FaultStep, MigrateStep
from chaos.history.records import (
    Answer,
    Asked,
    Done,
    End,
    Exited,
    Fault,
    Header,
    Held,
    History,
    Invoke,
    Kernel,
    Note,
    Observation,
    Record,
)
from chaos.judge import findings
from chaos.judge.checkers import CHECKERS
from chaos.judge.findings import Versions, matching, parse
from chaos.judge.judge import judge, shortcomings
from chaos.judge.verdict import Outcome, RunVerdict, Verdict, exit_code
from chaos.linux.version import series
from tests.unit.core.build import ALL, Builder, changed, destination_killed, moved, shipped, source_killed

KNOWN = findings.load()


def outcomes(verdict: RunVerdict) -> dict[str, Outcome]:
    """Of the promises that the experiment lists."""
    return {judged.promise: judged.outcome for judged in verdict.verdicts if judged.listed}


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_that_keeps_its_promises(name: str) -> None:
    verdict = judge(shipped(name), ALL[name](), known=KNOWN)
    assert verdict.exit_code is ExitCode.KEPT
    assert (verdict.experiment, verdict.kernel, verdict.host, verdict.seed) == (name, "6.12.117", "lab", 7)
    assert list(outcomes(verdict)) == list(shipped(name).promises)


def test_a_promise_without_a_checker_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHECKERS, "P13")
    experiment = msgspec.structs.replace(shipped("move-across-cgroups"), promises=("P1", "P13"))
    verdict = judge(experiment, moved())
    assert outcomes(verdict) == {"P1": Outcome.KEPT, "P13": Outcome.UNKNOWN}
    assert verdict.verdicts[1].reason == "no checker judges this promise yet"
    assert verdict.exit_code is ExitCode.UNKNOWN


def cut(history: History, damage: str = "line 9 is damaged") -> History:
    return History(history.records[:-1], damage)


def incomplete(record: Record) -> Record:
    return (
        msgspec.structs.replace(record, complete=False, reason="step 7: no space")
        if isinstance(record, End)
        else record
    )


def test_a_damaged_history_shows_nothing_but_deviations() -> None:
    verdict = judge(shipped("move-across-cgroups"), cut(moved(status_error=errno.EBADF)), known=KNOWN)
    expected = dict.fromkeys(("P1", "P3", "P4", "P9", "P12", "P13"), Outcome.UNKNOWN) | {"P5": Outcome.BROKEN}
    assert outcomes(verdict) == expected
    assert verdict.verdicts[0].reason.startswith("the history is damaged: line 9 is damaged (otherwise kept: ")
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.exit_code is ExitCode.UNKNOWN  # the deviation is a written finding, the rest is not excused


def test_a_skip_falls_with_what_held_beside_it() -> None:
    verdict = judge(shipped("move-across-cgroups-es"), cut(ALL["move-across-cgroups-es"]()))
    assert set(outcomes(verdict).values()) == {Outcome.UNKNOWN}


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (History((), "it is empty"), "the history is damaged: it is empty"),
        (History(moved().records[:-1]), "the history breaks off"),
        (changed(moved(), incomplete), "the run is incomplete: step 7: no space"),
        (source_killed(), "the history is of another experiment, kill-source-in-move"),
    ],
)
def test_what_makes_a_run_worthless(history: History, reason: str) -> None:
    verdict = judge(shipped("move-across-cgroups"), history)
    assert Outcome.KEPT not in outcomes(verdict).values()
    assert any(reason in judged.reason for judged in verdict.verdicts)


def test_an_empty_history_has_no_host() -> None:
    verdict = judge(shipped("move-across-cgroups"), History((), "it is empty"), known=KNOWN)
    assert (verdict.kernel, verdict.host, verdict.seed) == ("", "", 0)
    assert verdict.exit_code is ExitCode.UNKNOWN


LACKING = "kernel 6.1.192 has no VMs of type 2"


def nothing_done(note: str = LACKING, reason: str = LACKING, *, complete: bool = False, step: int = -1) -> Builder:
    b = Builder("move-across-cgroups", kernel="6.1.192")
    b.add(Note(t=b.tick(), topic="skipped", text=note, step=step))
    b.add(End(t=b.tick(), complete=complete, reason=reason))
    return b


def test_what_the_kernel_does_not_know_is_skipped_as_a_whole_and_never_held() -> None:
    verdict = judge(shipped("move-across-cgroups"), nothing_done().history(), known=KNOWN)
    assert set(outcomes(verdict).values()) == {Outcome.SKIPPED}
    assert {judged.reason for judged in verdict.verdicts} == {LACKING}
    assert verdict.exit_code is ExitCode.SKIPPED


@pytest.mark.parametrize(
    "builder",
    [
        nothing_done(reason=f"{LACKING}; a cgroup could not be removed"),
        nothing_done(reason=""),
        nothing_done(step=3),  # a step that was skipped, not the run
    ],
)
def test_anything_else_beside_it_is_not_a_skip(builder: Builder) -> None:
    verdict = judge(shipped("move-across-cgroups"), builder.history())
    assert set(outcomes(verdict).values()) == {Outcome.UNKNOWN}


def test_a_run_that_did_something_was_not_skipped() -> None:
    b = nothing_done()
    end = b.records.pop()
    b.spawn("source")
    b.add(end)
    assert Outcome.SKIPPED not in outcomes(judge(shipped("move-across-cgroups"), b.history())).values()


def test_a_deviation_is_not_skipped_away() -> None:
    b = nothing_done()
    end = b.records.pop()
    b.add(Kernel(t=b.tick(), level=0, text="kernel BUG at arch/x86/kvm/x86.c:1!"))
    b.add(end)
    verdict = judge(shipped("move-across-cgroups"), b.history())
    assert outcomes(verdict)["P12"] is Outcome.BROKEN and verdict.exit_code is ExitCode.BROKEN


def test_a_fault_that_did_not_strike_makes_the_run_void() -> None:
    def change(record: Record) -> Record:
        return msgspec.structs.replace(record, struck=False) if isinstance(record, Fault) and record.struck else record

    verdict = judge(shipped("kill-destination-in-move"), changed(destination_killed(), change), known=KNOWN)
    assert set(outcomes(verdict).values()) == {Outcome.UNKNOWN}
    assert "nothing shows that the fault 'kill' of step 8 struck destination" in verdict.verdicts[0].reason
    assert verdict.exit_code is ExitCode.UNKNOWN


def test_each_fault_of_a_step_has_to_strike() -> None:
    """Those inside a migration all have its number."""
    storms = FaultStep(fault="storm", target="source"), FaultStep(fault="storm", target="source")
    migrate = MigrateStep(source="old", destination="new", before={"pause": storms[:1], "move": storms[1:]})
    experiment = msgspec.structs.replace(shipped("move-across-cgroups"), script=(migrate,))
    for strikes, lacking in ((2, 0), (1, 1), (0, 2)):
        b = Builder("move-across-cgroups")
        for _ in range(strikes):
            b.add(Fault(t=b.tick(), fault="storm", event="evidence", step=0, target="source", struck=True))
        assert len(list(shortcomings(experiment, b.end()))) == lacking


@pytest.mark.parametrize(("moving", "void"), [(True, False), (False, True)])
def test_a_fatal_signal_that_was_sent_and_did_not_kill_makes_no_run_void(*, moving: bool, void: bool) -> None:
    """It was sent to a process in the middle of a move. That this outlives it is what P8 is about."""

    def change(record: Record) -> Record | None:
        late = isinstance(record, Exited) and record.agent == "destination" and record.status == -9
        ended = isinstance(record, Done) and record.outcome == "info"
        if isinstance(record, Fault) and record.event == "evidence":
            return msgspec.structs.replace(record, struck=False)
        return None if (moving and (late or ended)) else record

    told = list(shortcomings(shipped("kill-destination-in-move"), changed(destination_killed(), change)))
    assert any("nothing shows that the fault 'kill'" in each for each in told) is void


def test_a_fault_without_evidence_makes_the_run_void() -> None:
    def change(record: Record) -> Record | None:
        return None if isinstance(record, Fault) and record.event == "evidence" else record

    verdict = judge(shipped("kill-source-in-move"), changed(source_killed(), change), known=KNOWN)
    assert set(outcomes(verdict).values()) == {Outcome.UNKNOWN}
    assert not any(judged.accepted for judged in verdict.verdicts)  # not even what is unaskable: nothing was tried


def test_a_hold_that_was_not_reached_makes_the_run_void() -> None:
    def change(record: Record) -> Record:
        return msgspec.structs.replace(record, reached=False) if isinstance(record, Held) else record

    verdict = judge(shipped("kill-source-in-move"), changed(source_killed(), change))
    assert set(outcomes(verdict).values()) == {Outcome.UNKNOWN}
    assert "the hold 'vcpu-running' of step 7 was not reached" in verdict.verdicts[0].reason


def test_a_deviation_counts_unless_it_is_a_written_finding() -> None:
    history = moved(status_error=errno.EBADF)
    assert judge(shipped("move-across-cgroups"), history).exit_code is ExitCode.BROKEN
    verdict = judge(shipped("move-across-cgroups"), history, known=KNOWN)
    assert verdict.exit_code is ExitCode.KEPT
    assert verdict.outcome is Outcome.BROKEN
    assert verdict.verdicts[3].accepted == "finding 0001: the firmware's file descriptor is lost in the move"


@pytest.mark.parametrize("kernel", ["6.6.100", "", "7.1.5"])
def test_a_finding_of_another_kernel_excuses_nothing(kernel: str) -> None:
    def change(record: Record) -> Record:
        return msgspec.structs.replace(record, kernel=kernel) if isinstance(record, Header) else record

    history = changed(moved(status_error=errno.EBADF), change)
    assert judge(shipped("move-across-cgroups"), history, known=KNOWN).exit_code is ExitCode.BROKEN


def test_another_deviation_is_not_excused() -> None:
    history = moved(status_error=errno.EINVAL)
    assert judge(shipped("move-across-cgroups"), history, known=KNOWN).exit_code is ExitCode.BROKEN

    def uncharged(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == "after":
            return msgspec.structs.replace(record, misc={**record.misc, "source": {"current": {"sev": 1}}})
        return record

    both = changed(moved(status_error=errno.EBADF), uncharged)
    assert judge(shipped("move-across-cgroups"), both, known=KNOWN).exit_code is ExitCode.BROKEN


def test_another_unknown_of_the_same_promise_is_not_accepted() -> None:
    """Beside the source that is dead, which is stated, somebody asked where no answer means anything."""
    told = list(source_killed().records)
    at = next(number for number, record in enumerate(told) if isinstance(record, Observation) and record.label == "end")
    answers = (Answer(fd="vm", ioctl="KVM_GET_CLOCK", errno=errno.EIO, control=0),)
    told.insert(at, Asked(t=told[at].t, agent="destination", vm="old", step=12, answers=answers))
    history = changed(History(tuple(told)), lambda record: record)
    experiment = shipped("kill-source-in-move")
    verdict = judge(experiment, history, known=KNOWN)
    (dead,) = [judged for judged in verdict.verdicts if judged.promise == "P3"]
    assert (dead.outcome, dead.signature, dead.accepted) == (Outcome.UNKNOWN, "", "")
    assert verdict.exit_code is ExitCode.UNKNOWN
    stated = {"P3": Unaskable(signature="firmware-gone", why="it is another reason")}
    other = msgspec.structs.replace(experiment, unaskable=stated)
    assert judge(other, source_killed(), known=KNOWN).exit_code is ExitCode.UNKNOWN


def test_what_cannot_be_asked_is_accepted_with_its_reason() -> None:
    experiment = shipped("kill-source-in-move")
    assert judge(experiment, source_killed()).exit_code is ExitCode.UNKNOWN
    verdict = judge(experiment, source_killed(), known=KNOWN)
    assert verdict.exit_code is ExitCode.KEPT
    assert outcomes(verdict)["P3"] is Outcome.UNKNOWN
    assert verdict.verdicts[1].accepted.startswith("not askable here: the source process is dead")


def test_an_unknown_that_the_experiment_does_not_state_is_not_accepted() -> None:
    history = changed(moved(), lambda record: None if isinstance(record, Asked) else record)
    assert judge(shipped("move-across-cgroups"), history, known=KNOWN).exit_code is ExitCode.UNKNOWN


def test_a_finding_may_show_in_several_promises() -> None:
    """Finding 0002, as the kernels show it."""
    minus_one = (1 << 64) - 1
    counters = {
        "after": {"source": {"sev": minus_one, "sev_es": 1}, "destination": {"sev": 1, "sev_es": 0}},
        "end": {"source": {"sev": minus_one, "sev_es": 1}, "destination": {"sev": 1, "sev_es": minus_one}},
    }

    def change(record: Record) -> Record:
        if isinstance(record, Observation) and record.label in counters:
            read = {cgroup: {"current": current} for cgroup, current in counters[record.label].items()}
            return msgspec.structs.replace(record, misc={**record.misc, **read})
        return record

    records = list(changed(ALL["move-across-cgroups-es"](), change).records)
    warning = "WARNING: CPU: 0 PID: 190 at kernel/cgroup/misc.c:119 misc_cg_uncharge+0x84/0x90"
    move = next(record for record in records if isinstance(record, Invoke) and record.f == "move")
    records.insert(-1, Kernel(seq=len(records) - 1, t=move.t, level=4, text=warning))
    records[-1] = msgspec.structs.replace(records[-1], seq=len(records) - 1)
    history = History(tuple(records))
    verdict = judge(shipped("move-across-cgroups-es"), history, known=KNOWN)
    deviated = [judged for judged in verdict.verdicts if judged.outcome is Outcome.BROKEN]
    assert [judged.promise for judged in deviated] == ["P1", "P9", "P12"]
    assert {judged.accepted for judged in deviated} == {str(KNOWN[1])}
    assert "source: misc.current sev = -1, expected 0" in deviated[0].reason
    assert "source sev -1" in deviated[1].reason
    assert verdict.exit_code is ExitCode.KEPT


# Findings


def test_series() -> None:
    assert [series(k) for k in ("6.12.117", "6.1", "6.1-rc3", "7.3.0-rc5", "", "6", "linux")] == [
        "6.12", "6.1", "6.1", "7.3", "", "", "",
    ]  # fmt: skip


def test_only_deviations_match() -> None:
    held = Verdict(promise="P5", outcome=Outcome.KEPT, reason="", signature="guest_status-after-move:EBADF")
    assert matching(held, "6.12.117", KNOWN) is None
    unsigned = Verdict(promise="P5", outcome=Outcome.BROKEN, reason="")
    assert matching(unsigned, "6.12.117", KNOWN) is None


ENTRY = {
    "id": "0001", "title": "t", "document": "d", "deviations": [{"promise": "P5", "signature": "s"}],
    "kernels": {"6.1": {"seen": ["6.1.192"]}}, "shown_by": ["x"],
}  # fmt: skip


def listed(**changes: object) -> bytes:
    return msgspec.yaml.encode([{**ENTRY, **changes}])


def test_findings_are_read() -> None:
    (finding,) = parse(listed())
    assert str(finding) == "finding 0001: t"
    assert finding.kernels == {"6.1": Versions(seen=("6.1.192",))}


@pytest.mark.parametrize(
    "data",
    [
        b"- [",
        b"- {}",
        listed(id="1"),
        listed(deviations=[]),
        listed(deviations=[{"promise": "P99", "signature": "s"}]),
        listed(deviations=[{"promise": "P1", "signature": ""}]),
        listed(kernels={}),
        listed(kernels={"6.1": {"seen": ["6.12.3"]}}),
        listed(kernels={"6.1": {"seen": []}}),
        listed(kernels={"6.1": {"seen": ["6.1.3"], "fixed": "6.12.4"}}),
        listed(kernels={"6.1": {"seen": ["6.1.3"], "fixed": "6.1.3"}}),
        listed(shown_by=[]),
        listed(kernels={"6": {"seen": ["6.1.2"]}}),
        listed() + listed(),
        listed(unheard="of"),
    ],
)
def test_wrong_findings_are_a_bug_of_ours(data: bytes) -> None:
    with pytest.raises(InternalError, match=r"chaos/judge/known\.yaml"):
        parse(data)


def test_what_a_run_leaves_on_its_host_shows_in_the_exit_code() -> None:
    b = Builder("move-across-cgroups")
    b.records = list(moved().records[:-1])
    b.t = b.records[-1].t
    b.add(Note(t=b.tick(), topic="left", text="a namespace"))
    left = judge(shipped("move-across-cgroups"), b.end(complete=False, reason="a namespace"))
    assert (left.left, left.outcome, left.exit_code) == ("a namespace", Outcome.UNKNOWN, ExitCode.UNCLEAN)
    clean = judge(shipped("move-across-cgroups"), moved())
    assert (clean.left, clean.exit_code) == ("", ExitCode.KEPT)
    assert exit_code([clean, left]) is ExitCode.UNCLEAN
    deviated = Verdict(promise="P1", outcome=Outcome.BROKEN, reason="a charge that is wrong")
    wrong = msgspec.structs.replace(left, verdicts=(deviated,))
    assert exit_code([left, wrong]) is ExitCode.BROKEN  # evidence against the kernel is not hidden


@pytest.mark.parametrize(("gone", "void"), [("source", False), ("destination", True)])
def test_a_signal_has_struck_whoever_had_a_move_under_way_when_it_was_sent(gone: str, void: bool) -> None:
    """That another process has ended before changes nothing; one that has ended itself has no move under way."""
    b = Builder("kill-destination-in-move")
    b.begin()
    move = b.invoke("move", "destination", vm="new", source="old", step=6)
    b.hold(move, step=7)
    b.exited(gone)
    b.kill_begins("destination", step=8)
    b.add(Fault(t=b.tick(), fault="kill", event="evidence", step=8, target="destination", struck=False))
    told = list(shortcomings(shipped("kill-destination-in-move"), b.end()))
    assert any("nothing shows that the fault 'kill'" in each for each in told) is void


@pytest.mark.parametrize(("seconds", "void"), [(31, False), (1, True)])
def test_a_signal_has_struck_whoever_is_seen_to_live_on_long_after_it(seconds: int, void: bool) -> None:
    """No move is under way. One that was withheld was sent to nobody."""
    b = Builder("kill-destination-in-move")
    b.begin()
    sent = b.kill_begins("destination", step=8)
    b.t += seconds * 1_000_000_000
    b.add(Fault(t=b.tick(), fault="kill", event="evidence", step=8, target="destination", struck=False))
    b.exit("destination")
    history = b.end()
    told = list(shortcomings(shipped("kill-destination-in-move"), history))
    assert any("nothing shows that the fault 'kill'" in each for each in told) is void
    withheld = changed(history, lambda r: msgspec.structs.replace(sent, event="withheld") if r.seq == sent.seq else r)
    told = list(shortcomings(shipped("kill-destination-in-move"), withheld))
    assert any("nothing shows that the fault 'kill'" in each for each in told)
