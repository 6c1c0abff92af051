# SPDX-License-Identifier: Apache-2.0
"""Steps that move a context, alone or as part of a migration."""

from __future__ import annotations

from chaos import steps as s
from chaos.migration import handover
from chaos.script.actor import Actor
from chaos.vmm import messages as m


def migrate(actor: Actor, step: s.Migrate) -> None:
    handover.migrate(actor.stage, actor.stage.guest(step.source), actor.stage.guest(step.destination))


def move(actor: Actor, step: s.Move) -> None:
    destination = actor.stage.guest(step.destination)
    actor.free(destination)
    actor.provide(destination, step)
    taken = m.Move(vm=destination.name, source=step.source or "", fd=step.fd or "", flags=step.flags)
    actor.begin(destination, taken, wait=step.wait)


def join(actor: Actor, step: s.Join) -> None:
    actor.join(actor.stage.guests[step.vm], step.within)
