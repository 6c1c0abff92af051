# SPDX-License-Identifier: Apache-2.0
"""Calls in which the nth fault point fails: what is made of the kernel's count. A file stands for /proc/…/fail-nth; it
does not count, so what is left is what was written. That a point fails is shown on a kernel with fault injection
(tests/lab/test_sweeps.py)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.history.records import Value
from chaos.kvm import call
from chaos.kvm.numbers import ExitReason
from chaos.kvm.structs import KvmRun, Regs
from chaos.kvm.vcpu import KvmVcpu
from chaos.linux import fail_nth
from chaos.linux.fd import OwnedFd
from chaos.native.failing import MOST, Failing
from chaos.vmm.fail_nth import PointsToFail
from chaos.vmm.guest import VECTOR_PORT
from chaos.vmm.messages import ArmFailNth, Close, LaunchFinish, Reply
from chaos.vmm.vcpus import VcpuPacer

FIONREAD = 0x541B


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    path = tmp_path / "fail-nth"
    path.touch()
    return path


def readable(failing: Failing) -> tuple[int, int, int]:
    """FIONREAD of a pipe with three bytes in it: result, errno, and what it told."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"abc")
        told = ctypes.c_int()
        return *failing.ioctl(reading, FIONREAD, ctypes.byref(told)), told.value
    finally:
        os.close(reading)
        os.close(writing)


def test_a_call_is_made_as_any_other_and_the_count_taken_back(counter: Path) -> None:
    with Failing(7, str(counter)) as failing:
        assert readable(failing) == (0, 0, 3)
        assert failing.ioctl(-1, FIONREAD, None) == (-1, errno.EBADF)
    assert (failing.left, failing.calls, failing.struck, failing.met) == (7, 2, None, 0)
    assert counter.read_text()[0] == "0", "nothing is counted any more"


def test_what_is_left_is_counted_on_and_after_the_point_nothing_fails(counter: Path) -> None:
    written: list[int] = []

    def native(file: int, nth: int, fd: int, request: int, argument: Any, *out: Any) -> int:
        """Three points a call."""
        written.append(nth)
        result, error, left = (each._obj for each in out)
        result.value, error.value, left.value = (0, 0, nth - 3) if nth > 3 else (-1, errno.ENOMEM, 0)
        return 0

    with Failing(8, str(counter)) as failing:
        failing._native = cast("Any", SimpleNamespace(ioctl_failing=native))
        answers = [failing.ioctl(0, 0, None) for _ in range(3)]
        assert answers == [(0, 0), (0, 0), (-1, errno.ENOMEM)]
        assert (failing.struck, failing.left, failing.calls) == (2, 0, 3)
        failing.ioctl(0, 0, None)
    assert written == [8, 5, 2, MOST]
    assert (failing.struck, failing.met) == (2, 8)
    written.clear()
    with Failing(0, str(counter)) as failing:
        failing._native = cast("Any", SimpleNamespace(ioctl_failing=native))
        failing.ioctl(0, 0, None)
        failing.ioctl(0, 0, None)
    assert (written, failing.struck, failing.met) == ([MOST, MOST - 3], None, 6)


def test_a_kernel_that_counts_nothing_is_an_error_and_no_point_that_did_not_fail(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Failing(1, str(tmp_path / "none"))
    with Failing(1, "/dev/full") as failing, pytest.raises(OSError, match="counting fault points"):
        failing.ioctl(0, 0, None)


def test_whoever_makes_the_ioctls_makes_those_of_his_thread_alone() -> None:
    made: list[int] = []

    class Refuser:
        def ioctl(self, fd: int, number: int, argument: object) -> tuple[int, int]:
            made.append(number)
            return -1, errno.ENOMEM

        def close(self, fd: int) -> tuple[int, int]:
            made.append(fd)
            return -1, errno.EIO

    reading, writing = os.pipe()
    with call.made_by(Refuser()), call.timed() as watch:
        assert call.made_otherwise()
        assert call.attempt(0, 17) == (-1, errno.ENOMEM)
        with pytest.raises(OSError, match="close: Input/output error"):
            call.close(OwnedFd(writing))
    assert made == [17, writing] and watch.began
    assert not call.made_otherwise()
    assert call.attempt(reading, fcntl.F_GETFD)[1] == errno.ENOTTY
    for number in (reading, writing):
        end = OwnedFd(number)
        call.close(end)
        call.close(end)  # once is enough
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_close_is_counted_as_well(counter: Path) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with Failing(7, str(counter)) as failing:
        assert failing.close(reading) == (0, 0)
        assert failing.close(-1) == (-1, errno.EBADF)
    assert (failing.left, failing.calls, failing.struck) == (7, 2, None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)


class Struck:
    """Stands for `Failing`: the point is met in the first call."""

    calls, struck, met = 1, 0, 5

    def __init__(self, nth: int) -> None: ...

    def __enter__(self) -> Struck:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ioctl(self, fd: int, number: int, argument: object) -> tuple[int, int]:
        return -1, errno.ENOMEM

    def close(self, fd: int) -> tuple[int, int]:
        return 0, 0


def refused() -> Reply:
    _, number = call.attempt(0, 1)
    return Reply(id=3, errno=number, value={"call": "KVM_X"})


def test_an_agent_lets_it_fail_in_the_operation_that_was_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.vmm.fail_nth.Failing", Struck)
    agent = PointsToFail()
    plain: Callable[[], Reply] = lambda: Reply(id=3)  # noqa: E731
    agent.arm(ArmFailNth(vm="a", operation="launch_finish", nth=5))
    assert agent.within(LaunchFinish(vm="b"), plain) == agent.within(Close(vm="a"), plain) == Reply(id=3)
    assert agent.tell("a", "launch_finish", disarm=False) == {}
    answer = agent.within(LaunchFinish(vm="a"), refused)
    assert answer == Reply(id=3, errno=errno.ENOMEM, value={"call": "KVM_X", "fail_nth": 5, "struck": 1, "points": 5})
    told: dict[str, Value] = {"done": 1, "struck": 1, "points": 5, "calls": 1, "errno": errno.ENOMEM, "call": 0}
    assert agent.tell("a", "launch_finish", disarm=False) == told
    assert agent.within(LaunchFinish(vm="a"), plain) == Reply(id=3), "once"


def test_what_is_taken_back_does_not_fail() -> None:
    agent = PointsToFail()
    agent.arm(ArmFailNth(vm="a", operation="launch_finish", nth=5))
    assert agent.tell("a", "launch_finish", disarm=True) == {}
    assert agent.within(LaunchFinish(vm="a"), lambda: Reply(id=3)) == Reply(id=3)


def test_what_a_kernel_lacks_is_told_by_its_options(tmp_path: Path) -> None:
    own = tmp_path / "fail-nth"
    assert fail_nth.lacking(own, tmp_path) == "FAULT_INJECTION, FAILSLAB, FAIL_PAGE_ALLOC, FAULT_INJECTION_USERCOPY"
    own.touch()
    assert fail_nth.lacking(own, tmp_path) == "FAULT_INJECTION_DEBUG_FS, or debugfs is not mounted"
    for folder in ("failslab", "fail_page_alloc", "fail_usercopy"):
        (tmp_path / folder).mkdir()
    assert fail_nth.lacking(own, tmp_path) == ""


class Refusing:
    """Stands for `KvmVcpu`, of a kernel without memory."""

    entered, answer = 0, errno.ENOMEM
    shared = KvmRun()

    def regs(self) -> Regs:
        return Regs()

    def set_regs(self, registers: Regs) -> None: ...

    def run(self) -> int:
        self.entered += 1
        return self.answer


def test_the_first_entry_is_made_where_calls_are_counted_and_its_errno_is_told() -> None:
    vcpu = Refusing()
    pacer = VcpuPacer(cast("KvmVcpu", vcpu))
    with call.made_by(Struck(1)), pytest.raises(call.KernelError, match="KVM_RUN: ENOMEM"):
        pacer.resume(1)
    assert vcpu.entered == 1 and not pacer.running


@pytest.mark.parametrize(
    ("reason", "port", "told"),
    [
        (ExitReason.SHUTDOWN, 0, "ended with KVM_EXIT_SHUTDOWN, and no tick"),
        (ExitReason.IO, VECTOR_PORT, f"ended with port {VECTOR_PORT:#x}, and no tick"),
    ],
)
def test_a_first_entry_that_ends_otherwise_than_with_a_tick_is_no_entry(reason: int, port: int, told: str) -> None:
    vcpu = Refusing()
    vcpu.answer, vcpu.shared.exit_reason, vcpu.shared.io.port = 0, reason, port
    with call.made_by(Struck(1)), pytest.raises(OSError, match=told):
        VcpuPacer(cast("KvmVcpu", vcpu)).resume(1)
