# SPDX-License-Identifier: Apache-2.0
"""P9: what is left at the end, in every place where it shows."""

from __future__ import annotations

import errno

import msgspec
import pytest

from chaos.history.records import Exited, Filled, Header, Observation, Record
from chaos.judge.checkers import CHECKERS
from chaos.judge.ledger.firmware_contexts import GONE
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed, shipped
from tests.unit.core.doctored import MOVE, Change, charge, check, replaced, without

WITNESSES = {
    "vms": "VMs in KVM's debugfs",
    "objects": "objects in the slab caches",
    "references": "references to the modules",
    "tables": "pages of page tables of KVM's",
    "dying_misc": "groups of the misc controller that are gone and still referred to",
}
EITHER: tuple[dict[str, object], ...] = ({"label": "start"}, {"label": "end"}, {})


def refused(key: str, error: int, count: int) -> Change:
    """Both fillings of the key stopped there, for that reason."""

    def change(record: Record) -> Record:
        if not isinstance(record, Filled):
            return record
        counts, errors = record.count | {key: count}, record.errno | {key: error}
        return msgspec.structs.replace(record, count=counts, errno=errors)

    return change


def elsewhere(shared: bool, values: dict[str, object], label: str = "end") -> Change:
    """The same on a host that is no lab, with another observation."""

    def change(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == label:
            return msgspec.structs.replace(record, **values)
        return msgspec.structs.replace(record, host="local", shared=shared) if isinstance(record, Header) else record

    return change


TOLD = {
    "charge-left:sev": ("0 everywhere", ". sev 1"),
    "charge-left:sev_es": ("0 everywhere", "destination sev_es 1"),
    "firmware-counts-more": ("0", "1"),
    "firmware-counts-fewer": ("1", "0"),
    "dying-cgroups": ("0", "1"),
    "more-pages-pinned": ("5", "6"),
    "fewer-pages-pinned": ("5", "4"),
    "fewer-contexts:sev": ("8", "7"),
    "fewer-contexts-than-asids:sev_es+more-contexts:sev_es": ("6; 7", "7; 6"),
    "fewer-contexts-than-asids:sev": ("8", "7"),
    "more-contexts-than-asids:sev": ("8", "9"),
    "fewer-contexts-than-asids:sev+fewer-contexts-than-asids:sev_es": ("8; 7", "0"),
    "more-cgroups-referred-to": ("0", "1"),
    "vms-left": ("no VM", "101-9"),
    "more-objects:kvm_vcpu": ("0", "1"),
    "fewer-objects:kvm_vcpu": ("1", "0"),
    "more-references:kvm_amd": ("0", "2"),
    "more-table-pages": ("0", "3"),
    "more-dying-misc": ("0", "1"),
}
"""What was expected and what was seen, by the signature."""


@pytest.mark.parametrize(
    ("change", "signature"),
    [
        (charge("end", ".", 1), "charge-left:sev"),
        (charge("end", "destination", 1, "sev_es"), "charge-left:sev_es"),
        (replaced(Observation, {"label": "end"}, guests=1), "firmware-counts-more"),
        (replaced(Observation, {"label": "start"}, guests=1), "firmware-counts-fewer"),
        (replaced(Observation, {"label": "end"}, dying=1), "dying-cgroups"),
        (replaced(Observation, {"label": "end"}, pinned=6), "more-pages-pinned"),
        (replaced(Observation, {"label": "end"}, pinned=4), "fewer-pages-pinned"),
        (replaced(Filled, {"label": "end"}, count={"sev": 7, "sev_es": 7}), "fewer-contexts:sev"),
        (
            replaced(Filled, {"label": "start"}, count={"sev": 8, "sev_es": 6}),
            "fewer-contexts-than-asids:sev_es+more-contexts:sev_es",
        ),
        (replaced(Filled, {}, count={"sev": 7, "sev_es": 7}), "fewer-contexts-than-asids:sev"),
        (replaced(Filled, {}, count={"sev": 9, "sev_es": 7}), "more-contexts-than-asids:sev"),
        (
            replaced(Filled, {}, count={"sev": 0, "sev_es": 0}),
            "fewer-contexts-than-asids:sev+fewer-contexts-than-asids:sev_es",
        ),
        (replaced(Filled, {"label": "end"}, dying_misc=1, dying=1), "more-cgroups-referred-to"),
        (replaced(Filled, {"label": "end"}, dying_misc=None, dying=1), "more-cgroups-referred-to"),
        (replaced(Observation, {"label": "end"}, vms={"101-9": 2}), "vms-left"),
        (replaced(Observation, {"label": "end"}, objects={"kvm_vcpu": 1}), "more-objects:kvm_vcpu"),
        (replaced(Observation, {"label": "start"}, objects={"kvm_vcpu": 1}), "fewer-objects:kvm_vcpu"),
        (replaced(Observation, {"label": "end"}, references={"kvm_amd": 2, "ccp": 1}), "more-references:kvm_amd"),
        (replaced(Observation, {"label": "end"}, tables=3), "more-table-pages"),
        (replaced(Observation, {"label": "end"}, dying_misc=1), "more-dying-misc"),
    ],
)
def test_p9_deviations(change: Change, signature: str) -> None:
    verdict = check("P9", MOVE, change)
    assert (verdict.outcome, verdict.signature) == (Outcome.BROKEN, signature)
    assert (verdict.expected, verdict.seen) == TOLD[signature]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced(Filled, {"label": "end"}, errno={"sev": errno.ENOMEM, "sev_es": errno.EBUSY}), "different reasons"),
        (replaced(Filled, {"label": "end"}, errno={}), "for different reasons: EBUSY, then ok"),
        (replaced(Filled, {"label": "start"}, errno={}), "for different reasons: ok, then EBUSY"),
        (replaced(Observation, {"label": "end"}, guests=None), "the firmware could not be asked"),
        (replaced(Observation, {"label": "end"}, misc={}), "were not read at its end"),
        (replaced(Observation, {"label": "end"}, pinned=None), "pages of the host were not counted"),
        (replaced(Observation, {"label": "start"}, pinned=None), "pages of the host were not counted"),
        (without(Exited, agent="source"), "source still lived"),
        (refused("sev", errno.ENOMEM, 8), "allocating sev ASIDs stopped at 8 with ENOMEM, expected EBUSY"),
        (refused("sev", errno.EIO, 7), "and the next was refused with EIO, which no missing ASID is"),
        (
            replaced(Filled, {"label": "end"}, count={"sev": 5, "sev_es": 7}, errno={"sev": errno.ENOMEM}),
            "then it was refused with ENOMEM, which no missing ASID is",
        ),
        (replaced(Observation, {"label": "start"}, misc={}), "in use at the start of the run was not read"),
        (replaced(Filled, {}, dying=None, dying_misc=None), "does not say whether the run's cgroups went"),
        (replaced(Observation, {"label": "end"}, objects={}), "kvm_vcpu were not counted at the end"),
        (replaced(Observation, {"label": "start"}, objects={}), "kvm_vcpu were not counted at the start of the run"),
        *(
            (replaced(Observation, where, **{name: None}), f"no count of {what} at the {where.get('label', 'start')}")
            for name, what in WITNESSES.items()
            for where in EITHER
        ),
        *(
            (
                replaced(Observation, {"label": "end"}, **{name: None}, unseen={name: "gone"}),
                f"{what} could not be read",
            )
            for name, what in WITNESSES.items()
        ),
    ],
)
def test_p9_what_says_nothing_of_a_leak(change: Change, reason: str) -> None:
    """What it says when a witness is missing: test_removals.py."""
    verdict = check("P9", MOVE, change)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


@pytest.mark.parametrize(("shared", "outcome"), [(False, Outcome.UNKNOWN), (True, Outcome.SKIPPED)])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"pinned": 6}, "others on this host may pin some too"),
        ({"tables": 6}, "6 pages of page tables of KVM's where 0 were before, and others on this host may"),
        ({"objects": {"kvm_vcpu": 1}}, "1 objects in the slab cache kvm_vcpu where 0 were before, and others"),
        (
            {"references": {"kvm_amd": 3, "ccp": 1}},
            "3 references to the module kvm_amd where 0 were before, and others",
        ),
    ],
)
def test_p9_on_a_host_with_others_it_may_be_theirs(
    values: dict[str, object], reason: str, shared: bool, outcome: Outcome
) -> None:
    verdict = check("P9", MOVE, elsewhere(shared, values))
    assert verdict.outcome is outcome and reason in verdict.reason


@pytest.mark.parametrize(("folder", "outcome"), [("101-9", Outcome.BROKEN), ("4711-9", Outcome.KEPT)])
def test_p9_a_vm_is_known_by_who_made_it_on_a_host_with_others(folder: str, outcome: Outcome) -> None:
    local = check("P9", MOVE, elsewhere(False, {"vms": {folder: 2}}))
    assert local.outcome is outcome
    assert ("debugfs any more, 1 of others;" in f"{local.reason};") is (outcome is Outcome.KEPT)
    assert "debugfs any more;" in check("P9", MOVE).reason
    assert check("P9", MOVE, replaced(Observation, {"label": "end"}, vms={folder: 2})).outcome is Outcome.BROKEN


@pytest.mark.parametrize("shared", [False, True])
def test_p9_groups_of_misc_below_the_run_are_nobody_elses(shared: bool) -> None:
    assert check("P9", MOVE, elsewhere(shared, {"dying_misc": 1})).signature.split("+")[0] == "more-dying-misc"


@pytest.mark.parametrize("name", WITNESSES)
def test_p9_is_kept_without_a_witness_that_the_host_has_not_and_says_so(name: str) -> None:
    change = replaced(Observation, {}, **{name: None}, unseen={name: "it is not mounted"})
    verdict = check("P9", MOVE, change)
    assert verdict.outcome is Outcome.KEPT
    assert f"{WITNESSES[name]} are not shown by this host (it is not mounted)" in verdict.reason


def test_p9_on_a_host_of_its_own_what_is_beyond_the_limit_is_not_shown() -> None:
    limits = {".": {"current": {"sev": 0, "sev_es": 0}, "max": {"sev": 6, "sev_es": 7}}}

    def local(sev: int) -> Change:
        ours = elsewhere(False, {"misc": limits}, "start")
        filled = replaced(Filled, {}, count={"sev": sev, "sev_es": 7})

        def change(record: Record) -> Record | None:
            once = ours(record)
            return None if once is None else filled(once)

        return change

    limited = check("P9", MOVE, local(6))
    assert limited.outcome is Outcome.SKIPPED and "the run may take no more" in limited.reason
    assert check("P9", MOVE, local(5)).signature == "fewer-contexts-than-asids:sev"
    assert check("P9", MOVE, elsewhere(False, {})).outcome is Outcome.KEPT
    assert "depends on others of this host" in check("P9", MOVE, elsewhere(True, {})).reason


def test_missing_asids_of_a_lab_are_no_limit() -> None:
    """The promise is that all can be had: a refusal at the first that is missing has no excuse."""
    b = Builder()
    b.fill("start", sev=1)
    misc = {cgroup: {"current": {"sev": 0, "sev_es": 0}, "max": {}} for cgroup in (".", "source")}
    b.records[-1] = msgspec.structs.replace(b.observe("start"), misc=misc)
    b.spawn("source")
    b.launch("one", "source", "sev")
    b.do("create", "source", vm="two", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="two", key="sev", error=errno.EBUSY)
    verdict = CHECKERS["P7"](shipped(MOVE), b.history())
    assert verdict.outcome is Outcome.BROKEN and "init" in verdict.signature


def test_p9_a_spawn_that_failed_leaves_no_process() -> None:
    b = Builder()
    b.begin()
    b.do("spawn", "third", cgroup="third", error=errno.EAGAIN)
    assert CHECKERS["P9"](shipped(MOVE), b.finish()).outcome is Outcome.KEPT


def test_p9_a_lost_firmware_excuses_its_own_questions_alone() -> None:
    """A guest count that cannot be had, and contexts that are missing, are unknown for that reason; before it was lost
    they were not."""
    lost = (
        replaced(Observation, {"label": "end"}, guests=None),
        replaced(Filled, {"label": "end"}, count={"sev": 5, "sev_es": 7}),
    )
    for change in lost:
        b = Builder()
        b.begin()
        b.kernel("ccp 0000:00:05.0: sev command 0x1 timed out, disabling PSP")
        history = changed(b.finish(), change)
        verdict = CHECKERS["P9"](shipped(MOVE), history)
        assert (verdict.outcome, verdict.signature) == (Outcome.UNKNOWN, GONE), verdict.reason


def test_p9_a_process_that_is_reaped_after_the_end_was_observed_still_lived() -> None:
    b = Builder()
    b.begin()
    end = b.observe("end")
    b.exit("source")
    b.exit("destination")
    verdict = CHECKERS["P9"](shipped(MOVE), b.end())
    assert verdict.outcome is Outcome.UNKNOWN and verdict.reason.startswith("source, destination still lived")
    assert verdict.records == (end.seq,)


def test_p9_a_process_that_was_started_again_is_reaped_again() -> None:
    b = Builder()
    b.begin()
    b.exit("source")
    b.do("spawn", "source", cgroup="source")
    b.exit("destination")
    b.observe("end")
    assert CHECKERS["P9"](shipped(MOVE), b.end()).reason.startswith("source still lived")


def test_p9_a_spawn_that_was_never_answered_may_have_left_a_process() -> None:
    b = Builder()
    b.begin()
    b.invoke("spawn", "third", cgroup="third")
    assert CHECKERS["P9"](shipped(MOVE), b.finish()).reason.startswith("third still lived")


@pytest.mark.parametrize(("had", "signature"), [(7, ""), (8, "more-contexts-than-asids:sev")])
def test_p9_what_is_in_use_at_the_start_cannot_be_had(had: int, signature: str) -> None:
    used = {".": {"current": {"sev": 1, "sev_es": 0}}}
    start = replaced(Observation, {"label": "start"}, misc=used)
    filled = replaced(Filled, {}, count={"sev": had, "sev_es": 7})
    assert check("P9", MOVE, lambda record: filled(start(record) or record)).signature == signature


@pytest.mark.parametrize("f", ["irqfd", "ioeventfd", ""])
@pytest.mark.parametrize(
    ("start", "end", "local", "outcome", "signature"),
    [
        (3, 3, False, Outcome.KEPT, ""),
        (3, 5, False, Outcome.BROKEN, "more-eventfds"),
        (3, None, False, Outcome.UNKNOWN, ""),
        (3, 5, True, Outcome.KEPT, ""),
    ],
)
def test_p9_eventfds_count_where_a_vm_was_bound_to_some(
    f: str, start: int | None, end: int | None, local: bool, outcome: Outcome, signature: str
) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    if f:
        b.do(f, "source", vm="old", gsi=48, port=32, assign=True)
    else:
        outcome, signature = Outcome.KEPT, ""

    def counted(record: Record) -> Record:
        if isinstance(record, Observation) and record.label in ("start", "end"):
            return msgspec.structs.replace(record, eventfds=start if record.label == "start" else end)
        return msgspec.structs.replace(record, host="local") if local and isinstance(record, Header) else record

    verdict = CHECKERS["P9"](shipped(MOVE), changed(b.finish(watched=True), counted))
    assert (verdict.outcome, verdict.signature) == (outcome, signature)


VMSA = "__kmalloc_noprof < sev_es_create < svm_vcpu_create < kvm_arch_vcpu_create"


@pytest.mark.parametrize(
    ("leaked", "unseen", "outcome", "signature"),
    [
        (None, {}, Outcome.KEPT, ""),
        ((), {}, Outcome.KEPT, ""),
        ((VMSA, VMSA), {}, Outcome.BROKEN, "lost:sev_es_create"),
        (
            (VMSA, "kmem_cache_alloc < sev_asid_new.isra.0 < sev_guest_init", "(no backtrace)"),
            {},
            Outcome.BROKEN,
            "lost:(no backtrace)+sev_asid_new+sev_es_create",
        ),
        (
            ("kvzalloc_node < kvmalloc_node", "kvm_create_vm < x"),
            {},
            Outcome.BROKEN,
            "lost:kvm_create_vm+kvmalloc_node",
        ),
        (
            (
                f"kmemleak_alloc < {VMSA}",
                "kmemleak_alloc_percpu < pcpu_alloc_noprof < x",
                "memdup_user < kasprintf < y",
            ),
            {},
            Outcome.BROKEN,
            "lost:sev_es_create+x+y",
        ),
        (None, {"leaked": "Device or resource busy"}, Outcome.UNKNOWN, ""),
    ],
    ids=[
        "no kmemleak",
        "nothing",
        "two of one kind",
        "three kinds",
        "allocators alone",
        "beside it",
        "turned itself off",
    ],
)
def test_p9_what_kmemleak_finds(
    leaked: tuple[str, ...] | None, unseen: dict[str, str], outcome: Outcome, signature: str
) -> None:
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")

    def found(record: Record) -> Record:
        if isinstance(record, Observation) and record.label == "end":
            return msgspec.structs.replace(record, leaked=leaked, unseen=unseen)
        return record

    verdict = CHECKERS["P9"](shipped(MOVE), changed(b.finish(watched=True), found))
    assert (verdict.outcome, verdict.signature) == (outcome, signature)
