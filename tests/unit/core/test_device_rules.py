# SPDX-License-Identifier: Apache-2.0
"""The oracle on /dev/sev and on debugging a guest: what may be refused, and by whom."""

from __future__ import annotations

from dataclasses import replace
from errno import EBADF, EBUSY, EFAULT, EINVAL, EIO, ENOENT, ENOMEM, ENOSPC, ENOTTY, EROFS

import pytest

from chaos.history.records import Firmware, History, Value
from chaos.judge.checkers import CHECKERS
from chaos.judge.findings import load, matching
from chaos.judge.oracle import State, allowed
from chaos.judge.verdict import Outcome
from tests.unit.core.build import Builder, guest_moved, shipped
from tests.unit.core.test_oracle import MOVE, does, errnos, host, launched, op, ready


def answers(state: State, **args: Value) -> set[tuple[int, int]]:
    """Errno and the firmware's status."""
    return {(answer.errno, answer.status) for answer in allowed(state, op("platform", "s", **args))}


OBEYS = replace(host(), obeys=True)
OK, SHORT, LONG = (0, 0), (EIO, 4), (EFAULT, 0)


@pytest.mark.parametrize(
    ("command", "length", "chain", "due"),
    [
        ("PLATFORM_STATUS", 0, 0, {OK}),
        ("PEK_CSR", 0, 0, {SHORT}),
        ("PEK_CSR", 2083, 0, {SHORT}),
        ("PEK_CSR", 2084, 0, {OK}),
        ("PEK_CSR", 0x4000, 0, {OK}),
        ("PEK_CSR", 0x4001, 0, {LONG}),
        ("GET_ID2", 0, 0, {SHORT}),
        ("GET_ID2", 63, 0, {SHORT}),
        ("GET_ID2", 64, 0, {OK, SHORT}),
        ("GET_ID2", 128, 0, {OK}),
        ("GET_ID2", 0x8000, 0, {OK}),
        ("GET_ID2", 0x8001, 0, {OK, (ENOMEM, 0)}),
        ("PDH_CERT_EXPORT", 2084, 6252, {OK}),
        ("PDH_CERT_EXPORT", 2084, 6251, {SHORT}),
        ("PDH_CERT_EXPORT", 2083, 6252, {SHORT}),
        ("PDH_CERT_EXPORT", 2084, 0, {SHORT}),
        ("PDH_CERT_EXPORT", 2084, 0x4001, {LONG}),
        ("PDH_CERT_EXPORT", 0, 0x4001, {LONG, SHORT}),
        ("PEK_GEN", 0, 0, {OK}),
        ("PDH_GEN", 0, 0, {OK}),
    ],
)
def test_what_dev_sev_answers(command: str, length: int, chain: int, due: set[tuple[int, int]]) -> None:
    assert answers(OBEYS, command=command, length=length, chain=chain) == due


def test_keys_of_the_platform_are_for_a_firmware_without_guests() -> None:
    guest = replace(launched(host()), obeys=True)
    assert answers(guest, command="PEK_GEN") == {(EIO, 1)}
    assert answers(guest, command="PDH_GEN") == {OK}


@pytest.mark.parametrize(("how", "errnos"), [("missing", {ENOENT}), ("full", {ENOSPC, EIO}), ("read-only", {EROFS})])
def test_new_keys_that_cannot_be_written_down(how: str, errnos: set[int]) -> None:
    spoiled = replace(OBEYS, storage=frozenset({how}))
    assert answers(spoiled, command="PEK_GEN") == {OK, *((errno, 0) for errno in errnos)}


def test_a_firmware_that_nobody_watched_may_refuse_anything_with_its_status() -> None:
    assert answers(host(), command="PEK_CSR", length=16) == {OK, (EIO, 0)}
    assert all(a.firmware for a in allowed(host(), op("platform", "s", command="PEK_CSR")) if a.errno)
    assert answers(replace(OBEYS, psp="dead"), command="PEK_CSR", length=2084) == {(EBUSY, 0)}
    cut_off = replace(OBEYS, world=replace(OBEYS.world, cut_off=frozenset({"s"})))
    assert answers(cut_off, command="GET_ID2", length=128) == {(EBADF, 0)}


def test_a_launch_that_cannot_be_told() -> None:
    created = does(host(), "create", "s", vm="old", kind="sev", vcpus=1, memory="guest")
    made = replace(does(created, "init", "s", vm="old", key="sev"), obeys=True)
    assert errnos(made, "launch_start", "s", vm="old", policy=0, read_only=True) == {EFAULT}
    assert errnos(made, "launch_start", "s", vm="old", policy=0) == {0}


@pytest.mark.parametrize("f", ["dbg_decrypt", "dbg_encrypt"])
def test_debugging_wants_a_guest_and_something_to_debug(f: str) -> None:
    some: dict[str, Value] = {"read_at": 0, "write_at": 1, "length": 4096}
    state = replace(launched(host()), obeys=True)
    assert errnos(state, f, "s", vm="old", **some) == {0}
    assert errnos(state, f, "s", vm="old", read_at=0, write_at=0, length=0) == {EINVAL}
    assert errnos(state, f, "d", vm="old", **some) == {EBADF}
    assert errnos(does(state, "create", "s", vm="bare", kind="plain", vcpus=1), f, "s", vm="bare", **some) == {ENOTTY}
    moved = does(ready(), "move", "d", **MOVE)
    assert errnos(moved, f, "s", vm="old", **some) == {EIO}
    assert errnos(replace(moved, obeys=True), f, "d", vm="new", **some) == {0}


def test_a_moved_guest_that_cannot_be_debugged_is_finding_0001() -> None:
    b = guest_moved()
    b.do("dbg_decrypt", "destination", error=EBADF, vm="new", read_at=0, write_at=0, length=64)
    verdict = CHECKERS["P7"](shipped("move-across-cgroups"), b.finish(watched=True))
    assert verdict.signature == "dbg_decrypt-of-moved:EBADF-for-ok"
    found = matching(verdict, "6.12.117", load())
    assert found is not None
    assert found.id == "0001"


def told(*, length: int, status: int, fault: str = "") -> History:
    """PEK_CSR with a buffer so long, refused with this status by a firmware to which `fault` was done."""
    b = Builder()
    b.spawn("host", "source")
    b.observe("before")
    b.do("platform", "host", error=EIO, firmware=status, command="PEK_CSR", length=length)
    b.add(Firmware(t=b.t, order=0, command="PEK_CSR", status=status, fault=fault))
    return b.end()


@pytest.mark.parametrize(
    ("length", "status", "fault", "outcome"),
    [
        (16, 4, "", Outcome.KEPT),
        (16, 3, "", Outcome.BROKEN),
        (2084, 4, "", Outcome.BROKEN),
        (2084, 4, "length:4000", Outcome.KEPT),  # handed on as it is
    ],
)
def test_a_refusal_has_to_have_its_reason(length: int, status: int, fault: str, outcome: Outcome) -> None:
    verdict = CHECKERS["P7"](shipped("move-across-cgroups"), told(length=length, status=status, fault=fault))
    assert verdict.outcome is outcome
    if outcome is Outcome.BROKEN:
        assert verdict.signature.startswith(f"PEK_CSR:EIO-of-the-firmware-(status-{status})-for-")
