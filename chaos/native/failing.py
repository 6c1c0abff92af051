# SPDX-License-Identifier: Apache-2.0
"""A thread's ioctls and closes, in which the nth fault point of the kernel's fails."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from chaos.linux.fail_nth import OWN
from chaos.linux.fd import OwnedFd
from chaos.native import library

MOST = (1 << 31) - 1


class Failing:
    """Makes calls for `chaos.kvm.call.made_by`, and counts the fault points on their way together: the `nth` of them
    fails, and with it whatever the kernel makes of that; none with `nth` 0. Used by the thread that made it, with
    `with`.

    `left` is what is left of the count, 0 if it was met: then `struck` is the number of the call, from 0. `met` is how
    many points there were until one failed. `calls` is how many have been made. Raises OSError where the kernel cannot
    do it.
    """

    def __init__(self, nth: int, file: str = str(OWN)) -> None:
        self._begun = self.left = nth or MOST
        self.calls = 0
        self.struck: int | None = None
        self._native = library.load()
        self._file = OwnedFd(os.open(file, os.O_RDWR | os.O_CLOEXEC))

    @property
    def met(self) -> int:
        return self._begun - self.left

    def ioctl(self, fd: int, number: int, argument: Any) -> tuple[int, int]:
        """Its result, -1 if it failed, and its errno."""
        return self._count(self._native.ioctl_failing, fd, number, argument)

    def close(self, fd: int) -> tuple[int, int]:
        """The same."""
        return self._count(self._native.close_failing, fd)

    def _count(self, native: Callable[..., int], *call: Any) -> tuple[int, int]:
        result, error, left = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint32()
        out = ctypes.byref(result), ctypes.byref(error), ctypes.byref(left)
        count = self.left or MOST  # met already: nothing more is to fail
        wrong = native(self._file.number, count, *call, *out)
        if wrong:
            raise OSError(wrong, f"counting fault points: {os.strerror(wrong)}")
        if self.left:
            self.left = left.value
            if not self.left:
                self.struck = self.calls
        self.calls += 1
        return result.value, error.value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
