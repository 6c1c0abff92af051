# SPDX-License-Identifier: Apache-2.0
"""Steps that move a context, alone or as part of a migration."""

from __future__ import annotations

from collections.abc import Callable

from chaos.experiment import steps as s
from chaos.runner.migration.supervisor import supervise
from chaos.runner.script.executor import Actor
from chaos.vmm import messages as m


def migrate(actor: Actor, step: s.Migrate, carry_out: Callable[[Actor, s.Step], None]) -> None:
    left = dict(step.before)  # an attempt that is made again is not struck again

    def before(phase: s.Phase) -> None:
        for inner in left.pop(phase, ()):
            carry_out(actor, inner)

    supervise(actor.stage, step, before)


def move(actor: Actor, step: s.Move) -> None:
    destination = actor.stage.guest(step.destination)
    actor.free(destination)
    actor.provide(destination, step.source)
    taken = m.Move(vm=destination.name, source=step.source or "", fd=step.fd or "", flags=step.flags)
    actor.begin(destination, taken, wait=step.wait)


def join(actor: Actor, step: s.Join) -> None:
    actor.join(actor.stage.guests[step.vm], step.within)
