# SPDX-License-Identifier: Apache-2.0
"""A storm as the runner has it: by its memory file, which tells what came of it even if its VMM was killed under it."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from chaos.history.records import Call, Stormed, StormThread
from chaos.linux.fd import OwnedFd
from chaos.native import Call as NativeCall
from chaos.native import Ran, edge, read
from chaos.vmm.storm import STILL, call_of, memory_of


@dataclass(frozen=True, slots=True)
class Storm:
    vm: str
    calls: tuple[str, ...]
    memory: OwnedFd

    @classmethod
    def prepare(cls, vm: str, calls: tuple[str, ...], threads: int) -> Storm:
        """Raises OSError."""
        return cls(vm, calls, memory_of(threads))

    @property
    def wants_still(self) -> bool:
        """Whether the vCPUs may not enter the guest while it lasts."""
        return bool(STILL & set(self.calls))

    def over(self, *, t: int, agent: str, step: int) -> Stormed:
        """What came of it, when its threads have ended or their process has. It is not to be asked again.

        A thread that there never was, because the process ended first, is left out.
        """
        with self.memory:
            threads = tuple(self._thread(ran) for ran in read(self.memory.number) if ran.tid)
        return Stormed(t=t, agent=agent, vm=self.vm, step=step, calls=self.calls, threads=threads)

    def _thread(self, ran: Ran) -> StormThread:
        dead = edge(ran, errno.EIO)
        return StormThread(
            began=ran.began, ended=ran.ended, calls=ran.calls, lost=dead.lost, clock_error=ran.clock_error,
            errnos={_name(number): count for number, count in ran.errnos.items()},
            answered=self._call(dead.other), refused=self._call(dead.first),
        )  # fmt: skip

    def _call(self, call: NativeCall | None) -> Call | None:
        if call is None:
            return None
        name = call_of(self.calls, call.thread, call.index)
        return Call(ioctl=name, began=call.began, ended=call.ended, errno=call.errno)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "ok"
