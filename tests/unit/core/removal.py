# SPDX-License-Identifier: Apache-2.0
"""Histories in which a promise is kept, and ways to take away what it was kept on.

A history is read up to where it is damaged, as any reader does (`chaos.history.file`). What was done (Invoke) is so no
witness by itself: without it the answer after it belongs to nothing, and the history ends there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import msgspec

from chaos.experiment.model import Experiment
from chaos.experiment.steps import FaultStep
from chaos.history.file import up_to_damage
from chaos.history.records import (
    Asked,
    Counted,
    Done,
    End,
    Exited,
    Fault,
    Filled,
    Firmware,
    Header,
    Held,
    History,
    Invoke,
    Observation,
    Record,
    Stormed,
)
from chaos.judge.checkers import CHECKERS
from chaos.judge.checkers.p07_errors import RETURNS
from chaos.judge.judge import shortcomings
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import ALL, Builder, changed, shipped
from tests.unit.core.doctored import (
    ES,
    KILL_DESTINATION,
    KILL_SOURCE,
    MOVE,
    Change,
    answered,
    begun,
    failed,
    ready,
    see,
    tried_again,
)
from tests.unit.core.test_hung_task import BEHIND, STALLED, TID, hangs
from tests.unit.core.test_p01_balance import both_killed
from tests.unit.core.test_p02_one_charge import moved_mirror
from tests.unit.core.test_p03_storms import at_one_instant, stormed
from tests.unit.core.test_p04_one_owner import killed_later, replayed
from tests.unit.core.test_p06_clean_failure import usable
from tests.unit.core.test_p07_errors import refused
from tests.unit.core.test_p10_limits import limited
from tests.unit.core.test_p11_charges_stay import went
from tests.unit.core.test_p13_no_firmware_traffic import watched
from tests.unit.core.test_p14_within_bounds import within_bounds

ALWAYS: frozenset[type[Record]] = frozenset({Header, Invoke, End})
"""Kinds of records without all of which no history shows anything; answers (Done) are taken away one by one."""


def failed_and_asked() -> History:
    """A move that is refused, after which the source and the destination say what they own."""
    b = failed()
    b.status("new", "destination", error=errno.ENOTTY)
    return b.finish()


def four_vcpus() -> History:
    b = ready()
    b.records[-4] = msgspec.structs.replace(b.records[-4], each=(10, 30, 20, 40))  # what was counted
    b.move("old", "new", "destination")
    b.give_state("new", "destination")
    b.records[-1] = msgspec.structs.replace(b.records[-1], value={"vcpus": 4, "differs": []})
    b.status("new", "destination")
    counted = b.count("new", "destination", 25)
    b.records[-1] = msgspec.structs.replace(counted, each=(25, 35, 26, 45))
    return b.finish()


def two_that_went() -> History:
    """Two processes go elsewhere, each with a guest, and one after the other is looked at and ends."""
    b = begun()
    for agent in ("source", "destination"):
        b.launch(f"of-{agent}", agent, "sev")
    b.do("enter", "source", cgroup="elsewhere")
    b.observe("source-went", {"source": 1, "destination": 1})
    b.exit("source")
    b.do("enter", "destination", cgroup="elsewhere")
    b.observe("destination-went", {"destination": 1})
    b.exit("destination")
    return b.finish()


def refused_by_the_firmware() -> History:
    """LAUNCH_FINISH of a guest that was not measured, which a firmware that was watched refuses with a reason."""
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    for f in ("init", "launch_start"):
        b.do(f, "source", vm="old", key="sev")
    for order, (command, status) in enumerate({"LAUNCH_START": 0, "LAUNCH_FINISH": 2}.items()):
        b.add(Firmware(t=b.tick(), order=order, command=command, status=status, handle=1))
    b.do("launch_finish", "source", vm="old", error=errno.EIO, firmware=2)
    return b.finish()


def moved_in_a_storm() -> History:
    """The source is asked by a storm through the move, and one by one after it."""
    b = Builder()
    b.begin()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("storm", "source", vm="old", threads=2, calls=["KVM_GET_REGS", "KVM_RUN"])
    done = b.move("old", "new", "destination")
    b.do("calm", "source", vm="old")
    b.add(msgspec.structs.replace(stormed(*at_one_instant(done)), t=b.tick()))
    b.ask("old", "source", dead=True)
    return b.finish()


def refused_beside_a_fault() -> History:
    """A move that is answered what a fault makes a function of the kernel return, and a mirror that is refused."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    see(b, "before", {"source": 1})
    fault = Fault(t=b.tick(), fault="kernel-return", event="apply", step=0, target="destination")
    b.add(fault)
    b.move("old", "new", "destination", error=errno.EINTR)
    b.add(msgspec.structs.replace(fault, t=b.tick(), event="evidence", struck=True))
    b.add(msgspec.structs.replace(fault, t=b.tick(), event="undo"))
    b.do("mirror", "destination", error=errno.EINVAL, vm="new", source="old")
    return b.finish()


def limited_and_local() -> History:
    """A move into a full cgroup, on a kernel that also counts at whose limit it was."""

    def change(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        at = {"destination": int(record.label == "after")}
        local = {cgroup: {"events.local": {"sev.max": at.get(cgroup, 0), "sev_es.max": 0}} for cgroup in record.misc}
        misc = {cgroup: {**files, **local[cgroup]} for cgroup, files in record.misc.items()}
        return msgspec.structs.replace(record, misc=misc)

    return changed(limited(), change)


def hung_in_a_hold() -> History:
    """kill-destination-in-move, in which the kernel reports somebody who waits behind the move that is held."""
    told = Builder(KILL_DESTINATION)
    for record in ALL[KILL_DESTINATION]().records[1:]:
        told.t = record.t
        told.add(record)
        if isinstance(record, Held):
            hangs(told, 400, BEHIND)
            break
    slept = told.t - record.t
    for later in ALL[KILL_DESTINATION]().records[record.seq + 1 :]:
        told.add(msgspec.structs.replace(later, t=later.t + slept))
    return told.history()


def hung_behind_the_firmware() -> History:
    """GUEST_STATUS is stalled by the firmware, and the kernel reports the thread that waits for it."""
    b = Builder()
    b.spawn("source")
    invoke = b.invoke("guest_status", "source", vm="old")
    began = b.tick()
    hangs(b, TID, STALLED)
    b.add(Done(t=b.tick(), op=invoke.op, outcome="ok", tid=TID))
    b.add(Firmware(t=began, order=0, command="GUEST_STATUS", status=0, began=began, fault="stall"))
    b.add(Firmware(t=b.tick(), order=1, command="DECOMMISSION", status=0, handle=1, began=b.t))
    return b.end()


@dataclass(frozen=True, slots=True)
class Kept:
    """A history in which the promise is kept. `rests_on` are the kinds of its records without all of which it is not,
    beside those that are so `ALWAYS`."""

    promise: str
    make: Callable[[], History]
    rests_on: frozenset[type[Record]]
    experiment: str = ""

    def judged(self, history: History) -> Verdict:
        """As `judge` does, which would judge the other twelve promises as well."""
        experiment = experiment_of(self.experiment)
        verdict, void = CHECKERS[self.promise](experiment, history), list(shortcomings(experiment, history))
        if not void or verdict.outcome is Outcome.BROKEN:
            return verdict
        return msgspec.structs.replace(verdict, outcome=Outcome.UNKNOWN, reason=f"{'; '.join(void)}; {verdict.reason}")


@cache
def experiment_of(name: str) -> Experiment:
    """The one that is shipped by that name; a history by hand is of none, and its script has no fault and no hold, but
    for the one `RETURNS`."""
    if name != RETURNS:
        return shipped(name) if name else msgspec.structs.replace(shipped(MOVE), name="by-hand")
    options: dict[str, str | int | float | bool] = {"function": "f", "value": "-EINTR"}
    strike = FaultStep(fault=RETURNS, target="destination", options=options)
    return msgspec.structs.replace(shipped(MOVE), name="by-hand", script=(strike,))


def _kept(promise: str, make: Callable[[], History] | str, *rests_on: type[Record]) -> Kept:
    if isinstance(make, str):
        return Kept(promise, ALL[make], frozenset(rests_on), make)
    of = {hung_in_a_hold: KILL_DESTINATION, refused_beside_a_fault: RETURNS}.get(make, "")
    return Kept(promise, make, frozenset(rests_on), of)


# A run in which a fault was planned, or a hold, is void without its record.
KEPT: dict[str, Kept] = {
    "p1": _kept("P1", MOVE, Observation),
    "p1-es": _kept("P1", ES, Observation),
    "p1-destination-killed": _kept("P1", KILL_DESTINATION, Observation, Exited, Fault, Held),
    "p1-both-killed": _kept("P1", both_killed, Observation, Exited),
    "p2-moved-mirror": _kept("P2", lambda: moved_mirror().finish(), Observation),
    "p3": _kept("P3", MOVE, Asked),
    "p3-destination-killed": _kept("P3", KILL_DESTINATION, Asked, Exited, Fault, Held),
    "p3-storm": _kept("P3", moved_in_a_storm, Asked, Stormed),
    "p4": _kept("P4", MOVE, Asked, Observation),
    "p4-destination-killed": _kept("P4", KILL_DESTINATION, Observation, Exited, Fault, Held),
    "p4-source-killed": _kept("P4", KILL_SOURCE, Observation, Exited, Fault, Held),
    "p4-killed-later": _kept("P4", lambda: killed_later(seen=True).finish(), Observation, Exited),
    "p4-refused": _kept("P4", failed_and_asked, Observation),
    "p4-replayed": _kept("P4", lambda: replayed(0, 0).finish(), Observation, Asked),
    "p5": _kept("P5", MOVE, Counted),
    "p5-destination-killed": _kept("P5", KILL_DESTINATION, Counted, Exited, Fault, Held),
    "p5-refused": _kept("P5", failed_and_asked, Counted),
    "p5-four-vcpus": _kept("P5", four_vcpus, Counted),
    "p6-destination-killed": _kept("P6", KILL_DESTINATION, Asked, Counted, Observation, Exited, Fault, Held),
    "p6-refused": _kept("P6", lambda: tried_again(usable()).finish(), Asked, Counted, Observation),
    "p7": _kept("P7", lambda: refused(error=errno.EINVAL, f="mirror")),
    "p7-limit": _kept("P7", limited, Observation),
    "p7-firmware": _kept("P7", refused_by_the_firmware, Firmware),
    "p7-fault": _kept("P7", refused_beside_a_fault, Fault),
    "p8": _kept("P8", MOVE),
    "p8-destination-killed": _kept("P8", KILL_DESTINATION, Exited, Fault, Held),
    "p8-source-killed": _kept("P8", KILL_SOURCE, Fault, Held),
    "p9": _kept("P9", MOVE, Observation, Filled, Exited),
    "p10": _kept("P10", limited, Observation),
    "p10-local": _kept("P10", limited_and_local, Observation),
    "p11": _kept("P11", lambda: went({"source": 1, "elsewhere": 0}), Observation),
    "p11-two": _kept("P11", two_that_went, Observation),
    "p12": _kept("P12", MOVE),
    "p12-held": _kept("P12", hung_in_a_hold, Held, Fault),
    "p12-firmware": _kept("P12", hung_behind_the_firmware, Firmware),
    "p13": _kept("P13", watched, Firmware),
    "p13-by-itself": _kept("P13", MOVE, Firmware),
    "p14": _kept("P14", within_bounds, Firmware),
}


def read_again(records: Iterable[Record | None]) -> History:
    """As a reader finds the records that are left, numbered anew."""
    left = [record for record in records if record is not None]
    return up_to_damage([msgspec.structs.replace(record, seq=seq) for seq, record in enumerate(left)])


def after(history: History, change: Change) -> History:
    return read_again(map(change, history.records))


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that is taken away from the history `kept` of KEPT; the verdict then says `reason`. If there is an
    `other` witness of the same, the promise stays kept until that is taken away too."""

    kept: str
    change: Callable[[], Change]
    reason: str
    other: Callable[[], Change] | None = None

    def __str__(self) -> str:
        return f"{self.kept}: {self.reason}"


def unanswered(f: str, vm: str, nth: int = 0) -> Change:
    """Leave out the answer to an operation on a VM, or of a VMM: the `nth` of its kind."""
    invokes: list[Invoke] = []

    def change(record: Record) -> Record | None:
        if isinstance(record, Invoke) and record.f == f and vm in (record.args.get("vm"), record.agent):
            invokes.append(record)
        mine = isinstance(record, Done) and len(invokes) == nth + 1 and record.op == invokes[nth].op
        return None if mine else record

    return change


def without_begin(f: str, vm: str) -> Change:
    """Leave out that the operation was begun."""
    return lambda r: None if isinstance(r, Invoke) and r.f == f and r.args.get("vm") == vm else r


def without_value(f: str, vm: str, *keys: str, nth: int = 0) -> Change:
    """The answer to an operation does not say this."""
    plain = answered(f, vm, nth, value={})

    def change(record: Record) -> Record | None:
        emptied = plain(record)
        if not isinstance(record, Done) or emptied == record:
            return record
        return msgspec.structs.replace(record, value={k: v for k, v in record.value.items() if k not in keys})

    return change


def unread(label: str, *cgroups: str, file: str = "") -> Change:
    """One file of these cgroups was not read in an observation, or none of theirs; of all cgroups if none is named."""

    def change(record: Record) -> Record:
        if not isinstance(record, Observation) or label not in ("", record.label):
            return record
        misc = {name: dict(files) for name, files in record.misc.items()}
        for cgroup in cgroups or tuple(misc):
            if file:
                misc[cgroup].pop(file, None)
            else:
                misc.pop(cgroup, None)
        return msgspec.structs.replace(record, misc=misc)

    return change


def unput(fd: str, nth: int = 0) -> Change:
    """One question was not put to a descriptor."""

    def change(record: Record) -> Record:
        if not isinstance(record, Asked):
            return record
        gone = [answer for answer in record.answers if answer.fd == fd][nth]
        return msgspec.structs.replace(record, answers=tuple(a for a in record.answers if a is not gone))

    return change


def both(first: Change, second: Change) -> Change:
    """One change after the other."""

    def change(record: Record) -> Record | None:
        once = first(record)
        return None if once is None else second(once)

    return change
