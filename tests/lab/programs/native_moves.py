# SPDX-License-Identifier: Apache-2.0
"""Runs in the lab: native loops and vCPU threads on SEV VMs. Prints one JSON object with what was seen."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from chaos.kvm.numbers import Cap, Ioctl
from chaos.kvm.sev import Platform, Sev
from chaos.kvm.structs import EnableCap
from chaos.kvm.system import System
from chaos.kvm.vcpu import KvmVcpu
from chaos.kvm.vm import KvmVm
from chaos.linux.fd import Mapping, OwnedFd
from chaos.native import LoopProgram, LoopStep, NativeLoop, RunningVcpu, VcpuThread, read_vcpu
from chaos.vmm import guest, state

THREADS = 3
WITHIN = 60.0
KVM_GET_MSR_INDEX_LIST = 0xC004AE02

Found = dict[str, Any]


class Host:
    """What the checks make, and close together."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.system = System.open()
        stack.callback(self.system.close)
        self.platform = Platform.open()
        stack.callback(self.platform.close)

    def sev(self, vm: KvmVm) -> Sev:
        return Sev(vm.fd.number, self.platform.fd.number)

    def vm(self, vcpus: int, *, encrypted: bool) -> KvmVm:
        vm = self.system.create_vm()
        self.stack.callback(vm.close)
        if encrypted:
            self.sev(vm).init()
        for number in range(vcpus):
            self.stack.callback(vm.create_vcpu(number).close)
        if encrypted:
            self.sev(vm).launch_start(0)
        return vm


class Guest:
    """A VM with the guest's program, ready to run unless it is the destination of a move."""

    def __init__(self, host: Host, memory: OwnedFd, *, encrypted: bool = True, launched: bool = True) -> None:
        self.memory = Mapping(memory.number, guest.MEMORY)
        host.stack.callback(self.memory.close)
        self.vm = host.system.create_vm()
        host.stack.callback(self.vm.close)
        self.vm.set_memory(0, 0, self.memory)
        sev = host.sev(self.vm)
        if encrypted and launched:
            sev.init()
        self.vcpu = self._vcpu(host)
        if launched:
            self.memory.write(0, guest.PROGRAM)
        if encrypted and launched:
            sev.launch_start(0)
            self.vm.register_region(self.memory.start, self.memory.size)
            sev.launch_update_data(self.memory.start, len(guest.PROGRAM))
            sev.launch_measure()
            sev.launch_finish()

    def _vcpu(self, host: Host) -> KvmVcpu:
        vcpu = self.vm.create_vcpu(0)
        host.stack.callback(vcpu.close)
        vcpu.set_cpuid(host.system.supported_cpuid())
        segments = vcpu.sregs()
        for segment in (segments.cs, segments.ds, segments.es, segments.ss):
            segment.base = segment.selector = 0
        vcpu.set_sregs(segments)
        registers = vcpu.regs()
        registers.rip, registers.rflags, registers.rbx, registers.rdx = guest.CODE, 2, 0, 0
        registers.rsi = guest.NEVER
        vcpu.set_regs(registers)
        return vcpu

    def counter(self) -> int:
        registers = self.vcpu.regs()
        return int(registers.rdx << 32 | registers.rbx)

    def run(self, every: int, memory: int | None = None) -> RunningVcpu:
        registers = self.vcpu.regs()
        registers.rsi = guest.mask(every)
        self.vcpu.set_regs(registers)
        return VcpuThread(
            fd=self.vcpu.fd.number,
            area=ctypes.addressof(self.vcpu.shared),
            tick_port=guest.TICK_PORT,
            stale_port=guest.STALE_PORT,
            ticks=self.counter(),
        ).start(memory=memory)


def move(destination: KvmVm, source: KvmVm) -> LoopStep:
    request = EnableCap(cap=Cap.MOVE_ENC_CONTEXT_FROM)
    request.args[0] = source.fd.number
    return LoopStep(destination.fd.number, Ioctl.KVM_ENABLE_CAP, bytes(request))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)


def until_ticks(running: RunningVcpu) -> None:
    until(lambda: running.seen().exits >= 5, "ticks")


# The checks


def storm(host: Host) -> Found:
    """Three threads over three VMs, as in sev_migrate_tests; each call as [thread, source, began, ended, errno].

    On a busy machine they may hardly ever run at the same time, so it is tried until two have met.
    """
    vms = [host.vm(4, encrypted=True) for _ in range(THREADS)]
    programs = tuple(LoopProgram(tuple(move(vm, source) for source in vms), rounds=2000) for vm in vms)
    alone = NativeLoop(programs[:1]).start().join(WITHIN).threads[0]
    for _ in range(20):
        outcome = NativeLoop(programs, ring=1 << 13).start().join(WITHIN)
        if any(errno.EBUSY in thread.errnos for thread in outcome.threads):
            break
    return {
        "alone": alone.errnos,
        "slack": max(thread.clock_error for thread in outcome.threads) + 100,
        "calls": [[c.thread, c.index, c.began, c.ended, c.errno] for c in outcome.calls()],
        "counts": [thread.errnos for thread in outcome.threads],
    }


def race(host: Host) -> Found:
    """Two destinations reach for one source until one has it; the winner is the source of the next race."""
    source = host.vm(1, encrypted=True)
    rounds = []
    for number in range(60):
        rivals = [host.vm(1, encrypted=False) for _ in range(2)]
        programs = tuple(
            LoopProgram((move(rival, source),), rounds=None, offset=offset, ends_at=frozenset({0}), ends_all=True)
            for rival, offset in zip(rivals, (10_000, number * 500), strict=True)
        )
        threads = NativeLoop(programs, ring=1 << 12).start().join(WITHIN).threads
        rounds.append([thread.errnos for thread in threads])
        source = rivals[0] if 0 in threads[0].errnos else rivals[1]
    return {"rounds": rounds}


def arguments(host: Host) -> Found:
    """KVM_GET_MSR_INDEX_LIST says E2BIG to a length of 0, and writes there the length that will do."""
    fd, empty = host.system.fd.number, bytes(4096)
    found = {}
    for name, reset in (("kept", False), ("reset", True)):
        program = LoopProgram((LoopStep(fd, KVM_GET_MSR_INDEX_LIST, empty, reset=reset),), rounds=4)
        found[name] = [call.errno for call in NativeLoop((program,)).start().join(WITHIN).threads[0]]
    return found


def hand_over(host: Host) -> Found:
    """A guest runs, is stopped, goes on, and moves."""
    with OwnedFd(os.memfd_create("guest")) as memory:
        os.truncate(memory.number, guest.MEMORY)
        source = Guest(host, memory)
        destination = Guest(host, memory, launched=False)
    found: Found = {"stops": []}
    for every in (4, 1 << 10, 0, 1 << 16):
        before = source.counter()
        running = source.run(every)
        if every:
            until_ticks(running)
        else:
            running.wait(0.05)
        running.stop()
        left = running.join(WITHIN)
        counts = [before, left.seen.ticks, source.counter()]
        found["stops"].append({"every": every, "counts": counts, "why": left.why.name, "stale": left.seen.stale})
    given = state.take(source.vcpu)
    last = left.seen.last_tick
    moved = NativeLoop((LoopProgram((move(destination.vm, source.vm),)),)).start().join(WITHIN).threads[0]
    state.give(destination.vcpu, given)
    before = destination.counter()
    running = destination.run(4)
    until_ticks(running)
    running.stop()
    left = running.join(WITHIN)
    found["moved"] = moved.errnos
    found["times"] = [last, next(iter(moved)).began, left.seen.first_tick, left.seen.last_tick]
    found["after"] = {"counts": [before, left.seen.ticks], "stale": left.seen.stale, "why": left.why.name}
    dead = VcpuThread(
        fd=source.vcpu.fd.number, area=ctypes.addressof(source.vcpu.shared), tick_port=0x10, stale_port=0x11
    )
    found["dead"] = dead.start().join(WITHIN).reason
    return found


def held(host: Host) -> Found:
    """A vCPU in the guest holds a move, which no signal ends but a fatal one; out of the guest it lets it go."""
    with OwnedFd(os.memfd_create("guest")) as memory:
        os.truncate(memory.number, guest.MEMORY)
        source = Guest(host, memory)
    destination = host.vm(1, encrypted=False)
    running = source.run(0)
    source_left = running.wait(0.1)
    moving = NativeLoop((LoopProgram((move(destination, source.vm),)),)).start()
    found: Found = {"early": source_left, "said": ""}
    moving.interrupt()
    try:
        moving.join(0.2)
    except TimeoutError as error:
        found["said"] = str(error)
    moving.interrupt()
    found["still"] = not moving.wait(0.1)
    running.stop()
    found["why"] = running.join(WITHIN).why.name
    found["moved"] = moving.join(WITHIN).threads[0].errnos
    return found


def killed(host: Host) -> Found:
    """The last tick of a guest whose VMM was killed can be read."""
    vcpu = VcpuThread(fd=0, area=0, tick_port=0, stale_port=0)
    with OwnedFd(os.memfd_create("guest")) as memory, vcpu.memory() as board:
        os.truncate(memory.number, guest.MEMORY)
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                Guest(Host(ExitStack()), memory, encrypted=False).run(4, board.number)
                signal.pause()
            os._exit(1)
        until(lambda: read_vcpu(board.number).exits > 100, "ticks of a guest to be killed")
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        now = time.monotonic_ns()
        seen = read_vcpu(board.number)
    return {"status": status, "ticks": seen.ticks, "exits": seen.exits, "ago": now - seen.last_tick}


def main() -> None:
    found = {}
    for check in (storm, race, arguments, hand_over, held, killed):
        with ExitStack() as stack:
            found[check.__name__] = check(Host(stack))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
