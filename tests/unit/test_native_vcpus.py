# SPDX-License-Identifier: Apache-2.0
"""vCPU threads on what is no vCPU; the real ones are in host/test_kvm.py and tests/lab."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator

import pytest

from chaos.native import VcpuThread, Why, read_vcpu

WITHIN = 20.0


@pytest.fixture
def pipe() -> Iterator[int]:
    ends = os.pipe()
    yield ends[0]
    for fd in ends:
        os.close(fd)


def test_a_vcpu_that_cannot_run_says_so(pipe: int) -> None:
    area = ctypes.create_string_buffer(4096)
    vcpu = VcpuThread(fd=pipe, area=ctypes.addressof(area), tick_port=0x10, stale_port=0x11, ticks=7)
    with vcpu.memory() as memory:
        left = vcpu.start(memory=memory.number).join(WITHIN)
        assert read_vcpu(memory.number) == left.seen
    assert (left.why, left.detail) == (Why.FAILED, errno.ENOTTY)
    assert left.reason == "KVM_RUN: ENOTTY"
    assert (left.seen.ticks, left.seen.exits, left.seen.first_tick) == (7, 0, 0)


def test_a_vcpu_can_wait_for_a_moment_and_be_stopped_before_it(pipe: int) -> None:
    area = ctypes.create_string_buffer(4096)
    vcpu = VcpuThread(fd=pipe, area=ctypes.addressof(area), tick_port=0x10, stale_port=0x11)
    running = vcpu.start(at=time.monotonic_ns() + 3600_000_000_000)
    with pytest.raises(TimeoutError, match=f"thread {running.tid} is in KVM_RUN"):
        running.join(0)
    assert running.left() is None
    running.stop()
    assert area[1] == b"\1"  # immediate_exit, until the join
    assert running.wait(WITHIN)
    assert running.left() == running.join(WITHIN) == running.left()
    assert area[1] == b"\0"
