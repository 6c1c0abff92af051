# SPDX-License-Identifier: Apache-2.0
"""A storm: native threads that make ioctls on one VM's descriptors as fast as they can, until they are told to stop or
some thousand calls after the VM has died.

Nothing in it changes a VM: the calls read, ask for what is refused, or set what is set already. KVM_RUN is made with
`immediate_exit`, which enters no guest; so while it is among the calls, the vCPUs stay out of the guest, and so they do
for KVM_SET_REGS, whose registers are those from the beginning of the storm.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

from chaos.errors import InternalError
from chaos.kvm.numbers import Ioctl
from chaos.kvm.vcpu import KvmVcpu
from chaos.kvm.vm import KvmVm
from chaos.linux.fd import OwnedFd
from chaos.native import LoopProgram, LoopStep, NativeLoop
from chaos.native.board import new_memory
from chaos.vmm.ask import VCPU_QUESTIONS, VM_QUESTIONS, AskedIoctl
from chaos.vmm.machine import Machine

# A call takes microseconds, unless something holds its VM.
CALM_WITHIN = 20.0
BEGIN_WITHIN = 20.0
LOOK_EVERY = 0.001
# A thread that was told EIO makes so many calls more, all of which must be told EIO too. Its ring has room for them and
# for what came before: then the last call that was answered is on record.
MORE = 1 << 12
RING = 2 * MORE
# Whoever is to move the VM, or to end the storm, gets its turn, also where there are fewer CPUs than threads.
NICE = 10
STILL = frozenset({"KVM_RUN", "KVM_SET_REGS"})
"""Calls that want the vCPUs out of the guest for as long as the storm lasts."""


def _asked(questions: Sequence[AskedIoctl], *names: str) -> dict[str, AskedIoctl]:
    """Those of `ask` that a VM answers by itself: what asks the firmware may be told EIO by that."""
    return {question.number.name: question for question in questions if question.number.name in names}


VM_CALLS = _asked(VM_QUESTIONS, "KVM_CHECK_EXTENSION", "KVM_GET_CLOCK", "KVM_SET_USER_MEMORY_REGION")
VCPU_CALLS = {"KVM_RUN": AskedIoctl(Ioctl.KVM_RUN, lambda: 0)} | _asked(
    VCPU_QUESTIONS, "KVM_GET_REGS", "KVM_GET_SREGS", "KVM_GET_FPU", "KVM_GET_MP_STATE", "KVM_GET_VCPU_EVENTS",
    "KVM_GET_DEBUGREGS", "KVM_GET_TSC_KHZ", "KVM_GET_MSRS", "KVM_GET_LAPIC", "KVM_GET_XCRS", "KVM_INTERRUPT",
)  # fmt: skip
OF_THE_VCPU: dict[str, Callable[[KvmVcpu], bytes]] = {"KVM_SET_REGS": lambda vcpu: bytes(vcpu.regs())}
OF_THE_FIRMWARE = "KVM_SEV_GUEST_STATUS"
"""The one call that asks the firmware, which may be told EIO by that as well as by a VM that is dead."""
CALLS = frozenset({*VM_CALLS, *VCPU_CALLS, *OF_THE_VCPU, OF_THE_FIRMWARE})


class CallStorm:
    """Under way from when it is made until it is `calm`, and so long the descriptors stay open."""

    def __init__(self, machine: Machine, *, threads: int, calls: Sequence[str], memory: int) -> None:
        """Thread n is at vCPU n modulo their number, and begins with call n. `memory` comes from `memory_of`.

        Raises OSError, `HostLacks`, `KernelError`, and TimeoutError if not all threads begin.
        """
        vcpus = machine.vcpus[: machine.count]
        if not vcpus:
            raise InternalError("a VM without vCPUs has no storm")
        self._kept: list[object] = []  # what the calls have addresses of
        programs = tuple(self._program(machine, vcpus[number % len(vcpus)], calls, number) for number in range(threads))
        self._still = tuple(vcpus) if STILL & set(calls) else ()
        self._set_immediate_exit(1)
        try:
            self._running = NativeLoop(programs, ring=RING).start(memory=memory)
        except BaseException:
            self._set_immediate_exit(0)
            raise
        self._await_begin()

    def _program(self, machine: Machine, vcpu: KvmVcpu, calls: Sequence[str], number: int) -> LoopProgram:
        first = number % len(calls)
        steps = tuple(self._step(machine, vcpu, name) for name in (*calls[first:], *calls[:first]))
        return LoopProgram(steps, rounds=None, ends_at=frozenset({errno.EIO}), more=MORE, nice=NICE)

    def _step(self, machine: Machine, vcpu: KvmVcpu, name: str) -> LoopStep:
        if name == OF_THE_FIRMWARE:
            request, answer = machine.sev.status_request()
            self._kept.append(answer)
            return LoopStep(machine.vm.fd.number, Ioctl.KVM_MEMORY_ENCRYPT_OP, bytes(request))
        return _step(machine.vm, vcpu, name)

    def _await_begin(self) -> None:
        deadline = time.monotonic() + BEGIN_WITHIN
        while not self._running.begun:
            if time.monotonic() > deadline:
                self.calm()
                raise TimeoutError(f"the threads of a storm did not begin within {BEGIN_WITHIN:g} s")
            self._running.wait(LOOK_EVERY)

    def calm(self, within: float = CALM_WITHIN) -> None:
        """Each thread ends after the call it is in. Raises TimeoutError if one does not; then it may be tried again."""
        self._running.stop()
        self._running.join(within)
        self._set_immediate_exit(0)

    def _set_immediate_exit(self, value: int) -> None:
        for vcpu in self._still:
            vcpu.shared.immediate_exit = value


def begin(machine: Machine, threads: int, calls: Sequence[str], memory: int) -> None:
    """Let one begin on the VM, which is not closed before it has ended. Raises what `CallStorm` does."""
    if machine.before_close is not None:
        raise InternalError("there is a storm on this VM already")
    storm = CallStorm(machine, threads=threads, calls=calls, memory=memory)

    def over() -> None:
        storm.calm()
        machine.before_close = None

    machine.before_close = over


def end(machine: Machine) -> None:
    """End the one on the VM, if there is one. Raises TimeoutError."""
    if machine.before_close is not None:
        machine.before_close()


def memory_of(threads: int) -> OwnedFd:
    """A memory file for one storm of so many threads. Raises OSError."""
    return new_memory((RING,) * threads)


def call_of(calls: Sequence[str], thread: int, index: int) -> str:
    """The name of a thread's step of that index."""
    return calls[(thread + index) % len(calls)]


def _step(vm: KvmVm, vcpu: KvmVcpu, name: str) -> LoopStep:
    if name in OF_THE_VCPU:
        return LoopStep(vcpu.fd.number, Ioctl[name], OF_THE_VCPU[name](vcpu))
    question = VM_CALLS.get(name) or VCPU_CALLS[name]
    argument = question.argument()
    return LoopStep(
        vm.fd.number if name in VM_CALLS else vcpu.fd.number,
        question.number,
        argument if isinstance(argument, int) else bytes(argument),
    )
