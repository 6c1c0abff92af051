# SPDX-License-Identifier: Apache-2.0
"""Each checker holds on the shipped experiments, deviates on a doctored history, and is unknown without its witness."""

from __future__ import annotations

import errno
from collections.abc import Callable

import msgspec
import pytest

from chaos.checkers import CHECKERS
from chaos.checkers.evidence import combine, errname, held, skipped, unknown
from chaos.checkers.p12_quiet_kernel import PATTERNS, report
from chaos.experiment import Experiment
from chaos.history import (
    Asked,
    Counted,
    Done,
    Exited,
    Filled,
    History,
    Invoke,
    Kernel,
    Note,
    Observation,
    Record,
)
from chaos.verdict import Outcome, Verdict
from tests.unit.core.build import ALL, Builder, changed, destination_killed, moved, moved_es, shipped, source_killed

MOVE = "move-across-cgroups"
ES = "move-across-cgroups-es"
KILL_DESTINATION = "kill-destination-in-move"
KILL_SOURCE = "kill-source-in-move"
Change = Callable[[Record], Record | None]


def check(promise: str, name: str, change: Change | None = None) -> Verdict:
    history = ALL[name]()
    return CHECKERS[promise](shipped(name), changed(history, change) if change else history)


def without(kind: type, **fields: object) -> Change:
    """Leave out the records of a kind whose fields have these values."""

    def change(record: Record) -> Record | None:
        matches = isinstance(record, kind) and all(getattr(record, k) == v for k, v in fields.items())
        return None if matches else record

    return change


def replaced(kind: type, where: dict[str, object], **values: object) -> Change:
    def change(record: Record) -> Record:
        if isinstance(record, kind) and all(getattr(record, k) == v for k, v in where.items()):
            return msgspec.structs.replace(record, **values)
        return record

    return change


def charge(label: str, cgroup: str, value: int, key: str = "sev") -> Change:
    """Another value of one counter in one observation."""

    def change(record: Record) -> Record:
        if not isinstance(record, Observation) or record.label != label:
            return record
        misc = msgspec.json.decode(msgspec.json.encode(record.misc))
        misc[cgroup]["current"][key] = value
        return msgspec.structs.replace(record, misc=misc)

    return change


def without_operation(f: str, vm: str, nth: int = 0) -> Change:
    """Leave out an operation on a VM, with its answer: the `nth` of its kind."""
    left: list[int] = []
    seen = [0]

    def change(record: Record) -> Record | None:
        if isinstance(record, Invoke) and record.f == f and record.args.get("vm") == vm:
            if seen[0] == nth:
                left.append(record.op)
            seen[0] += 1
        return None if isinstance(record, Invoke | Done) and record.op in left else record

    return change


def answered(f: str, vm: str, nth: int = 0, **values: object) -> Change:
    """Another answer to an operation on a VM: the `nth` of its kind."""
    ops: list[int] = []

    def change(record: Record) -> Record:
        if isinstance(record, Invoke) and record.f == f and record.args.get("vm") == vm:
            ops.append(record.op)
        if isinstance(record, Done) and len(ops) == nth + 1 and record.op == ops[nth]:
            return msgspec.structs.replace(record, **values)
        return record

    return change


@pytest.mark.parametrize("name", ALL)
def test_a_kernel_that_keeps_its_promises(name: str) -> None:
    experiment = shipped(name)
    for promise in experiment.promises:
        expected = Outcome.HELD
        if promise in experiment.unaskable:
            expected = Outcome.UNKNOWN
        if (promise, name) == ("P5", ES):
            expected = Outcome.SKIPPED
        verdict = check(promise, name)
        assert (promise, verdict.outcome) == (promise, expected), verdict.reason
        assert verdict.promise == promise
        assert verdict.signature == ""


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P6"])
def test_without_a_move_nothing_is_shown(promise: str) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.observe("before", {"source": 1})
    b.observe("after", {"source": 1})
    verdict = CHECKERS[promise](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "move" in verdict.reason


@pytest.mark.parametrize("promise", sorted(CHECKERS))
def test_an_empty_history_shows_nothing(promise: str) -> None:
    outcome = CHECKERS[promise](shipped(MOVE), History((), "it is empty")).outcome
    assert outcome is (Outcome.HELD if promise == "P12" else Outcome.UNKNOWN)  # the judge voids P12 of such a history


# P1


def test_p1_a_source_that_stays_charged() -> None:
    def both(record: Record) -> Record | None:
        return charge("after", ".", 2)(charge("after", "source", 1)(record))  # type: ignore[arg-type]

    verdict = check("P1", MOVE, both)
    assert verdict.outcome is Outcome.DEVIATED
    assert verdict.signature == "overcharged-after-move:sev"
    assert "cgroup 'source' read sev 1 where 0 was due" in verdict.reason
    assert verdict.expected == ". sev 1; source sev 0"
    assert verdict.seen == ". sev 2; source sev 1"


@pytest.mark.parametrize(
    ("label", "cgroup", "value", "key", "signature"),
    [
        ("before", "source", 0, "sev", "undercharged-before-move:sev"),
        ("after", "destination", 2, "sev", "overcharged-after-move:sev"),
        ("after", "destination", 1, "sev_es", "overcharged-after-move:sev_es"),
        ("after", "source", -1, "sev", "below-zero-after-move:sev"),
        ("end", "source", 1, "sev", "overcharged-after-close:sev"),
        ("start", "source", 1, "sev", "overcharged-before-move:sev"),
    ],
)
def test_p1_a_wrong_counter(label: str, cgroup: str, value: int, key: str, signature: str) -> None:
    verdict = check("P1", MOVE, charge(label, cgroup, value, key))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, signature)
    assert verdict.records


def test_p1_a_counter_wrong_in_the_middle() -> None:
    verdict = check("P1", KILL_SOURCE, charge("held", "source", 0))
    assert verdict.signature == "undercharged-in-move:sev"


def test_p1_many_wrong_counters_are_summed_up() -> None:
    def change(record: Record) -> Record:
        for cgroup in ("source", "destination", "."):
            record = charge("after", cgroup, 5, "sev_es")(record) or record
            record = charge("before", cgroup, 5, "sev_es")(record) or record
        return record

    verdict = check("P1", MOVE, change)
    assert verdict.reason.endswith("and 3 more")
    assert verdict.signature == "overcharged-before-move:sev_es"  # where it is first seen


def test_p1_a_counter_below_zero_is_printed_without_its_sign() -> None:
    verdict = check("P1", MOVE, charge("after", "source", (1 << 64) - 1))
    assert (verdict.signature, verdict.seen) == ("below-zero-after-move:sev", "source sev -1")


def test_p1_counters_impossible_together() -> None:
    verdict = check("P1", KILL_SOURCE, charge("held", "destination", 0))
    assert verdict.signature == "miscounted-in-move:sev" or "charged-in-move" in verdict.signature
    assert verdict.outcome is Outcome.DEVIATED


@pytest.mark.parametrize("label", ["before", "after"])
def test_p1_needs_a_charge_on_either_side(label: str) -> None:
    verdict = check("P1", MOVE, without(Observation, label=label))
    assert verdict.outcome is Outcome.UNKNOWN
    assert f"no observation shows a charge {label} the move" in verdict.reason


def test_p1_a_cgroup_that_was_not_read_is_no_witness() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == "after":
            misc = {cgroup: files for cgroup, files in record.misc.items() if cgroup != "destination"}
            return msgspec.structs.replace(record, misc=misc)
        return record

    assert check("P1", MOVE, change).outcome is Outcome.UNKNOWN


def test_p1_a_move_that_never_ended() -> None:
    verdict = check("P1", MOVE, _move_unanswered)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "is still under way" in verdict.reason


def _move_unanswered(record: Record) -> Record | None:
    """The move was begun and nothing more happened before the end."""
    if isinstance(record, Invoke) and record.f == "move":
        _move_unanswered.op = record.op  # type: ignore[attr-defined]
    op = getattr(_move_unanswered, "op", -1)
    after = getattr(record, "step", -1) > 6 or (isinstance(record, Invoke) and record.f in ("exit", "set_state"))
    if isinstance(record, Done | Exited) and getattr(record, "op", op) >= op > 0:
        return None
    return None if after or (isinstance(record, Observation) and record.label == "end") else record


def test_p1_a_ledger_that_is_lost() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("nothing", "new", "destination")
    verdict = CHECKERS["P1"](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "what must be charged cannot be told: move of new succeeded" in verdict.reason
    assert "who owns what cannot be told" in CHECKERS["P4"](shipped(MOVE), b.history()).reason


def test_p1_a_failure_that_had_happened() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.status("old", "source", error=errno.ENOTTY)
    b.done(invoke, "fail", error=errno.EBUSY)
    verdict = CHECKERS["P1"](shipped(MOVE), b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "failed-but-charged:move")


def test_p1_without_a_move_in_the_script() -> None:
    experiment = msgspec.structs.replace(shipped(MOVE), script=())
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.observe("one", {"source": 1})
    assert CHECKERS["P1"](experiment, b.history()).outcome is Outcome.UNKNOWN
    b.observe("two", {"source": 1})
    assert CHECKERS["P1"](experiment, b.history()).outcome is Outcome.HELD


# P3


def test_p3_a_source_that_still_answers() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            first, *rest = record.answers
            return msgspec.structs.replace(record, answers=(msgspec.structs.replace(first, errno=0), *rest))
        return record

    verdict = check("P3", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "source-after-move:answered")
    assert (verdict.expected, verdict.seen) == ("EIO", "1 ok")


def test_p3_a_live_source_that_answers_eio() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            *rest, last = record.answers
            return msgspec.structs.replace(record, answers=(*rest, msgspec.structs.replace(last, errno=errno.EIO)))
        return record

    verdict = check("P3", KILL_DESTINATION, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "source-after-failed-move:dead")
    assert verdict.seen == "2 ok, 1 EIO"


def test_p3_an_operation_that_a_dead_source_answers() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.do("get_state", "source", vm="old", error=errno.EIO)
    b.ask("old", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.HELD
    b.do("get_state", "source", vm="old")
    b.do("launch_measure", "source", vm="old", error=errno.EIO, firmware=3)
    verdict = CHECKERS["P3"](shipped(MOVE), b.finish())
    assert verdict.signature == "source-after-move:answered:get_state+source-after-move:answered:launch_measure"


def test_p3_a_message_that_did_not_come_is_no_answer_of_the_kernel() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.done(b.invoke("set_state", "source", vm="old"), "fail", error=errno.EPIPE, value={"call": "the source ended"})
    b.ask("old", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.HELD
    b.done(b.invoke("get_state", "source", vm="old"), "fail", error=errno.EINVAL, value={"call": "KVM_GET_REGS"})
    assert CHECKERS["P3"](shipped(MOVE), b.history()).signature == "source-after-move:answered:get_state"


def test_a_vm_that_is_told_to_move_into_itself() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "old", "source", error=errno.EINVAL)
    b.observe("after", {"source": 1})
    b.count("old", "source", 20)
    b.status("old", "source")
    b.ask("old", "source", dead=False)
    for promise in ("P1", "P3", "P4", "P5", "P6"):
        verdict = CHECKERS[promise](shipped(MOVE), b.history())
        assert (promise, verdict.outcome) == (promise, Outcome.HELD), verdict.reason


def test_p3_an_operation_that_a_live_source_refuses_as_dead() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination", error=errno.EBUSY)
    b.do("get_state", "source", vm="old", error=errno.EIO)
    b.ask("old", "source", dead=False)
    verdict = CHECKERS["P3"](shipped(MOVE), b.finish())
    assert (verdict.signature, verdict.expected) == ("source-after-failed-move:dead:get_state", "no EIO")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"answers": ()}, "was asked nothing"),
        ({"agent": "destination"}, "did not create it"),
    ],
)
def test_p3_worthless_answers(values: dict[str, object], reason: str) -> None:
    verdict = check("P3", MOVE, replaced(Asked, {}, **values))
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p3_a_control_that_is_dead_too() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(msgspec.structs.replace(answer, control=errno.EIO) for answer in record.answers)
            return msgspec.structs.replace(record, answers=answers)
        return record

    verdict = check("P3", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "EIO means nothing" in verdict.reason


def test_p3_all_descriptors_must_be_asked() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(answer for answer in record.answers if answer.fd != "vcpu 1")
            return msgspec.structs.replace(record, answers=answers)
        return record

    verdict = check("P3", ES, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "not vcpu 1" in verdict.reason


def test_p3_a_source_that_was_not_asked() -> None:
    verdict = check("P3", MOVE, without(Asked))
    assert verdict.outcome is Outcome.UNKNOWN
    assert "old was not asked afterwards" in verdict.reason


def test_p3_a_source_that_was_asked_before_the_move_only() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.ask("old", "source", dead=False)
    b.move("old", "new", "destination")
    assert CHECKERS["P3"](shipped(MOVE), b.finish()).outcome is Outcome.UNKNOWN


def test_p3_a_dead_process_cannot_be_asked() -> None:
    assert check("P3", KILL_SOURCE).reason.startswith("the source process is dead")


def test_p3_a_move_that_nobody_can_tell_about() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.kill("destination")
    b.done(invoke, "info")
    b.kill("source")
    for promise in ("P3", "P4", "P5", "P6"):
        verdict = CHECKERS[promise](shipped(MOVE), b.history())
        assert verdict.outcome is Outcome.UNKNOWN
        assert "nobody can say whether it took effect" in verdict.reason


def test_p3_each_source_of_a_chain_is_asked() -> None:
    b = chain()
    b.ask("b", "destination", dead=True)
    verdict = CHECKERS["P3"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.UNKNOWN
    assert "a was not asked" in verdict.reason
    b.ask("a", "source", dead=True)
    assert CHECKERS["P3"](shipped(MOVE), b.history()).outcome is Outcome.HELD


def chain() -> Builder:
    """From a to b to c; c is in a's process."""
    b = Builder()
    b.begin()
    b.launch("a", "source", "sev")
    b.launch("b", "destination")
    b.launch("c", "source")
    b.count("a", "source", 10)
    b.status("a", "source")
    b.observe("before", {"source": 1})
    b.do("send_fd", "source", vm="a", to="destination")
    b.move("a", "b", "destination")
    b.status("b", "destination")
    b.do("send_fd", "destination", vm="b", to="source")
    b.move("b", "c", "source")
    b.observe("after", {"source": 1})
    b.status("c", "source")
    b.count("c", "source", 20)
    return b


def again() -> Builder:
    """A move that fails, and succeeds when it is tried again."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination", error=errno.EBUSY)
    b.observe("between", {"source": 1})
    b.move("old", "new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    b.count("new", "destination", 20)
    b.ask("old", "source", dead=True)
    return b


@pytest.mark.parametrize("promise", ["P1", "P3", "P4", "P5", "P6"])
def test_a_move_that_is_tried_again(promise: str) -> None:
    verdict = CHECKERS[promise](shipped(MOVE), again().finish())
    assert verdict.outcome is Outcome.HELD, verdict.reason


@pytest.mark.parametrize("promise", ["P1", "P5"])
def test_a_chain_of_moves(promise: str) -> None:
    verdict = CHECKERS[promise](shipped(MOVE), chain().finish())
    assert verdict.outcome is Outcome.HELD, verdict.reason


def test_p4_in_a_chain() -> None:
    b = chain()
    b.status("a", "source", error=errno.EIO)
    b.status("b", "destination", error=errno.EIO)
    verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
    assert verdict.outcome is Outcome.HELD, verdict.reason


# P4


def test_p4_nobody_owns_the_context() -> None:
    verdict = check("P4", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.ENOTTY))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "none-owns+part-unknown")


def test_p4_two_own_the_context() -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.move("old", "new", "destination")
    b.observe("after", {"destination": 1})
    b.status("new", "destination")
    b.status("old", "source")
    b.ask("old", "source", dead=True)
    verdict = CHECKERS["P4"](shipped(MOVE), b.finish())
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "two-own")


@pytest.mark.parametrize(("guests", "signature"), [(0, "firmware-counts-fewer"), (2, "firmware-counts-more")])
def test_p4_the_firmware_disagrees(guests: int, signature: str) -> None:
    verdict = check("P4", MOVE, replaced(Observation, {"label": "after"}, guests=guests))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, signature)


def test_p4_ebadf_means_owning() -> None:
    verdict = check("P4", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.EBADF))
    assert verdict.outcome is Outcome.HELD


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (MOVE, without_operation("guest_status", "new"), "the owner was not asked"),
        (KILL_DESTINATION, without_operation("guest_status", "old"), "the owner was not asked"),
        (MOVE, without(Asked), "old was not asked whether it owns a context as well"),
        (MOVE, replaced(Observation, {}, guests=None), "guest count was not read"),
        (MOVE, without(Observation, label="after"), "guest count was not read"),
    ],
)
def test_p4_needs_its_witnesses(name: str, change: Change, reason: str) -> None:
    verdict = check("P4", name, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p4_a_destination_that_lives_is_asked_after_a_failed_move() -> None:
    b = failed()
    assert "new was not asked" in CHECKERS["P4"](shipped(MOVE), b.history()).reason
    b.status("new", "destination", error=errno.ENOTTY)
    assert CHECKERS["P4"](shipped(MOVE), b.history()).outcome is Outcome.HELD


def test_p4_a_move_that_never_ended() -> None:
    verdict = check("P4", MOVE, _move_unanswered)
    assert "who owns the context after it cannot be asked" in verdict.reason


# P5


def test_p5_guest_status_that_fails_after_the_move() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={}))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "guest_status-after-move:EBADF")
    assert "the guest itself went on: 100 ticks at old before, 203 at new after" in verdict.reason


def test_p5_a_finding_does_not_excuse_a_guest_that_was_not_counted() -> None:
    def change(record: Record) -> Record | None:
        record = answered_ebadf(record) or record
        return None if isinstance(record, Counted) and record.vm == "new" else record

    answered_ebadf = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", MOVE, change).signature == "guest_status-after-move:EBADF+part-unknown"


def test_p5_a_context_that_changed() -> None:
    verdict = check("P5", MOVE, answered("guest_status", "new", value={"handle": 2, "policy": 0, "state": 1}))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "guest_status-after-move:handle+state")
    assert (verdict.expected, verdict.seen) == ("handle 1, state 3", "handle 2, state 1")


def test_p5_sev_es_that_cannot_run_here() -> None:
    verdict = check("P5", ES)
    assert verdict.outcome is Outcome.SKIPPED
    assert "cannot enter SEV-ES guests" in verdict.reason
    failing = answered("guest_status", "new", outcome="fail", errno=errno.EBADF, value={})
    assert check("P5", ES, failing).signature == "guest_status-after-move:EBADF"


@pytest.mark.parametrize("ticks", [100, 99])
def test_p5_a_guest_that_stopped(ticks: int) -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ticks=ticks))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "counter-stopped-after-move")


def test_p5_a_guest_that_cannot_be_entered_does_not_go_on_whatever_its_registers_say() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, ended="KVM_RUN: EINVAL"))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "stopped-after-move:KVM_RUN-EINVAL")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, ended="KVM_RUN: EINVAL")).outcome is Outcome.UNKNOWN


def test_p5_a_guest_whose_memory_is_stale() -> None:
    verdict = check("P5", MOVE, replaced(Counted, {"vm": "new"}, stale=1))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "stale-memory-after-move")
    assert check("P5", MOVE, replaced(Counted, {"vm": "old"}, stale=1)).outcome is Outcome.UNKNOWN


def test_p5_a_guest_that_stopped_after_a_failed_move() -> None:
    verdict = check("P5", KILL_DESTINATION, replaced(Counted, {"ticks": 900}, ticks=100))
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, "counter-stopped-after-failed-move")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(Counted, vm="new"), "not seen to count after"),
        (without(Counted, vm="old"), "not seen to count before"),
        (without_operation("guest_status", "new"), "new was not asked for its status afterwards"),
        (without_operation("guest_status", "old"), "GUEST_STATUS of old was not had before the move"),
        (answered("guest_status", "old", outcome="fail", errno=errno.EIO, firmware=3), "was not had before"),
    ],
)
def test_p5_needs_its_witnesses(change: Change, reason: str) -> None:
    verdict = check("P5", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p5_compares_the_context_after_a_failed_move_too() -> None:
    b = failed()
    assert CHECKERS["P5"](shipped(MOVE), b.history()).outcome is Outcome.HELD
    b = failed(status_error=errno.EBADF)
    assert CHECKERS["P5"](shipped(MOVE), b.history()).signature == "guest_status-after-failed-move:EBADF"


# P6


def failed(*, status_error: int = 0, ask: bool = True, count: bool = True, observe: bool = True) -> Builder:
    """A move that fails with EBUSY while both processes live."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.count("old", "source", 10)
    b.status("old", "source")
    b.observe("before", {"source": 1})
    b.move("old", "new", "destination", error=errno.EBUSY)
    if observe:
        b.observe("after", {"source": 1})
    if count:
        b.count("old", "source", 20)
    if status_error >= 0:
        b.status("old", "source", error=status_error)
    if ask:
        b.ask("old", "source", dead=False)
    return b


def p6(b: Builder) -> Verdict:
    return CHECKERS["P6"](shipped(KILL_DESTINATION), b.history())


def test_p6_both_are_usable() -> None:
    b = failed()
    assert "whether new is still usable was not asked" in p6(b).reason
    b.status("new", "destination", error=errno.ENOTTY)
    assert p6(b).outcome is Outcome.HELD
    b = failed()
    b.ask("new", "destination", dead=False)
    assert p6(b).outcome is Outcome.HELD
    b = failed()
    b.do("set_state", "destination", vm="new")
    assert p6(b).outcome is Outcome.HELD


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"ask": False}, "was not asked whether it lives"),
        ({"count": False}, "not seen to count after"),
        ({"observe": False}, "no observation shows a charge after"),
        ({"status_error": -1}, "was not asked for its status afterwards"),
    ],
)
def test_p6_needs_its_witnesses(missing: dict[str, bool], reason: str) -> None:
    b = failed(**missing)
    b.status("new", "destination", error=errno.ENOTTY)
    verdict = p6(b)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p6_needs_a_failure() -> None:
    verdict = check("P6", MOVE)
    assert verdict.outcome is Outcome.UNKNOWN
    assert "no move failed" in verdict.reason


def test_p6_a_status_that_fails_as_before_is_as_before() -> None:
    change = answered("guest_status", "old", 0, outcome="fail", errno=errno.EBADF)
    b = failed(status_error=errno.EBADF)
    b.status("new", "destination", error=errno.ENOTTY)
    assert CHECKERS["P6"](shipped(KILL_DESTINATION), changed(b.history(), change)).outcome is Outcome.HELD


@pytest.mark.parametrize(
    ("name", "change", "signature"),
    [
        (
            KILL_DESTINATION,
            answered("guest_status", "old", outcome="fail", errno=errno.EBADF),
            "guest_status-after-failed-move:EBADF",
        ),
        (KILL_DESTINATION, replaced(Counted, {"ticks": 900}, ticks=1), "counter-stopped-after-failed-move"),
        (KILL_DESTINATION, replaced(Observation, {"label": "after"}, guests=2), "guests-after-failed-move"),
        (KILL_DESTINATION, charge("after", "destination", 3), "charge-after-failed-move"),
    ],
)
def test_p6_deviations(name: str, change: Change, signature: str) -> None:
    verdict = check("P6", name, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, signature)


def test_p6_a_source_that_died_though_the_move_failed() -> None:
    def change(record: Record) -> Record:
        if isinstance(record, Asked):
            answers = tuple(msgspec.structs.replace(answer, errno=errno.EIO) for answer in record.answers)
            return msgspec.structs.replace(record, answers=answers)
        return record

    assert check("P6", KILL_DESTINATION, change).signature == "source-after-failed-move:dead"


def test_p6_a_destination_that_died_though_the_move_failed() -> None:
    b = failed()
    b.status("new", "destination", error=errno.EIO)
    assert p6(b).signature == "destination-after-failed-move:EIO"


def test_p6_a_ledger_that_is_lost() -> None:
    b = failed()
    b.do("init", "source", vm="old", key="sev")
    assert "what must be charged cannot be told" in p6(b).reason


# P9


@pytest.mark.parametrize(
    ("change", "signature"),
    [
        (charge("end", ".", 1), "charge-left:sev"),
        (charge("end", "destination", 1, "sev_es"), "charge-left:sev_es"),
        (replaced(Observation, {"label": "end"}, guests=1), "firmware-counts-more"),
        (replaced(Observation, {"label": "start"}, guests=1), "firmware-counts-fewer"),
        (replaced(Observation, {"label": "end"}, dying=1), "dying-cgroups"),
        (replaced(Filled, {"label": "end"}, count={"sev": 7, "sev_es": 7}), "fewer-contexts:sev"),
        (replaced(Filled, {"label": "start"}, count={"sev": 8, "sev_es": 6}), "more-contexts:sev_es"),
    ],
)
def test_p9_deviations(change: Change, signature: str) -> None:
    verdict = check("P9", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, signature)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(Observation, label="start"), "not observed at the start"),
        (without(Observation, label="end"), "not observed at the end"),
        (without(Filled, label="start"), "not filled to capacity at the start"),
        (without(Filled), "not filled to capacity at the start and end"),
        (replaced(Filled, {}, count={}), "no key was filled"),
        (replaced(Filled, {"label": "end"}, errno={"sev": errno.ENOMEM, "sev_es": errno.EBUSY}), "different reasons"),
        (replaced(Observation, {"label": "end"}, guests=None), "the firmware could not be asked"),
        (replaced(Observation, {"label": "end"}, misc={}), "were not read at its end"),
        (without(Exited, agent="source"), "source still lived"),
    ],
)
def test_p9_needs_its_witnesses(change: Change, reason: str) -> None:
    verdict = check("P9", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


def test_p9_a_spawn_that_failed_leaves_no_process() -> None:
    b = Builder()
    b.begin()
    b.do("spawn", "third", cgroup="third", error=errno.EAGAIN)
    assert CHECKERS["P9"](shipped(MOVE), b.finish()).outcome is Outcome.HELD


# P12

SPLATS = {
    "WARNING: CPU: 1 PID: 402 at kernel/cgroup/misc.c:98 misc_cg_cancel_charge+0x58/0x60": "warn:misc_cg_cancel_charge",
    "WARNING: kernel/cgroup/misc.c:98 at misc_cg_cancel_charge+0x58/0x60, CPU#1: sevchaos/402": (
        "warn:misc_cg_cancel_charge"
    ),
    "WARNING: CPU: 0 PID: 1 at 0xffffffff81000000": "warn:0xffffffff81000000",
    "WARNING: possible circular locking dependency detected": "lockdep",
    "WARNING: possible recursive locking detected": "lockdep",
    "WARNING: inconsistent lock state": "lockdep",
    "WARNING: suspicious RCU usage": "lockdep",
    "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected": "lockdep",
    "BUG: MAX_LOCKDEP_CHAINS too low!": "lockdep",
    "BUG: kernel NULL pointer dereference, address: 0000000000000008": "bug:kernel-NULL-pointer-dereference",
    "BUG: unable to handle page fault for address: ffffc90000e3ffd8": "bug:unable-to-handle-page-fault",
    "BUG: Bad page state in process sevchaos  pfn:3fe01": "bug:Bad-page-state",
    "BUG: sleeping function called from invalid context at mm/util.c:1": (
        "bug:sleeping-function-called-from-invalid-context"
    ),
    "BUG: KASAN: slab-use-after-free in sev_migrate_from+0x1c/0x90 [kvm_amd]": "sanitizer:sev_migrate_from",
    "UBSAN: array-index-out-of-bounds in arch/x86/kvm/svm/sev.c:12:3": "sanitizer:array-index-out-of-bounds",
    "kernel BUG at arch/x86/kvm/svm/sev.c:1978!": "bug:arch/x86/kvm/svm/sev.c",
    "list_del corruption. prev->next should be ffff8881, but was 0": "corruption:list_del",
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP": "gpf",
    "Oops: general protection fault, maybe for address 0x0: 0000 [#1] PREEMPT SMP NOPTI": "gpf",
    "invalid opcode: 0000 [#1] PREEMPT SMP": "oops",
    "Oops: 0002 [#1] PREEMPT SMP": "oops",
    "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [sevchaos:402]": "lockup",
    "NMI watchdog: Watchdog detected hard LOCKUP on cpu 0": "lockup",
    "INFO: task vcpu:402 blocked for more than 120 seconds.": "hung-task",
    "rcu: INFO: rcu_preempt self-detected stall on CPU": "stall",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:": "stall",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }": "stall",
    "Kernel panic - not syncing: Fatal exception": "panic",
}
ORDINARY = [
    "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable because the skew is too large:",
    "unchecked MSR access error: RDMSR from 0xc0010117 at rIP: 0xffffffff81070f54 (native_read_msr+0x4/0x20)",
    "ccp 0000:00:05.0: sev command 0x31 timed out, disabling PSP",
    "kvm_amd: TSC scaling supported",
    "hrtimer: interrupt took 5104321 ns",
    "SEV: DF_FLUSH failed, ret=-16, error=0x0",
    "sevchaos[402]: segfault at 0 ip 0000000000000000 sp 00007ffd error 14",
]


@pytest.mark.parametrize(("text", "signature"), SPLATS.items())
def test_p12_reports_of_defects(text: str, signature: str) -> None:
    b = Builder()
    b.kernel(text)
    verdict = CHECKERS["P12"](shipped(MOVE), b.end())
    assert (verdict.outcome, verdict.signature) == (Outcome.DEVIATED, signature)
    assert text.split("; ", maxsplit=1)[0] in verdict.reason


@pytest.mark.parametrize("text", ORDINARY)
def test_p12_ordinary_lines(text: str) -> None:
    assert report(Kernel(t=0, level=3, text=text)) == ""


def test_p12_every_pattern_is_tested_and_has_its_reason() -> None:
    found = [next(pattern for _, pattern, _ in PATTERNS if pattern.search(text)) for text in SPLATS]
    assert {pattern.pattern for _, pattern, _ in PATTERNS} == {pattern.pattern for pattern in found}
    assert all(reason for _, _, reason in PATTERNS)


def test_p12_what_is_no_warning_does_not_count() -> None:
    assert report(Kernel(t=0, level=6, text="WARNING: CPU: 1 PID: 402 at a.c:1 b+0x1/0x2")) == ""


def test_p12_a_lost_witness() -> None:
    b = Builder()
    b.note("the firmware's guest count: /dev/sev could not be opened")
    assert CHECKERS["P12"](shipped(MOVE), b.history()).outcome is Outcome.HELD
    for text in ("the kernel's log: /dev/kmsg: Permission denied", "the kernel's log was overwritten", "kmsg is gone"):
        b.note(text)
        verdict = CHECKERS["P12"](shipped(MOVE), b.history())
        assert verdict.outcome is Outcome.UNKNOWN
        assert text in verdict.reason and "firmware" not in verdict.reason
    b.kernel("Oops: 0002 [#1] PREEMPT SMP")
    assert CHECKERS["P12"](shipped(MOVE), b.end()).outcome is Outcome.DEVIATED


# Evidence


def test_combine_is_as_bad_as_the_worst_part() -> None:
    good, none, skip = held("P1", "good"), unknown("P1", "none"), skipped("P1", "skip")
    assert combine("P1", []).outcome is Outcome.UNKNOWN
    assert combine("P1", [good, skip]).outcome is Outcome.SKIPPED
    assert combine("P1", [good, none, skip]).reason == "none; skip; good"
    assert combine("P1", [good, good]).reason == "good"


def test_errname() -> None:
    assert [errname(0), errname(5), errname(4000)] == ["ok", "EIO", "errno 4000"]


def test_experiments_promise_only_what_a_checker_judges(tmp_path: object) -> None:
    experiments: list[Experiment] = [shipped(name) for name in ALL]
    assert {promise for experiment in experiments for promise in experiment.promises} <= CHECKERS.keys()


def test_notes_of_other_topics_are_no_witnesses() -> None:
    b = Builder()
    b.add(Note(t=b.tick(), topic="progress", text="the kernel log is long"))
    assert CHECKERS["P12"](shipped(MOVE), b.end()).outcome is Outcome.HELD


@pytest.mark.parametrize("run", [moved, moved_es, destination_killed, source_killed])
def test_verdicts_point_at_records_that_exist(run: Callable[[], History]) -> None:
    history = run()
    name = next(n for n, f in ALL.items() if f is run)
    for promise in shipped(name).promises:
        verdict = CHECKERS[promise](shipped(name), history)
        assert all(0 <= number < len(history.records) for number in verdict.records)
