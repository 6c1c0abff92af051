# SPDX-License-Identifier: Apache-2.0
"""One tree of errors, and the exit codes they lead to.

    SevchaosError
    ├── UsageError            the input is wrong: names file, key, value and remedy
    ├── HostLacks             this machine cannot do it: names what is missing and how to get it
    │   ├── Unsupported       this kernel does not know what an experiment is about: the run is skipped
    │   ├── NoSpace           a disk is full, or memory for a lab is not there
    │   └── NoKernel          a kernel that was asked for cannot be had
    ├── LabFailed             the lab broke while it ran; carries the last console lines
    │   ├── KernelPanicked
    │   ├── LabHung           nothing came back before the deadline
    │   ├── QemuDied
    │   └── PspDied
    ├── CleanupFailed         something of ours could not be removed
    └── InternalError         sevchaos itself is wrong

A deviation of the kernel is never an exception: it is a verdict (`chaos.judge.verdict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line exits with. 64 to 78 are those of sysexits.h; 80 and up are the lab's own.

    `sevchaos lab run` passes the command's own code through, which is why the lab's failures keep away from
    small numbers and from the shell's 124 to 128.
    """

    KEPT = 0
    BROKEN = 1
    UNKNOWN = 2
    UNCLEAN = 3
    SKIPPED = 4
    USAGE = 64
    HOST_LACKS = 69
    INTERNAL = 70
    NO_SPACE = 73
    PANICKED = 80
    HUNG = 81
    QEMU_DIED = 82
    PSP_DIED = 83
    INTERRUPTED = 130


class SevchaosError(Exception):
    """Base of all. `remedy` says what to do next; it is printed on a line of its own."""

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageError(SevchaosError):
    exit_code = ExitCode.USAGE


class HostLacks(SevchaosError):
    exit_code = ExitCode.HOST_LACKS


class Unsupported(HostLacks):
    pass


class NoSpace(HostLacks):
    exit_code = ExitCode.NO_SPACE


class NoKernel(HostLacks):
    pass


class LabFailed(SevchaosError):
    """The lab broke. `console` holds its last lines, oldest first, without line ends."""

    exit_code = ExitCode.QEMU_DIED

    def __init__(self, message: str, *, remedy: str = "", console: Sequence[str] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.console = tuple(console)


class KernelPanicked(LabFailed):
    exit_code = ExitCode.PANICKED


class LabHung(LabFailed):
    exit_code = ExitCode.HUNG


class QemuDied(LabFailed):
    exit_code = ExitCode.QEMU_DIED


class PspDied(LabFailed):
    exit_code = ExitCode.PSP_DIED


class CleanupFailed(SevchaosError):
    exit_code = ExitCode.UNCLEAN


class InternalError(SevchaosError):
    exit_code = ExitCode.INTERNAL
