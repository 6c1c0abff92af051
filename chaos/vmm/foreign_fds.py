# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are no VM's, to be given where one is wanted.

They are opened for one call and closed after it. What opening them takes is no part of the operation's time.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from chaos.errors import InternalError
from chaos.kvm.call import timed
from chaos.kvm.system import System
from chaos.linux.fd import OwnedFd
from chaos.linux.seqpacket import memory_file

NEVER_OPEN = 1 << 30  # above every limit of open files


@contextmanager
def descriptor(sort: str, system: System, sev: int) -> Iterator[int]:
    """A number of this sort (`chaos.experiment.steps.ForeignFd`). `sev` is /dev/sev. Raises OSError, `KernelError`."""
    with ExitStack() as stack:
        with timed():
            number = _opened(sort, system, sev, stack)
        yield number


def _opened(sort: str, system: System, sev: int, stack: ExitStack) -> int:
    numbers = {"closed": NEVER_OPEN, "negative": -1, "kvm": system.fd.number, "sev": sev}
    if sort in numbers:
        return numbers[sort]
    if sort in ("vcpu", "stats"):
        return _of_a_vm(sort, system, stack)
    match sort:
        case "eventfd":
            return stack.enter_context(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))).number
        case "pipe":
            ends = [stack.enter_context(OwnedFd(number)) for number in os.pipe2(os.O_CLOEXEC)]
            return ends[0].number
        case "memory":
            return stack.enter_context(memory_file("foreign", os.sysconf("SC_PAGESIZE"))).number
        case "socket":
            return stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).fileno()
    raise InternalError(f"there is no descriptor of the sort {sort!r}")


def _of_a_vm(sort: str, system: System, stack: ExitStack) -> int:
    """Nearly right: a descriptor that has to do with a VM, which is alive."""
    vm = system.create_vm()
    stack.callback(vm.close)
    if sort == "stats":
        return stack.enter_context(vm.stats_fd()).number
    vcpu = vm.create_vcpu(0)
    stack.callback(vcpu.close)
    return vcpu.fd.number
