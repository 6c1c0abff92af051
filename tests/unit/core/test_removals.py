# SPDX-License-Identifier: Apache-2.0
"""Whatever a promise was kept on is taken away, and then nobody can say whether it was kept.

For each of the fourteen checkers there are histories in which its promise is kept (`KEPT`), on different kinds of
evidence, and for each of these

* every kind of record: without all of that kind the promise is unknown if the history is told to rest on it, and kept
  as before if it is not;
* a table of single witnesses: a record, an answer, or something that one of them says. Where another witness says the
  same, it is named, and only without both the promise is unknown.

It is never broken: that something was not seen is no evidence against a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from chaos.history.records import (
    Asked,
    Counted,
    Done,
    Exited,
    Fault,
    Filled,
    Firmware,
    Header,
    Held,
    Observation,
    Record,
    Stormed,
)
from chaos.judge.checkers import CHECKERS
from chaos.judge.verdict import Outcome
from tests.unit.core.doctored import Change, replaced, without, without_operation
from tests.unit.core.removal import (
    ALWAYS,
    KEPT,
    Removal,
    after,
    read_again,
    unanswered,
    unput,
    unread,
    without_begin,
    without_value,
)
from tests.unit.core.test_p09_nothing_leaks import WITNESSES


def test_every_checker_has_a_history_and_a_table() -> None:
    assert {kept.promise for kept in KEPT.values()} == CHECKERS.keys()
    assert {row.kept for row in ROWS} == KEPT.keys()


@pytest.mark.parametrize("name", KEPT)
def test_what_the_tables_begin_with_is_kept(name: str) -> None:
    history = KEPT[name].make()
    verdict = KEPT[name].judged(read_again(history.records))
    assert verdict.outcome is Outcome.KEPT, verdict.reason


KINDS = [
    (name, kind)
    for name, kept in KEPT.items()
    for kind in sorted({type(record) for record in kept.make().records} - {Done}, key=lambda kind: kind.__name__)
]


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=[f"{name}-{kind.__name__}" for name, kind in KINDS])
def test_a_promise_is_kept_on_these_kinds_of_records_and_no_others(name: str, kind: type[Record]) -> None:
    kept = KEPT[name]
    verdict = kept.judged(after(kept.make(), without(kind)))
    expected = Outcome.UNKNOWN if kind in kept.rests_on | ALWAYS else Outcome.KEPT
    assert verdict.outcome is expected, verdict.reason


def row(
    kept: str,
    reason: str,
    take: Callable[..., Change],
    *args: object,
    other: Callable[[], Change] | None = None,
    **values: object,
) -> Removal:
    return Removal(kept, partial(take, *args, **values), reason, other)


BEFORE, AFTER = "no observation shows a charge before", "no observation shows a charge after"
P1 = [
    row("p1", BEFORE, without, Observation, label="before"),
    row("p1", AFTER, without, Observation, label="after"),
    row("p1", BEFORE, unread, "before"),
    row("p1", BEFORE, unread, "before", "source"),
    row("p1", BEFORE, unread, "before", "source", file="current"),
    row("p1", AFTER, unread, "after", "destination"),
    row("p1", AFTER, unread, "after", ".", file="current"),
    row("p1", AFTER, unanswered, "move", "new"),
    row("p1", "no move was tried", without_begin, "move", "new"),
    row("p1-es", BEFORE, unread, "before", "source", file="current"),
    row("p1-es", AFTER, without, Observation, label="after"),
    row("p1-destination-killed", BEFORE, without, Observation, label="before"),
    row("p1-destination-killed", AFTER, without, Observation, label="after"),
    row("p1-destination-killed", "the charges after it cannot be asked for", without, Exited, agent="destination"),
    row("p1-destination-killed", AFTER, unanswered, "init", "old"),
    row("p1-both-killed", AFTER, without, Exited, agent="source"),
    row("p1-both-killed", "cannot be asked for", without, Exited, agent="destination"),
    row("p1-both-killed", AFTER, without, Observation, label="after", other=partial(without, Observation, label="end")),
]

P2 = [
    row("p2-moved-mirror", "were not read while it lived on", without, Observation, label="moved"),
    row("p2-moved-mirror", "were not read while it lived on", unread, "moved", "source", file="current"),
    row("p2-moved-mirror", "no mirror was made", unanswered, "mirror", "mirror"),
    row("p2-moved-mirror", "were not read while it lived on", unanswered, "move", "new"),
    row(
        "p2-moved-mirror",
        "were not read while a mirror lived",
        without,
        Observation,
        label="mirrored",
        other=partial(without, Observation, label="moved"),
    ),
]

P3 = [
    row("p3", "old was not asked afterwards", without, Asked),
    row("p3", "old was asked nothing", replaced, Asked, {}, answers=()),
    row("p3", "device descriptors were not asked", replaced, Asked, {}, device=None),
    *(row("p3", f"not everything was asked: {fd} not KVM_", unput, fd) for fd in ("vm", "vcpu 0", "device")),
    row("p3", "is still under way and took effect, and old was not asked", unanswered, "move", "new"),
    row("p3-destination-killed", "old was not asked afterwards", without, Asked),
    row("p3-destination-killed", "not everything was asked: vm not KVM_", unput, "vm"),
    row("p3-destination-killed", "nobody can say whether it took effect", without, Exited, agent="destination"),
    row(
        "p3-destination-killed",
        "nobody can say whether it took effect",
        unanswered,
        "move",
        "new",
        other=partial(without, Exited, agent="destination"),
    ),
]

P3 += [
    row("p3-storm", "what the storm on old was answered is not on record", without, Stormed),
    row("p3-storm", "the storm on old: it made no call", replaced, Stormed, {}, threads=()),
    row("p3-storm", "old was not asked afterwards", without, Asked),
]

P4 = [
    row("p4", "the owner was not asked for its status", without_operation, "guest_status", "new"),
    row("p4", "the owner was not asked for its status", unanswered, "guest_status", "new"),
    row("p4", "the owner was not asked for its status", unanswered, "move", "new"),
    row("p4", "old was not asked whether it owns", without, Asked),
    row("p4", "old was not asked whether it owns", replaced, Asked, {}, answers=()),
    row("p4", "guest count was not read after the move", without, Observation, label="after"),
    row("p4", "guest count was not read after the move", replaced, Observation, {"label": "after"}, guests=None),
    row("p4", "guest count was not read after the move", unanswered, "launch_start", "old"),
    row("p4-destination-killed", "the owner was not asked", without_operation, "guest_status", "old", 1),
    row("p4-destination-killed", "who owns the context after it cannot be asked", without, Exited, agent="destination"),
    row("p4-destination-killed", "guest count was not read", replaced, Observation, {"label": "after"}, guests=None),
    row("p4-source-killed", "the owner was not asked", unanswered, "guest_status", "new"),
    row("p4-source-killed", "old was not asked whether it owns", without, Exited, agent="source"),
    row("p4-source-killed", "guest count was not read", replaced, Observation, {"label": "after"}, guests=None),
    row("p4-killed-later", "died later, before it was asked", without, Observation, label="later"),
    row("p4-killed-later", "died later, before it was asked", replaced, Observation, {"label": "later"}, guests=None),
    row("p4-killed-later", "old was not asked whether it owns", without, Exited, agent="source"),
    row("p4-refused", "new was not asked whether it owns", without_operation, "guest_status", "new"),
    row("p4-refused", "the owner was not asked", unanswered, "guest_status", "old", 1),
    row("p4-refused", "guest count was not read", without, Observation, label="after"),
    row("p4-replayed", "own context before it", unanswered, "guest_status", "new"),
    row("p4-replayed", "own context after it", unanswered, "guest_status", "new", 1),
    row("p4-replayed", "old was not asked whether it owns", without, Asked),
]

P5 = [
    row("p5", "not seen to count before", without, Counted, vm="old"),
    row("p5", "not seen to count after", without, Counted, vm="new"),
    row("p5", "GUEST_STATUS of old was not had before", unanswered, "guest_status", "old"),
    row("p5", "new was not asked for its status afterwards", unanswered, "guest_status", "new"),
    *(
        row("p5", f"{side} it did not say {field}", without_value, "guest_status", vm, field)
        for vm, side in (("old", "before"), ("new", "after"))
        for field in ("handle", "policy", "state")
    ),
    row("p5", "new was not given its registers", unanswered, "set_state", "new"),
    row("p5", "were not read again", without_value, "set_state", "new", "differs"),
    row("p5", "is still under way and took effect, and new was not asked", unanswered, "move", "new"),
    row("p5-destination-killed", "not seen to count before", without, Counted, ticks=100),
    row("p5-destination-killed", "not seen to count after", without, Counted, ticks=900),
    row("p5-destination-killed", "was not had before the move", unanswered, "guest_status", "old"),
    row("p5-destination-killed", "was not asked for its status afterwards", unanswered, "guest_status", "old", 1),
    row("p5-destination-killed", "nobody can say whether it took effect", without, Exited, agent="destination"),
    row("p5-refused", "was not had before the move", without_operation, "guest_status", "old"),
    row("p5-refused", "was not asked for its status afterwards", without_operation, "guest_status", "old", 1),
    row("p5-refused", "before it did not say state", without_value, "guest_status", "old", "state"),
    row("p5-refused", "after it did not say state", without_value, "guest_status", "old", "state", nth=1),
    row("p5-refused", "not seen to count after", without, Counted, ticks=20),
    row("p5-four-vcpus", "of 1 vCPUs that counted before, 4 did after", replaced, Counted, {"vm": "old"}, each=()),
    row("p5-four-vcpus", "of 4 vCPUs that counted before, 1 did after", replaced, Counted, {"vm": "new"}, each=()),
]

TRIED = "no move or mirror of old was tried again"
P6 = [
    row("p6-destination-killed", "shows a charge before the move", without, Observation, label="before"),
    row("p6-destination-killed", "shows a charge after the move", unread, "after", "source", file="current"),
    row("p6-destination-killed", "not seen to count after", without, Counted, ticks=900),
    row("p6-destination-killed", "not asked for its status", unanswered, "guest_status", "old", 1),
    row("p6-destination-killed", "was not asked whether it lives", without, Asked),
    row("p6-destination-killed", TRIED, unanswered, "mirror", "again"),
    row("p6-destination-killed", TRIED, without_operation, "mirror", "again"),
    row("p6-destination-killed", "nobody can say whether it took effect", without, Exited, agent="destination"),
    row("p6-refused", "shows a charge before the move", without, Observation, label="before"),
    row("p6-refused", "shows a charge after the move", without, Observation, label="after"),
    row("p6-refused", "not seen to count before", without, Counted, ticks=10),
    row("p6-refused", "not seen to count after", without, Counted, ticks=20),
    row("p6-refused", "old was not asked for its status", unanswered, "guest_status", "old", 1),
    row("p6-refused", "whether new is still usable was not asked", unanswered, "guest_status", "new"),
    row("p6-refused", "old was not asked whether it lives", without, Asked),
    row("p6-refused", "old was asked nothing", replaced, Asked, {}, answers=()),
    row("p6-refused", TRIED, without_operation, "mirror", "new"),
    row("p6-refused", "nobody can say whether it took effect", unanswered, "move", "new"),
]

REFUSED = "was refused as the contract says, so no errno was seen"
P7 = [
    row("p7", REFUSED, unanswered, "mirror", "new"),
    row("p7", REFUSED, without_operation, "mirror", "new"),
    row("p7", "is no version of a kernel", replaced, Header, {}, kernel=""),
    row("p7", "does not say how many ASIDs", replaced, Header, {}, asids={}),
    row("p7-limit", "the limits were not read", without, Observation),
    row("p7-limit", "the limits were not read", unread, ""),
    row("p7-limit", "the limits were not read", unread, "", file="max"),
    row(
        "p7-limit",
        "the limits were not read",
        without,
        Observation,
        label="before",
        other=partial(without, Observation),  # the one after it shows the limit, and those before it that there was one
    ),
    row("p7-limit", REFUSED, unanswered, "move", "new"),
    row("p7-fault", "has chosen that is not on record", without, Fault, event="apply"),
    row("p7-fault", "has chosen that is not on record", without, Fault, event="evidence"),
    row("p7-fault", "has chosen that is not on record", replaced, Fault, {"event": "evidence"}, struck=None),
    row("p7-fault", REFUSED, unanswered, "mirror", "new"),
    row("p7-firmware", REFUSED, without, Firmware),
    row("p7-firmware", REFUSED, without, Firmware, command="LAUNCH_START"),
    row("p7-firmware", REFUSED, unanswered, "launch_finish", "old"),
]

P8 = [
    row("p8", "move of new had not ended when its process did", unanswered, "move", "new"),
    row("p8", "run of old had not ended when its process did", unanswered, "run", "old"),
    row("p8-destination-killed", "when that was is not on record", without, Exited, agent="destination"),
    row("p8-destination-killed", "whom kill of step 8 struck is not on record", without, Fault, event="apply"),
    row("p8-destination-killed", "whom kill of step 8 struck is not on record", replaced, Fault, {}, ends=()),
    row("p8-destination-killed", "nothing shows that the fault", without, Fault, event="evidence"),
    row("p8-destination-killed", "nothing shows that the fault", replaced, Fault, {"event": "evidence"}, struck=None),
    row("p8-destination-killed", "was not reached", without, Held),
    row(
        "p8-destination-killed",
        "whom kill of step 8 struck is not on record",
        unanswered,
        "move",
        "new",
        other=partial(without, Fault, event="apply"),
    ),
    row("p8-source-killed", "move of new had not ended when its process did", unanswered, "move", "new"),
]

SIDES: dict[str, dict[str, object]] = {"start": {"label": "start"}, "end": {"label": "end"}}
P9 = [
    row("p9", "not observed at the start", without, Observation, label="start"),
    row("p9", "not observed at the end", without, Observation, label="end"),
    row("p9", "not filled to capacity at the start", without, Filled, label="start"),
    row("p9", "not filled to capacity at the start and end", without, Filled),
    row("p9", "no key was filled", replaced, Filled, {}, count={}),
    row("p9", "sev was not filled to capacity at the start", replaced, Filled, SIDES["start"], count={"sev_es": 7}),
    row("p9", "sev was not filled to capacity at the end", replaced, Filled, SIDES["end"], count={"sev_es": 7}),
    row("p9", "sev_es was not filled", replaced, Filled, {}, count={"sev": 8}),
    *(row("p9", "for different reasons", replaced, Filled, where, errno={}) for where in SIDES.values()),
    row("p9", "with ok, expected EBUSY", replaced, Filled, {}, errno={}),
    row("p9", "how many ASIDs of sev the host has", replaced, Header, {}, asids={"sev_es": 7}),
    row("p9", "how many ASIDs of sev_es the host has", replaced, Header, {}, asids={}),
    *(row("p9", "could not be asked", replaced, Observation, where, guests=None) for where in SIDES.values()),
    row("p9", "were not read at its end", unread, "end", "."),
    row("p9", "were not read at its end", unread, "end", ".", file="current"),
    row(
        "p9",
        "were not read at its end",
        partial(unread, "end", "source", "destination"),
        other=partial(unread, "end", "."),  # which sums them up
    ),
    row("p9", "in use at the start of the run was not read", unread, "start"),
    row("p9", "in use at the start of the run was not read", unread, "start", ".", file="current"),
    *(row("p9", "pages of the host were not", replaced, Observation, where, pinned=None) for where in SIDES.values()),
    row("p9", "source still lived", without, Exited, agent="source"),
    row("p9", "whether the run's cgroups went", replaced, Filled, {}, dying=None, dying_misc=None),
    row(
        "p9",
        "whether the run's cgroups went",
        partial(replaced, Filled, {}, dying_misc=None),
        other=partial(replaced, Filled, {}, dying=None),
    ),
    *(
        row("p9", f"kvm_vcpu were not counted at the {side}", replaced, Observation, where, objects={})
        for side, where in SIDES.items()
    ),
    *(
        row("p9", f"no count of {what} at the {side}", replaced, Observation, where, **{name: None})
        for name, what in WITNESSES.items()
        for side, where in [*SIDES.items(), ("start", {})]
    ),
]

P10 = [
    row("p10", "the events around move were not read", without, Observation, label="after"),
    row("p10", "the limits were not read", without, Observation),
    *(
        row("p10", f"the events of {cgroup} were not read", unread, label, cgroup, file=file)
        for label in ("before", "after")
        for cgroup in (".", "destination")
        for file in ("events", "")
    ),
    row("p10", "the limits were not read", unread, ""),
    row("p10", "nobody can say what was refused meanwhile", unanswered, "move", "new"),
    row("p10", "does not say how many ASIDs", replaced, Header, {}, asids={}),
    row("p10", "the limits were not read", without, Observation, label="before", other=partial(without, Observation)),
]

P10 += [
    row(
        "p10-local",
        "the events of destination were not read",
        partial(unread, "after", "destination", file="events.local"),
        other=partial(unread, "after", "destination", file="events"),
    ),
]

P11 = [
    row("p11", "source went into elsewhere, and no charge of its own was seen", without, Observation, label="went"),
    row("p11", "no charge of its own was seen", unread, "went", "source"),
    row("p11", "no charge of its own was seen", unread, "went", "source", file="current"),
    row("p11", "no process changed its cgroup", unanswered, "enter", "source"),
    row("p11-two", "destination went into elsewhere, and no charge", without, Observation, label="destination-went"),
    row("p11-two", "source went into elsewhere, and no charge", unread, "source-went", "source", file="current"),
]

P12 = [
    row("p12", "nothing shows that the kernel's log was read", replaced, Header, {}, log_ahead=None),
    row("p12-held", "nothing shows that the kernel's log was read", replaced, Header, {}, log_ahead=None),
    row("p12-held", "The hold 'vcpu-running' of step 6 is not on record", without, Held),
    row("p12-firmware", "What the firmware was told to do with its commands was lost", without, Firmware),
    row("p12-firmware", "What the firmware was told to do", without, Firmware, order=0),
]

P13 = [
    row("p13", "nobody watched what the firmware was sent", without, Firmware),
    row("p13", "the first 1 records of the firmware are missing", without, Firmware, order=0),
    row("p13", "records of the firmware are missing between 0 and 2", without, Firmware, order=1),
    row("p13", "records of the firmware are missing between 1 and 3", without, Firmware, order=2),
    row("p13", "LAUNCH_START was answered, and of which context", replaced, Firmware, {"order": 0}, handle=None),
    row("p13", "DECOMMISSION was answered, and of which context", replaced, Firmware, {"order": 2}, handle=None),
    row(
        "p13",
        "what it will still send, nobody can say",
        unanswered,
        "move",
        "new",
        other=partial(without, Exited, agent="destination"),
    ),
    row("p13-by-itself", "whether anybody watched the firmware before it", without, Firmware, order=0),
    row("p13-by-itself", "whether anybody watched the firmware after it", without, Firmware, order=1),
    row("p13-by-itself", "of which context it was is not on record", replaced, Firmware, {}, handle=None),
]

P14 = [
    row("p14", "the buffer of PEK_CSR with a buffer of 16 bytes", without_value, "platform", "", "behind"),
    row("p14", "did not live to look at its buffer", unanswered, "platform", "host"),
    row("p14", "did not live to look at its buffer", unanswered, "dbg_decrypt", "guest"),
    row("p14", "nobody could look outside the buffer of dbg_encrypt", without_value, "dbg_encrypt", "guest", "outside"),
    row("p14", "not every command to debug a guest is on record", without, Firmware, order=2),
    row("p14", "not every command to debug a guest is on record", replaced, Firmware, {"order": 2}, asked={}),
]

ROWS = [*P1, *P2, *P3, *P4, *P5, *P6, *P7, *P8, *P9, *P10, *P11, *P12, *P13, *P14]


@pytest.mark.parametrize("removal", ROWS, ids=str)
def test_without_its_witness_a_promise_is_neither_kept_nor_broken(removal: Removal) -> None:
    kept = KEPT[removal.kept]
    less = after(kept.make(), removal.change())
    if removal.other is not None:
        verdict = kept.judged(less)
        assert verdict.outcome is Outcome.KEPT, f"the other witness is none: {verdict.reason}"
        less = after(less, removal.other())
    verdict = kept.judged(less)
    assert verdict.outcome is Outcome.UNKNOWN, verdict.reason
    assert removal.reason in verdict.reason
