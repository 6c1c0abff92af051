# SPDX-License-Identifier: Apache-2.0
"""Steps that move a context, alone or as part of a migration."""

from __future__ import annotations

from chaos.experiment import steps as s
from chaos.runner.migration.supervisor import supervise
from chaos.runner.script.executor import Executor
from chaos.vmm import messages as m


def migrate(executor: Executor, step: s.MigrateStep) -> None:
    left = dict(step.before)  # an attempt that is made again is not broken again

    def before(phase: s.Phase) -> None:
        for inner in left.pop(phase, ()):
            executor.carry_out(inner)

    supervise(executor.guests, executor.log, step, before, lambda: executor.between(step))


def move(executor: Executor, step: s.MoveStep) -> None:
    destination = executor.guests.launched(step.destination)
    executor.free(destination)
    executor.provide(destination, step.source)
    taken = m.Move(vm=destination.name, source=step.source or "", fd=step.fd or "", flags=step.flags)
    executor.begin(destination, taken, wait=step.wait)


def join(executor: Executor, step: s.JoinStep) -> None:
    executor.join(executor.guests[step.vm], step.within)
