# SPDX-License-Identifier: Apache-2.0
"""A page that is not there: whoever comes to it waits, in the kernel too, until it is put there."""

from __future__ import annotations

import ctypes
import os
import threading
import time

import pytest

from chaos.kvm import sev, userfault
from chaos.kvm.call import KernelError
from chaos.kvm.structs import GuestStatusData
from chaos.kvm.userfault import ArgumentPage, MissingPage
from chaos.linux import task
from chaos.runner.holds import places

WITHIN = 10.0
_lacking = userfault.lacking()
needs_userfaultfd = pytest.mark.skipif(_lacking is not None, reason="; ".join(_lacking or ()))

_libc = ctypes.CDLL(None, use_errno=True)


def copy_out(address: int, length: int) -> tuple[threading.Thread, int]:
    """Let the kernel read memory of ours, as it reads the arguments of a system call: by a write to a pipe. The thread
    that does, and where to read what it has read."""
    reading, writing = os.pipe()

    def body() -> None:
        assert _libc.write(writing, ctypes.c_void_p(address), length) == length
        os.close(writing)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, reading


def waits_for(thread: threading.Thread) -> str:
    """The kernel function in which it comes to sleep."""
    deadline = time.monotonic() + WITHIN
    sleeper = None
    while time.monotonic() < deadline:
        assert thread.native_id is not None
        sleeper = task.look(os.getpid(), thread.native_id)
        if sleeper is not None and sleeper.sleeping == places.AT_PAGE:
            break
        time.sleep(0.001)
    return sleeper.sleeping if sleeper is not None else "gone"


@needs_userfaultfd
def test_the_kernel_waits_for_it_and_reads_what_was_put_there() -> None:
    page = MissingPage()
    thread, reading = copy_out(page.address, 4)
    assert waits_for(thread) == "handle_userfault"
    page.put(b"here")
    thread.join(WITHIN)
    assert not thread.is_alive()
    assert os.read(reading, 10) == b"here"
    page.put(b"again, which is not taken")
    assert page.read(4) == b"here"
    page.close()


@needs_userfaultfd
def test_arguments_are_lent_and_come_back() -> None:
    """What the kernel writes to the page is in the caller's structure afterwards."""
    page, status = ArgumentPage(), GuestStatusData(handle=7)
    with page.lend(status) as address:
        assert page.used
        thread, reading = copy_out(address, ctypes.sizeof(status))
        assert waits_for(thread) == "handle_userfault"
        page.release()
        thread.join(WITHIN)
        assert os.read(reading, 64) == bytes(status)
        GuestStatusData.from_address(address).state = 3
    assert (status.handle, status.state) == (7, 3)
    page.release()  # nobody waits any more, and it is no harm


@needs_userfaultfd
def test_a_command_that_never_came_to_its_arguments_has_them_unchanged() -> None:
    page, status = ArgumentPage(), GuestStatusData(policy=5)
    with page.lend(status):
        pass
    assert status.policy == 5
    ArgumentPage().discard()


@needs_userfaultfd
def test_only_the_next_command_with_arguments_waits() -> None:
    with pytest.raises(KernelError):
        page = ArgumentPage()
        sev.Sev(-1, -1, page).launch_update_vmsa()
    assert not page.used
    encrypted = sev.Sev(-1, -1, page)
    with pytest.raises(KernelError):
        encrypted.guest_status()
    assert page.used
    with pytest.raises(KernelError):
        encrypted.guest_status()


def test_what_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(userfault, "_open", refused)
    lacking = userfault.lacking()
    assert lacking is not None and "vm.unprivileged_userfaultfd" in lacking[1]
