# SPDX-License-Identifier: Apache-2.0
"""P7: refusals held against the oracle."""

from __future__ import annotations

from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY, ETIMEDOUT

import msgspec
import pytest

from chaos.history.records import Firmware, Header, History, Observation, Record
from chaos.judge.judge import judge
from chaos.judge.verdict import Outcome, Verdict
from tests.unit.core.build import Builder, changed, shipped
from tests.unit.core.doctored import DEVIATED, HELD, MOVE, UNKNOWN, begun, see, verdict_of


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
    assert (verdict.outcome, verdict.signature) == (DEVIATED, "move:EBUSY-for-ok")
    assert "and cgroup 'destination' had room for a charge of sev" in verdict.reason
    assert verdict_of("P7", refused(error=EINVAL, f="mirror", kernel="6.1.192")).outcome is HELD
    verdict = verdict_of("P7", refused(error=0, f="mirror"))
    assert (verdict.outcome, verdict.seen) == (DEVIATED, "ok")
    assert verdict_of("P7", refused(error=0)).outcome is UNKNOWN  # nothing was refused


@pytest.mark.parametrize("f", ["move", "mirror"])
def test_p7_a_descriptor_that_arrived_is_there(f: str) -> None:
    """Whatever came from another process is there until it was used: EBADF is the kernel's own invention."""

    def history(*, again: bool = False) -> History:
        b = begun()
        b.launch("old", "source", "sev")
        b.do("create", "destination", vm="new", kind="plain", vcpus=0, memory="guest")
        b.do("connect", "source", vm="old", peer="new")
        b.do("connect", "destination", vm="new", peer="old")
        b.do("send_fd", "source", vm="old", to="destination")
        if again:
            b.do(f, "destination", vm="new", source="old", flags=1, error=EINVAL)
        b.do(f, "destination", vm="new", source="old", error=EBADF)
        return b.finish()

    verdict = verdict_of("P7", history())
    assert (verdict.outcome, verdict.signature) == (DEVIATED, f"{f}:EBADF-for-ok")
    assert verdict_of("P7", history(again=True)).outcome is HELD  # it was closed after the first, and none came since


def test_p7_a_descriptor_of_a_dead_vm_is_one() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.offer("old", "new", "late")
    b.move("old", "new", "destination")
    b.move("old", "late", "destination", error=EBADF)
    assert verdict_of("P7", b.finish()).signature == "move:EBADF-for-EINVAL"


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
    for firmware, outcome in ((23, UNKNOWN), (0, DEVIATED)):
        b = begun()
        b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm="old", key="sev")
        b.do("launch_start", "source", vm="old", error=EIO, firmware=firmware)
        verdict = verdict_of("P7", b.finish())
        assert verdict.outcome is outcome
        if firmware:  # nobody watched it, so nobody can say whether it had a reason
            left = "1 answers are not in the contract: launch_start of old: EIO"
            assert verdict.reason == f"{NONE.format(2)}; {left}"
    assert verdict.signature == "launch_start:EIO-for-ok"
    assert verdict.expected == "EIO of the firmware or ok"


NONE = "none of {} operations was refused as the contract says, so no errno was seen"


def watched(b: Builder, f: str, *, firmware: int, fault: str = "", command: str = "") -> Verdict:
    """The operation is refused by a firmware that was watched all the time."""
    b.add(Firmware(t=b.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    b.add(Firmware(t=b.tick(), order=1, command=command or f.upper(), status=firmware, fault=fault))
    b.do(f, "source", vm="old", error=EIO, firmware=firmware)
    return verdict_of("P7", b.finish())


def started() -> Builder:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    for f in ("init", "launch_start"):
        b.do(f, "source", vm="old", key="sev")
    return b


def test_p7_a_status_that_an_honest_firmware_cannot_give() -> None:
    assert watched(started(), "launch_finish", firmware=2).outcome is HELD  # it was not measured
    verdict = watched(started(), "launch_finish", firmware=16)  # a stale handle
    assert (verdict.outcome, verdict.signature) == (
        DEVIATED, "launch_finish:EIO-of-the-firmware-(status-16)-for-EIO-of-the-firmware-(status-2)",
    )  # fmt: skip
    measured = started()
    measured.do("launch_measure", "source", vm="old")
    assert watched(measured, "launch_finish", firmware=16).signature.endswith("(status-16)-for-ok")
    assert watched(started(), "launch_start", firmware=12, command="ACTIVATE").outcome is HELD


def test_p7_a_status_that_a_fault_has_made_is_handed_on_as_it_is() -> None:
    b = started()
    b.do("launch_measure", "source", vm="old")
    assert watched(b, "launch_finish", firmware=19, fault="fail:HWERROR_PLATFORM").outcome is HELD
    other = started()
    other.do("launch_measure", "source", vm="old")
    other.add(Firmware(t=other.tick(), order=0, command="LAUNCH_START", status=0, handle=1))
    record = Firmware(t=other.tick(), order=1, command="LAUNCH_FINISH", status=19, fault="fail:HWERROR_PLATFORM")
    other.add(record)
    other.do("launch_finish", "source", vm="old", error=EIO, firmware=18)
    verdict = verdict_of("P7", other.finish())
    assert (verdict.outcome, "not in the contract" in verdict.reason) == (UNKNOWN, True)


def test_p7_what_the_contract_leaves_open_is_never_called_documented() -> None:
    b = started()
    for error in (EFAULT, 0, EINVAL):
        b.do("command", "source", vm="old", id=2, error=error)
    verdict = verdict_of("P7", b.finish())
    told = "command of old: EFAULT, command of old: ok, command of old: EINVAL"
    assert (verdict.outcome, verdict.reason) == (
        UNKNOWN,
        f"{NONE.format(5)}; 3 answers are not in the contract: {told}",
    )
    b = started()
    b.do("command", "source", vm="old", id=2, error=EFAULT)
    b.do("command", "source", vm="old", id=23, error=EINVAL)
    verdict = verdict_of("P7", b.finish())
    assert verdict.outcome is HELD and "as documented: command of old: EINVAL; 1 answers are not" in verdict.reason


@pytest.mark.parametrize(("error", "signature"), [(0, ""), (EINVAL, "unregister_region:EINVAL-for-ok")])
def test_p7_regions_that_were_lost_on_the_way(error: int, signature: str) -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.do("register_region", "source", vm="old", address=0x1000)
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    b.move("old", "new", "destination")
    b.do("unregister_region", "destination", vm="new", address=0x1000, error=error)
    assert verdict_of("P7", b.finish()).signature == signature


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("f", ["init", "move", "mirror"])
def test_p7_a_refusal_that_nothing_explains_is_broken_whatever_the_script_then_cannot_do(
    f: str, complete: bool
) -> None:
    b = begun()
    if f == "init":
        b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
        b.do("init", "source", vm="old", key="sev", error=EBUSY)
    else:
        b.launch("old", "source", "sev")
        b.do("create", "destination", vm="new", kind="plain", vcpus=0, memory="guest")
        b.do("connect", "source", vm="old", peer="new")
        b.do("send_fd", "source", vm="old", to="destination")
        b.do(f, "destination", vm="new", source="old", error=EBUSY)
    history = b.finish(complete=complete, reason="" if complete else "the script stopped")
    verdict = verdict_of("P7", history)
    assert (verdict.outcome, verdict.signature) == (DEVIATED, f"{f}:EBUSY-for-ok")
    promised = next(v for v in judge(shipped(MOVE), history).verdicts if v.promise == "P1")
    assert promised.outcome is UNKNOWN
    with_p7 = msgspec.structs.replace(shipped(MOVE), name="by-hand", promises=("P7",))
    assert judge(with_p7, history).outcome is DEVIATED


@pytest.mark.parametrize(("told", "outcome"), [("before", HELD), ("never", DEVIATED), ("later", DEVIATED)])
def test_p7_a_firmware_that_is_silent_excuses_what_comes_then(told: str, outcome: Outcome) -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="old", key="sev")
    for when in ("before", "later"):
        asked = b.invoke("launch_start", "source", vm="old") if when == "before" else None
        if told == when:
            b.kernel("ccp 0000:01:00.0: sev command 0x30 timed out, disabling PSP")
        if asked is not None:
            b.done(asked, "fail", error=ETIMEDOUT)
    assert verdict_of("P7", b.finish()).outcome is outcome


@pytest.mark.parametrize(
    ("errors", "signature"), [((EBUSY, EBUSY), ""), ((EBUSY, ETIMEDOUT), "launch_start:ETIMEDOUT")]
)
def test_p7_a_command_times_out_once(errors: tuple[int, int], signature: str) -> None:
    b = begun()
    b.do("create", "source", vm="old", kind="sev", vcpus=1, memory="guest")
    b.do("init", "source", vm="old", key="sev")
    found_out = b.invoke("launch_start", "source", vm="old")
    b.kernel("ccp 0000:01:00.0: sev command 0x30 timed out, disabling PSP")
    b.done(found_out, "fail", error=ETIMEDOUT)
    for error in errors:
        b.do("launch_start", "source", vm="old", error=error)
    verdict = verdict_of("P7", b.finish())
    assert verdict.outcome is (DEVIATED if signature else HELD)
    assert verdict.signature.startswith(signature)


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
    assert (verdict.outcome, verdict.reason) == (UNKNOWN, NONE.format(7))


@pytest.mark.parametrize("over", [True, False])
def test_p7_a_vcpu_that_could_not_be_created_is_in_the_way_of_nothing_afterwards(over: bool) -> None:
    """While it is being created a move may be told EBUSY for it."""
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("send_fd", "source", vm="old", to="destination")
    creating = b.invoke("create_vcpu", "source", vm="old", id=1)
    if over:
        b.done(creating, "fail", error=ENOMEM)
    b.move("old", "new", "destination", error=EBUSY)
    assert ("move:EBUSY-for-ok" in verdict_of("P7", b.finish()).deviations) == over


@pytest.mark.parametrize(
    ("call", "left"), [("KVM_MEMORY_ENCRYPT_REG_REGION", False), ("KVM_MEMORY_ENCRYPT_OP LAUNCH_UPDATE_DATA", True)]
)
def test_p7_what_a_launch_had_registered_before_it_was_refused_stays_registered(call: str, left: bool) -> None:
    b = started()
    update = b.invoke("launch_update_data", "source", vm="old", address=0x1000)
    b.done(update, "fail", error=ENOMEM, value={"call": call})
    b.do("unregister_region", "source", vm="old", address=0x1000, error=EINVAL)
    assert ("unregister_region:EINVAL-for-ok" in verdict_of("P7", b.finish()).deviations) == left


def test_p7_a_descriptor_that_a_move_is_using_is_not_there_for_another_of_the_same_process() -> None:
    b = begun()
    b.launch("old", "source", "sev")
    b.launch("new", "destination")
    b.do("create", "destination", vm="other", kind="mirror", vcpus=0, memory="guest")
    b.do("connect", "source", vm="old", peer="new")
    b.do("connect", "destination", vm="new", peer="old")
    b.do("send_fd", "source", vm="old", to="destination")
    move = b.invoke("move", "destination", vm="new", source="old")
    b.hold(move)
    b.do("mirror", "destination", vm="other", source="old", error=EBADF)
    b.done(move)
    assert verdict_of("P7", b.finish()).outcome is HELD
