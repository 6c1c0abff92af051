# SPDX-License-Identifier: Apache-2.0
"""What goes wrong inside a VMM when a fault wants it, in processes that need no KVM."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.runner.vmms import VmmProcesses
from chaos.vmm import harm
from chaos.vmm.messages import Eat, EndThread, Exit, Handled
from faults.vmm import state
from tests.unit.host.conftest import nowhere

SECONDS = 20.0


def test_a_lost_descriptor_answers_as_a_closed_one_and_keeps_its_number() -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    harm.lose(fd)
    assert harm.is_lost(fd)
    uses: tuple[Callable[[], object], ...] = (
        lambda: os.read(fd, 1), lambda: os.write(fd, b"x"), lambda: fcntl.ioctl(fd, 0xAE01),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(OSError, match=r".*") as error:
            use()
        assert error.value.errno == errno.EBADF
    other = os.open(os.devnull, os.O_RDWR)
    assert other != fd and not harm.is_lost(other)
    os.close(other)
    os.close(fd)


def test_an_agent_goes_on_without_its_first_thread_and_ends_in_good_order(vmms: VmmProcesses) -> None:
    vmm = vmms.spawn("source", nowhere())
    vmms.ask(vmm, EndThread())
    vmms.loop.wait(lambda: state(vmm.pid, vmm.pid) == "Z", SECONDS, "the first thread to end", look=0.01)
    assert vmms.ask(vmm, Eat(mebibytes=1)).errno == 0
    assert vmms.do(vmm, Exit()).outcome == "ok"
    assert vmm.wait_end(SECONDS) and vmm.status == 0


def test_an_agent_without_its_first_thread_can_be_killed(vmms: VmmProcesses) -> None:
    vmm = vmms.spawn("source", nowhere())
    vmms.ask(vmm, EndThread())
    signal.pidfd_send_signal(vmm.pidfd, signal.SIGKILL)
    assert vmm.wait_end(SECONDS) and vmm.status == -signal.SIGKILL


@pytest.fixture
def listening() -> None:
    """The process that agents are forked from listens for signals of storms as well."""
    harm.handled()


@pytest.mark.usefixtures("listening")
def test_every_signal_of_a_storm_is_counted_once(vmms: VmmProcesses) -> None:
    vmm = vmms.spawn("source", nowhere())
    nothing = {"handled": 0, "interrupted": 0, "early": 0}
    assert vmms.ask(vmm, Handled()).value == nothing
    for _ in range(100):
        os.kill(vmm.pid, harm.STORM_SIGNAL)
    counted = 0

    def all_in() -> bool:
        nonlocal counted
        counted += int(str(vmms.ask(vmm, Handled()).value["handled"]))
        return counted >= 100

    vmms.loop.wait(all_in, SECONDS, "all to be handled", look=0.01)
    assert counted == 100
    assert vmms.ask(vmm, Handled()).value == nothing


def test_the_signal_of_storms_is_nobody_elses() -> None:
    crew = Path(harm.__file__).parents[1] / "native" / "crew.c"
    assert "SIGRTMIN + 3" in crew.read_text() and harm.STORM_SIGNAL != signal.SIGRTMIN + 3
