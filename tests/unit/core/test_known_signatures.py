# SPDX-License-Identifier: Apache-2.0
"""Every signature in known.yaml is still one that a checker gives, to a history of what the finding's page says.

A signature that nothing gives any more excuses nothing; what it stood for has another one by then, and counts.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EBADF, EBUSY, EIO, ENOMEM

import msgspec
import pytest

from chaos.history.records import Counted, Done, Filled, Header, History, Observation, Record
from chaos.judge import findings
from tests.unit.core.build import Builder, changed, guest_moved, moved
from tests.unit.core.doctored import MOVE, begun, verdict_of
from tests.unit.core.test_contexts import flushed
from tests.unit.core.test_interrupts import beside_the_dead
from tests.unit.core.test_narrow_findings import (
    crossed,
    es_into,
    given_out_dirty,
    mirror_asked,
    moved_es,
    moved_mirror,
    nothing_put,
    read,
)
from tests.unit.core.test_p08_no_deadlock import HEADLESS, survived
from tests.unit.core.test_p14_within_bounds import RELOADED, all_behind, reloaded, without_chain, written_beyond
from tests.unit.core.test_storage import unwritten

ES = "sev_es"
MOVED = "guest_status-after-move:EBADF"
LOST, EARLIER = "stopped-after-move-of-typed:KVM_RUN-EINVAL", "lost-in-earlier-move-of-typed:KVM_RUN-EINVAL"


def on_a_host_with_others(history: History) -> History:
    return changed(history, lambda r: msgspec.structs.replace(r, shared=True) if isinstance(r, Header) else r)


def on_a_host_of_its_own(history: History) -> History:
    """Of its ASIDs the run may take fewer than there are."""

    def fenced(record: Record) -> Record:
        if isinstance(record, Header):
            return msgspec.structs.replace(record, host="local")
        if isinstance(record, Observation) and record.label == "start":
            limited = {**record.misc["."], "max": {"sev": 6, "sev_es": 7}}
            return msgspec.structs.replace(record, misc={**record.misc, ".": limited})
        if isinstance(record, Filled):
            return msgspec.structs.replace(record, count={**record.count, "sev": record.count["sev"] - 2})
        return record

    return changed(history, fenced)


def es_asked() -> History:
    """A SEV-ES guest that cannot be entered here is moved."""
    b = Builder(executes_es=False)
    b.begin()
    b.launch("old", "source", ES)
    b.launch("new", "destination")
    b.status("old", "source")
    b.move("old", "new", "destination")
    b.status("new", "destination", error=EBADF)
    return b.end()


def warned() -> History:
    """The warning of the misc controller in a move of a SEV-ES context across cgroups."""
    b = begun()
    b.launch("old", "source", ES)
    b.launch("new", "destination")
    invoke = b.invoke("move", "destination", vm="new", source="old")
    b.kernel("misc cgroup resource sev became less than 0")
    b.kernel("WARNING: CPU: 0 PID: 190 at kernel/cgroup/misc.c:119 misc_cg_uncharge+0x84/0x90")
    b.done(invoke)
    return b.finish()


def warned_of_lock() -> History:
    """A VM cannot be made for want of memory, and lockdep warns of it."""
    b = begun()
    invoke = b.invoke("create", "source", vm="vm", kind="sev", vcpus=1, memory="guest")
    b.kernel("WARNING: arch/x86/kvm/svm/sev.c:131 at sev_guest+0x13f/0x170 [kvm_amd], CPU#1: python3/106")
    b.done(invoke, "fail", error=ENOMEM)
    return b.finish()


def typed(*, more: bool = False, ended: str = "KVM_RUN: EINVAL", ticks: int = 110) -> History:
    """A VM with a type cannot be entered after its move; it may be moved once `more`, and then reads so."""
    b = begun()
    b.launch("old", "source", "sev")
    vms = ["new", "newer"][: 1 + more]
    for vm in vms:
        b.do("create", "destination", vm=vm, kind="plain", vcpus=1, memory="guest", type=2)
    b.count("old", "source", 100)
    b.status("old", "source")
    before = "old"
    for vm, told in zip(vms, (("KVM_RUN: EINVAL", 110), (ended, ticks)), strict=False):
        if before != "old":
            stopped = b.invoke("pause", "destination", vm=before)
            b.done(stopped, value={"ended": "KVM_RUN: EINVAL"})
        b.move(before, vm, "destination")
        b.give_state(vm, "destination")
        b.status(vm, "destination", error=EBADF)
        b.records[-1] = msgspec.structs.replace(b.count(vm, "destination", told[1]), ended=told[0])
        before = vm
    return b.history()


def vmsa_elsewhere(*, asked: bool = True) -> History:
    """UPDATE_VMSA and if `asked` GUEST_STATUS of a SEV-ES mirror in another process than its owner's."""
    b = begun()
    b.do("create", "source", vm="owner", kind=ES, vcpus=1, memory="guest")
    b.do("init", "source", vm="owner", key=ES)
    b.do("launch_start", "source", vm="owner")
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", vm="mirror", source="owner")
    b.do("launch_update_vmsa", "destination", vm="mirror", error=EBADF)
    if asked:
        b.status("mirror", "destination", error=EBADF)
    return b.end()


def both_limited() -> History:
    return es_into(limit={"sev": 0, ES: 0}, error=EBUSY, events={"sev": 1})


def sev_limited() -> History:
    return es_into(limit={"sev": 0}, error=EBUSY, events={"sev": 1})


def es_limited() -> History:
    return es_into(limit={ES: 0}, error=0, events={})


def sev_exhausted() -> History:
    """Every `sev` ASID of the host is taken, there is room for `sev_es`, and a SEV-ES guest is moved."""
    b = begun()
    b.fill("start")
    guests = [f"guest-{number}" for number in range(8)]
    for vm in guests:
        b.launch(vm, "source", "sev")
    b.launch("old", "source", ES)
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    charged = (("source", "sev", 8), ("source", ES, 1), (".", "sev", 8), (".", ES, 1))
    b.do("create", "source", vm="one-more", kind="sev", vcpus=1, memory="guest")
    for label, events in (("full", 0), ("before", 1), ("after", 2)):
        seen = read(b, label, *charged, guests=9)
        for cgroup, files in seen.misc.items():
            counted = {".": events, "source": min(events, 1)}.get(cgroup, 0)  # where the capacity was met, and above
            files |= {"max": {}, "events": {"sev.max": counted, f"{ES}.max": 0}}
        if label == "full":
            b.do("init", "source", vm="one-more", key="sev", error=EBUSY)
        elif label == "before":
            b.move("old", "new", "destination", error=EBUSY)
    return b.end()


def unflushed() -> History:
    """INIT finds no clean ASID, since the firmware fails the flush, and is refused without its status."""

    def refused(record: Record) -> Record:
        mine = isinstance(record, Done) and record.errno == EBUSY
        return msgspec.structs.replace(record, errno=EIO) if mine else record

    return changed(flushed("fail:HWERROR_PLATFORM"), refused)


def debugged(*commands: str) -> History:
    """A guest that was moved, and is debugged at its destination."""
    b = guest_moved()
    for command in commands:
        b.do(command, "destination", error=EBADF, vm="new", read_at=0, write_at=0, length=64)
    return b.finish()


def asid_given_twice() -> History:
    b = guest_moved()
    b.status("new", "destination", error=EBADF)
    b.count("new", "destination", 200)
    for vcpu in (2, 3):
        b.entered(vcpu, 16, shared=(2,))
    return b.finish()


SHOWN: list[tuple[str, str, Callable[[], History]]] = [
    ("P5", "0001", lambda: moved(status_error=EBADF)),
    ("P5", "0001", es_asked),
    ("P7", "0001", lambda: mirror_asked(elsewhere=False, moved=True)),
    ("P1", "0002", moved_es),
    ("P9", "0002", moved_es),
    ("P9", "0002", lambda: on_a_host_with_others(moved_es())),
    ("P9", "0002", lambda: on_a_host_of_its_own(moved_es())),
    ("P7", "0002", sev_limited),
    ("P7", "0002", es_limited),
    ("P10", "0002", es_limited),
    ("P7", "0002", sev_exhausted),
    ("P10", "0002", sev_exhausted),
    ("P10", "0002", both_limited),
    ("P12", "0002", warned),
    ("P5", "0003", typed),
    ("P5", "0003", lambda: typed(more=True)),
    *((promise, "0004", moved_mirror) for promise in ("P1", "P2", "P9")),
    ("P9", "0004", lambda: on_a_host_of_its_own(moved_mirror())),
    ("P7", "0005", lambda: mirror_asked(elsewhere=True)),
    ("P7", "0005", vmsa_elsewhere),
    ("P7", "0005", lambda: vmsa_elsewhere(asked=False)),
    ("P7", "0006", unflushed),
    ("P4", "0007", lambda: crossed(at_once=True)),
    ("P5", "0007", lambda: crossed(at_once=True)),
    ("P7", "0007", lambda: crossed(at_once=True)),
    ("P7", "0008", lambda: unwritten().over()),
    ("P5", "0009", beside_the_dead),
    ("P7", "0001", lambda: debugged("dbg_decrypt")),
    ("P7", "0001", lambda: debugged("dbg_decrypt", "dbg_encrypt")),
    ("P14", "0010", all_behind),
    ("P14", "0011", written_beyond),
    ("P14", "0013", without_chain),
    ("P14", "0014", lambda: reloaded(*RELOADED["once too few"])),
    ("P8", "0012", lambda: survived().history()),
    ("P5", "0015", asid_given_twice),
    ("P12", "0016", warned_of_lock),
    ("P7", "0017", lambda: given_out_dirty(untold=True)),
    ("P7", "0018", lambda: nothing_put(struck=1)),
]
OF_ITS_OWN = {"0012": HEADLESS}
"""The experiment that tells a checker what of the history it cannot, by finding."""


@pytest.fixture(scope="module")
def given() -> set[tuple[str, str, str]]:
    """(finding, promise, signature) of these histories; also as it is where the promise need not be kept."""
    verdicts = [(of, promise, verdict_of(promise, told(), OF_ITS_OWN.get(of, MOVE))) for promise, of, told in SHOWN]
    return {(of, promise, told) for of, promise, v in verdicts for told in (v.signature, "+".join(v.deviations))}


@pytest.mark.parametrize(
    ("finding", "promise", "signature"),
    [(f.id, d.promise, d.signature) for f in findings.load() for d in f.deviations],
)
def test_a_checker_gives_it(given: set[tuple[str, str, str]], finding: str, promise: str, signature: str) -> None:
    mine = sorted(named for of, judged, named in given if (of, judged) == (finding, promise))
    assert signature in mine


@pytest.mark.parametrize(("ended", "ticks"), [("KVM_EXIT_SHUTDOWN", 110), ("KVM_RUN: EINVAL", 111), ("", 120)])
def test_what_a_later_move_does_to_a_typed_guest_is_not_accepted_in_advance(ended: str, ticks: int) -> None:
    assert verdict_of("P5", typed(more=True)).signature == f"{MOVED}+{EARLIER}+{LOST}"
    assert EARLIER not in verdict_of("P5", typed(more=True, ended=ended, ticks=ticks)).signature


def test_a_typed_guest_that_stopped_before_any_move_is_no_finding() -> None:
    def stopped(record: Record) -> Record:
        mine = isinstance(record, Counted) and record.vm == "old"
        return msgspec.structs.replace(record, ended="KVM_RUN: EINVAL") if mine else record

    assert EARLIER not in verdict_of("P5", changed(typed(more=True), stopped)).signature
