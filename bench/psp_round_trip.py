# SPDX-License-Identifier: Apache-2.0
"""One command of the software PSP, from the lab's user space and back, beside an ioctl that does nothing.

    sevchaos lab run --copy bench/psp_round_trip.py -- python3 psp_round_trip.py

PLATFORM_STATUS through /dev/sev goes the whole way: driver, mailbox, software PSP, interrupt. Beside it, in turns, an
ioctl number that /dev/sev refuses, which is what the call alone costs in this lab.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time

SEV_ISSUE_CMD = 0xC0105300
PLATFORM_STATUS = 1
ROUNDS, CALLS = 11, 100


class Command(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("cmd", ctypes.c_uint32), ("data", ctypes.c_uint64), ("error", ctypes.c_uint32))


def microseconds(fd: int, number: int, command: Command) -> float:
    libc = ctypes.CDLL(None, use_errno=True)
    began = time.monotonic_ns()
    for _ in range(CALLS):
        libc.ioctl(fd, ctypes.c_ulong(number), ctypes.byref(command))
    return (time.monotonic_ns() - began) / CALLS / 1000


def main() -> None:
    fd = os.open("/dev/sev", os.O_RDWR)
    status = (ctypes.c_uint8 * 12)()
    command = Command(PLATFORM_STATUS, ctypes.addressof(status), 0)
    times: dict[str, list[float]] = {"PLATFORM_STATUS": [], "a refused ioctl": []}
    for number in range(ROUNDS):
        for name, request in (("PLATFORM_STATUS", SEV_ISSUE_CMD), ("a refused ioctl", 0)):
            value = microseconds(fd, request, command)
            if number:
                times[name].append(value)
    assert status[0] or status[1], "the PSP told no API version: no command got through"
    for name, values in times.items():
        spread = f"{min(values):.0f} to {max(values):.0f}, {ROUNDS - 1} x {CALLS}"
        print(f"{name:20} {statistics.median(values):8.0f} µs  ({spread})")


if __name__ == "__main__":
    main()
