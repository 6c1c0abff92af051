# SPDX-License-Identifier: Apache-2.0
"""Steps that ask and observe."""

from __future__ import annotations

from errno import EIO

from chaos.experiment import steps as s
from chaos.runner.script.executor import Executor
from chaos.vmm import messages as m


def ask(executor: Executor, step: s.AskStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.none_under_way("its answer would wait for that")
    every = vm.every
    if every is not None:
        executor.guests.leave(vm)
    answers = executor.guests.ask(vm)
    if every is not None and not all(answer.errno == EIO for answer in answers):
        executor.guests.enter(vm, every)  # the dead have nowhere to go back to


def status(executor: Executor, step: s.StatusStep) -> None:
    vm = executor.guests.launched(step.vm)
    executor.guests.do(vm, m.Status(vm=vm.name))


def observe(executor: Executor, step: s.ObserveStep) -> None:
    executor.observer.observe(step.label, executor.log.step)
