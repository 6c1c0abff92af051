# SPDX-License-Identifier: Apache-2.0
"""P7: refusals held against the oracle."""

from __future__ import annotations

from errno import EBADF, EBUSY, EINVAL, EIO, ENOTTY, ETIMEDOUT

import msgspec
import pytest

from chaos.history.records import Header, History, Observation, Record
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, changed
from tests.unit.core.doctored import DEVIATED, HELD, UNKNOWN, begun, see, verdict_of


def refused(*, error: int, source: str = "old", kernel: str = "6.12.117", f: str = "move") -> History:
    b = Builder(kernel=kernel)
    b.begin()
    see(b, "limits")
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm=source, to="destination")
    see(b, "before", {"source": 1})
    b.do(f, "destination", vm="new", source=source, error=error)
    return b.finish()


def test_p7() -> None:
    held = verdict_of("P7", refused(error=EINVAL, f="mirror"))  # the target has vCPUs
    assert (held.outcome, held.reason) == (HELD, "refusals as documented: mirror of new from old: EINVAL")
    verdict = verdict_of("P7", refused(error=EBUSY))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "move:EBUSY-for-EBADF-or-ok")
    assert "and cgroup 'destination' had room for a charge of sev" in verdict.reason
    assert verdict_of("P7", refused(error=EINVAL, f="mirror", kernel="6.1.192")).outcome is HELD
    verdict = verdict_of("P7", refused(error=0, f="mirror"))
    assert (verdict.outcome, verdict.seen) == (DEVIATED, "ok")
    assert verdict_of("P7", refused(error=0)).outcome is UNKNOWN  # nothing was refused


@pytest.mark.parametrize(("kernel", "right", "wrong"), [("6.1.192", EBUSY, EINVAL), ("6.12.117", EINVAL, EBUSY)])
def test_p7_init_twice(kernel: str, right: int, wrong: int) -> None:
    for error, outcome in ((right, HELD), (wrong, DEVIATED)):
        b = Builder(kernel=kernel)
        b.begin()
        see(b, "limits")
        b.do("create", "source", vm="old", kind="sev", vcpus=0, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        b.do("init", "source", vm="old", key="sev", error=error)
        assert verdict_of("P7", b.finish()).outcome is outcome


def test_p7_many_refusals_and_a_message_that_did_not_come() -> None:
    b = begun()
    b.launch("old", "source")
    for _ in range(5):
        b.do("launch_start", "source", vm="old", error=ENOTTY)
    b.done(b.invoke("move", "destination", vm="new", source="old"), "fail", error=EIO, value={"call": "the other end"})
    verdict = verdict_of("P7", b.finish())
    assert verdict.outcome is HELD and verdict.reason.endswith("and 2 more")


def test_p7_the_firmware_s_own_refusals() -> None:
    for firmware, outcome in ((23, HELD), (0, DEVIATED)):
        b = begun()
        b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        b.do("launch_start", "source", vm="old", error=EIO, firmware=firmware)
        verdict = verdict_of("P7", b.finish())
        assert verdict.outcome is outcome
    assert verdict.signature == "launch_start:EIO-for-ok"


@pytest.mark.parametrize(("told", "outcome"), [("before", HELD), ("never", DEVIATED), ("later", DEVIATED)])
def test_p7_a_firmware_that_is_silent_excuses_what_comes_then(told: str, outcome: Outcome) -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="old", key="sev")
    for when in ("before", "later"):
        if told == when:
            b.kernel("ccp 0000:01:00.0: sev command 0x30 timed out, disabling PSP")
        if when == "before":
            b.do("launch_start", "source", vm="old", error=ETIMEDOUT)
    assert verdict_of("P7", b.finish()).outcome is outcome


def test_p7_without_its_witness() -> None:
    history = refused(error=EBUSY)

    def no_limits(record: Record) -> Record:
        if not isinstance(record, Observation):
            return record
        misc = {cgroup: {"current": files["current"]} for cgroup, files in record.misc.items()}
        return msgspec.structs.replace(record, misc=misc)

    verdict = verdict_of("P7", changed(history, no_limits))
    assert verdict.outcome is UNKNOWN and "the limits were not read" in verdict.reason

    def no_kernel(record: Record) -> Record:
        return msgspec.structs.replace(record, kernel="mine") if isinstance(record, Header) else record

    for promise in ("P7", "P10"):
        assert "is no version" in verdict_of(promise, changed(history, no_kernel)).reason
        assert "on which kernel" in verdict_of(promise, History(())).reason
    b = begun()
    b.do("create", "source", vm="second", kind="mirror", vcpus=0, memory="guest")
    b.do("mirror", "source", vm="second", source="none")
    b.do("mirror", "source", vm="second", source="none", error=EINVAL)
    assert "succeeded at record" in verdict_of("P7", b.finish()).reason


def mirror_asked(f: str, *, error: int, moved: bool = False) -> History:
    """A mirror in another process than its owner's, which is moved back there perhaps; then it is asked something."""
    b = begun()
    b.launch("owner", "source", "sev_es" if f == "launch_update_vmsa" else "sev")
    b.do("create", "destination", vm="mirror", kind="mirror", vcpus=1, memory="guest")
    b.do("send_fd", "source", vm="owner", to="destination")
    b.do("mirror", "destination", vm="mirror", source="owner")
    if moved:
        b.launch("new", "source")
        b.do("send_fd", "destination", vm="mirror", to="source")
        b.move("mirror", "new", "source")
    vm, agent = ("new", "source") if moved else ("mirror", "destination")
    b.do(f, agent, vm=vm, error=error)
    return b.finish()


@pytest.mark.parametrize("f", ["launch_update_vmsa", "guest_status"])
def test_p7_of_a_mirror_says_that_it_is_one(f: str) -> None:
    verdict = verdict_of("P7", mirror_asked(f, error=EBADF))
    assert (verdict.outcome, verdict.signature) == (DEVIATED, f"{f}-of-mirror-elsewhere:EBADF-for-ok")
    assert verdict_of("P7", mirror_asked(f, error=0)).outcome is UNKNOWN


def test_p7_leaves_the_status_after_a_move_to_p5() -> None:
    verdict = verdict_of("P7", mirror_asked("guest_status", error=EBADF, moved=True))
    assert (verdict.outcome, verdict.reason.partition(",")[0]) == (UNKNOWN, "none of 7 operations was refused")
