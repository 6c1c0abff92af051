# SPDX-License-Identifier: Apache-2.0
"""Steps that ask and observe."""

from __future__ import annotations

from errno import EIO

from chaos.experiment import steps as s
from chaos.history.records import Asked
from chaos.runner.script.executor import Actor
from chaos.vmm import messages as m


def ask(actor: Actor, step: s.Ask) -> None:
    vm = actor.stage.guest(step.vm)
    actor.none_under_way("its answer would wait for that")
    every = vm.every
    if every is not None:
        actor.stage.leave(vm)
    answers = actor.stage.fleet.ask(vm.vmm, m.Ask(vm=vm.name)).answers
    actor.write(Asked(t=actor.now(), agent=vm.vmm.name, vm=vm.name, step=actor.step, answers=answers))
    if every is not None and not all(answer.errno == EIO for answer in answers):
        actor.stage.enter(vm, every)  # the dead have nowhere to go back to


def status(actor: Actor, step: s.Status) -> None:
    vm = actor.stage.guest(step.vm)
    actor.stage.do(vm, m.Status(vm=vm.name))


def observe(actor: Actor, step: s.Observe) -> None:
    actor.observer.observe(actor.stage.fleet.recorder, step.label, actor.step)
