# SPDX-License-Identifier: Apache-2.0
"""Steps that bind eventfds to a VM, write them, and look what has arrived.

An eventfd is the run's, as a device's is no VMM's: the VMMs are sent it, and it outlives them.
"""

from __future__ import annotations

import os
from functools import partial

from chaos.experiment import steps as s
from chaos.runner.script.executor import Executor
from chaos.vmm import messages as m


def irqfd(executor: Executor, step: s.IrqfdStep) -> None:
    guests, vm = executor.guests, executor.guests.launched(step.vm)
    for gsi in s.each_of(step.gsis):
        bind = m.BindIrqfd(vm=vm.name, gsi=gsi, assign=step.assign)
        guests.do(vm, bind, fds=(guests.eventfd("gsi", gsi).number,))


def ioeventfd(executor: Executor, step: s.IoeventfdStep) -> None:
    guests, vm = executor.guests, executor.guests.launched(step.vm)
    for port in s.each_of(step.ports):
        bind = m.BindIoeventfd(vm=vm.name, port=port, assign=step.assign)
        guests.do(vm, bind, fds=(guests.eventfd("port", port).number,))


def signal(executor: Executor, step: s.SignalStep) -> None:
    for gsi in s.each_of(step.gsis):
        executor.log.record("signal", partial(os.eventfd_write, executor.guests.eventfd("gsi", gsi).number, 1), gsi=gsi)


def interrupts(executor: Executor, step: s.InterruptsStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.none_under_way("its answer would wait for that")
    executor.guests.do(vm, m.Interrupts(vm=vm.name))


def memslot(executor: Executor, step: s.MemslotStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.guests.do(vm, m.SetMemory(vm=vm.name, there=step.there, slot=step.slot))
