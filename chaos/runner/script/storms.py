# SPDX-License-Identifier: Apache-2.0
"""Steps that let native threads make ioctls on a VM's descriptors, and end them.

A storm is `chaos.vmm.storm.CallStorm` in the VMM. The runner has its memory file, which tells what came of it even if
the VMM was killed under it. While there is one the VM is closed only after it was ended, and some want the vCPUs out of
the guest; if the process ends, what came of it is recorded with its end.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from chaos.experiment.steps import CalmStep, StormStep
from chaos.history.records import Call, Stormed, StormThread
from chaos.linux.fd import OwnedFd
from chaos.native import NativeCall, Ran, edge, read
from chaos.runner.guests import Guest, Guests
from chaos.runner.operations import OperationLog
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed
from chaos.vmm.messages import EndStorm, StartStorm
from chaos.vmm.storm import STILL, call_of, memory_of


@dataclass(frozen=True, slots=True)
class StormMemory:
    vm: str
    calls: tuple[str, ...]
    memory: OwnedFd

    @classmethod
    def prepare(cls, vm: str, calls: tuple[str, ...], threads: int) -> StormMemory:
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


def storm(executor: Executor, step: StormStep) -> None:
    begin(executor.guests, executor.log, executor.guests.launched(step.vm), step.calls, step.threads)


def calm(executor: Executor, step: CalmStep) -> None:
    guest = executor.guests.launched(step.vm)
    if guest.before_close is None:
        raise StepFailed(f"there is no storm on {guest.name}")
    guest.before_close()


def begin(guests: Guests, log: OperationLog, guest: Guest, calls: tuple[str, ...], threads: int) -> StormMemory:
    """Let a storm begin. Raises `StepFailed`."""
    if guest.before_close is not None:
        raise StepFailed(f"there is a storm on {guest.name} already")
    prepared = StormMemory.prepare(guest.name, calls, threads)
    if prepared.wants_still and guest.running:
        prepared.memory.close()
        raise StepFailed(f"{guest.name} runs, and these calls want its vCPUs out of the guest")
    vmm = guest.vmm

    def over() -> None:
        """Record what came of a storm whose threads have ended."""
        del vmm.at_end[guest.name]
        guest.kept_out, guest.before_close = "", None
        log.write(prepared.over(t=log.now(), agent=vmm.name, step=log.step))

    def end() -> None:
        """End the storm, and record what came of it. Raises `StepFailed`."""
        guests.must(guest, EndStorm(vm=guest.name))
        over()

    vmm.at_end[guest.name] = over  # if the process ends now, what came of it is told with its end
    guest.before_close = end
    if prepared.wants_still:
        guest.kept_out = f"the calls of the storm on {guest.name} want its vCPUs out of the guest"
    try:
        guests.must(guest, StartStorm(vm=guest.name, threads=threads, calls=calls), fds=(prepared.memory.number,))
    except StepFailed:
        if vmm.at_end.pop(guest.name, None):
            guest.kept_out, guest.before_close = "", None
            prepared.memory.close()
        raise
    return prepared


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "ok"
