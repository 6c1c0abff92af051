# SPDX-License-Identifier: Apache-2.0
"""Carrying out a script, step by step.

A step is a function of the stage; the table at the end says which is whose. Operations that the kernel refuses are
answers, and the script goes on: what they mean is for the checkers. What makes the rest of a script meaningless (a
launch that fails, a guest that does not count, a hold that is not reached) raises `StepFailed`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EIO
from typing import Any

from chaos import experiment as e
from chaos import fault as faults
from chaos.experiment import Kind
from chaos.fleet import ANSWER_WITHIN, Pending, StepFailed
from chaos.history import Asked, Counted, Fault, Held
from chaos.kvm.numbers import Policy
from chaos.migration import handover
from chaos.observe import Observer
from chaos.poll import LOOK_AGAIN, TimedOut
from chaos.schedule import holds
from chaos.stage import Guest, Stage
from chaos.vmm import messages as m


@dataclass(slots=True)
class Actor:
    """Who carries a script out. What has to be undone afterwards is put on `undo`."""

    stage: Stage
    observer: Observer
    undo: ExitStack

    def perform(self) -> None:
        """Raises `StepFailed`, having said which step it was."""
        for number, step in enumerate(self.stage.experiment.script):
            self.stage.fleet.step = number
            try:
                _STEPS[type(step)](self, step)
            except StepFailed as failed:
                name = step.__struct_config__.tag
                raise StepFailed(f"step {number} ({name}): {failed}", step=number) from failed
        self.stage.fleet.step = len(self.stage.experiment.script)

    # -- VMs ----------------------------------------------------------------------------------------------

    def launch(self, step: e.Launch) -> None:
        stage, vm = self.stage, self.stage.guests[step.vm]
        kind = vm.spec.kind
        self._create(vm)
        if kind is Kind.PLAIN:
            return
        stage.must(vm, m.Init(vm=vm.name, key=kind.key))
        stage.must(vm, m.LaunchStart(vm=vm.name, policy=Policy.ES if kind is Kind.SEV_ES else 0))
        stage.must(vm, m.LaunchUpdateData(vm=vm.name, lanes=stage.lanes[vm.spec.memory]))
        if kind is Kind.SEV_ES:
            stage.must(vm, m.LaunchUpdateVmsa(vm=vm.name))
        if step.finish:
            self._finish(vm)

    def finish(self, step: e.Finish) -> None:
        self._finish(self.stage.guest(step.vm))

    def mirror(self, step: e.Mirror) -> None:
        """What the kernel refuses is an answer, also where the mirror's registers cannot be encrypted any more."""
        stage, owner, vm = self.stage, self.stage.guest(step.source), self.stage.guests[step.vm]
        if not vm.created:
            self._create(vm)
        if owner is not vm:
            handover.connect(stage, owner, vm)
            handover.send(stage, owner, vm)
        done = stage.do(vm, m.Mirror(vm=vm.name, source=owner.name))
        if done.outcome == "ok" and stage.is_es(owner):
            stage.do(vm, m.LaunchUpdateVmsa(vm=vm.name))

    def _create(self, vm: Guest) -> None:
        spec = vm.spec
        create = m.Create(
            vm=vm.name, kind=spec.kind.value, vcpus=spec.vcpus, memory=spec.memory, type=spec.type, lane=vm.lane
        )
        self.stage.must(vm, create, fds=(self.stage.memories[spec.memory].number,))
        vm.created = True

    def _finish(self, vm: Guest) -> None:
        self.stage.must(vm, m.LaunchMeasure(vm=vm.name))
        self.stage.must(vm, m.LaunchFinish(vm=vm.name))

    def run(self, step: e.Run) -> None:
        vm = self.stage.guest(step.vm)
        if not self.stage.may_run(vm):
            self._note("skipped", f"SEV-ES guests cannot be entered on this host: {vm.name} does not run")
            return
        self.stage.enter(vm, step.every)

    def pause(self, step: e.Pause) -> None:
        self.stage.leave(self.stage.guest(step.vm))

    def count(self, step: e.Count) -> None:
        """Of a guest that never leaves, the vCPU has to be taken out to read its counter: not while a move waits.

        A guest that stops by itself is an answer like a refused operation, and the script goes on.
        """
        vm = self.stage.guest(step.vm)
        if not self.stage.may_run(vm):
            self._note("skipped", f"SEV-ES guests cannot be entered on this host: {vm.name} does not count")
            return
        if not vm.running:
            raise StepFailed(f"{vm.name} does not run")
        if vm.every == 0:
            self._no_move("counting would take its vCPU out of the guest")
        first = latest = self._sample(vm)

        def counted() -> bool:
            nonlocal latest
            latest = self._sample(vm)
            further = (now - then for now, then in zip(latest.each, first.each, strict=True))
            return min(further) >= step.ticks or bool(latest.ended)

        failure = ""
        try:
            self.stage.fleet.loop.wait(counted, step.within, f"{vm.name} to count {step.ticks}", look=LOOK_AGAIN)
        except TimedOut as late:
            failure = str(late)
        self._write(
            Counted(
                t=self._now(), vm=vm.name, agent=vm.vmm.name, step=self._step, where=latest.where,
                ticks=latest.ticks, stale=latest.stale, ended=latest.ended,
                each=latest.each if len(latest.each) > 1 else (),
            )
        )  # fmt: skip
        if failure:
            raise StepFailed(failure)

    def _sample(self, vm: Guest) -> m.Sampled:
        sampled = self.stage.fleet.ask(vm.vmm, m.Sample(vm=vm.name)).sampled
        assert sampled is not None
        return sampled

    def close(self, step: e.Close) -> None:
        self.stage.close(self.stage.guest(step.vm))

    # -- moves --------------------------------------------------------------------------------------------

    def migrate(self, step: e.Migrate) -> None:
        handover.migrate(self.stage, self.stage.guest(step.source), self.stage.guest(step.destination))

    def move(self, step: e.Move) -> None:
        source, destination = self.stage.guest(step.source), self.stage.guest(step.destination)
        if step.destination in self.stage.moves:
            raise StepFailed(f"a move into {step.destination} is under way")
        if source is not destination:
            handover.connect(self.stage, source, destination)
            handover.send(self.stage, source, destination)
        pending = self.stage.fleet.invoke(destination.vmm, m.Move(vm=destination.name, source=source.name))
        if step.wait:
            self._await_move(destination, pending, ANSWER_WITHIN)
        else:
            self.stage.moves[step.destination] = pending

    def join(self, step: e.Join) -> None:
        pending = self.stage.moves.pop(step.destination, None)
        if pending is None:
            raise StepFailed(f"no move into {step.destination} is under way")
        self._await_move(self.stage.guests[step.destination], pending, step.within)

    def _await_move(self, destination: Guest, pending: Pending, within: float) -> None:
        try:
            self.stage.fleet.wait(pending, within)
        except TimedOut as late:
            self.stage.moves[destination.name] = pending
            sleeper = holds.look(destination.vmm.pid, pending.tid)
            raise StepFailed(f"{late}; its thread: {sleeper or 'gone'}") from late

    def hold(self, step: e.Hold) -> None:
        pending = self.stage.moves.get(step.destination)
        if pending is None:
            raise StepFailed(f"no move into {step.destination} is under way")
        pid = self.stage.guests[step.destination].vmm.pid
        sleeper: holds.Sleeper | None = None
        reached = False

        def there() -> bool:
            nonlocal sleeper, reached
            if pending.tid:
                sleeper = holds.look(pid, pending.tid)
                reached = sleeper is not None and holds.holds(sleeper, step.at)
            return reached or pending.over

        what = f"the move into {step.destination} to sleep at {step.at}"
        failure = ""
        try:
            self.stage.fleet.loop.wait(there, step.within, what, look=LOOK_AGAIN)
        except TimedOut as late:
            failure = f"{late}; its thread: {sleeper or 'gone'}"
        self._write(
            Held(
                t=self._now(), op=pending.op, step=self._step, hold=step.at, reached=reached,
                state=sleeper.state if sleeper else "", sleeping=sleeper.sleeping if sleeper else "",
            )
        )  # fmt: skip
        if not reached:
            raise StepFailed(failure or f"the move into {step.destination} ended before it slept at {step.at}")

    # -- looking ------------------------------------------------------------------------------------------

    def ask(self, step: e.Ask) -> None:
        vm = self.stage.guest(step.vm)
        self._no_move("its answer would wait for that")
        every = vm.every
        if every is not None:
            self.stage.leave(vm)
        answers = self.stage.fleet.ask(vm.vmm, m.Ask(vm=vm.name)).answers
        self._write(Asked(t=self._now(), agent=vm.vmm.name, vm=vm.name, step=self._step, answers=answers))
        if every is not None and not all(answer.errno == EIO for answer in answers):
            self.stage.enter(vm, every)  # the dead have nowhere to go back to

    def status(self, step: e.Status) -> None:
        vm = self.stage.guest(step.vm)
        self.stage.do(vm, m.Status(vm=vm.name))

    def observe(self, step: e.Observe) -> None:
        self.observer.observe(self.stage.fleet.recorder, step.label, self._step)

    # -- faults -------------------------------------------------------------------------------------------

    def strike(self, step: e.Strike) -> None:
        fault = faults.find(step.fault, step.options)
        victim = self.stage.fleet.vmms[step.vmm]

        def undo() -> None:
            detail = fault.undo(victim)
            self._write(
                Fault(t=self._now(), fault=step.fault, event="undo", step=self._step, target=step.vmm, detail=detail)
            )

        self.undo.callback(undo)
        self._write(Fault(t=self._now(), fault=step.fault, event="apply", step=self._step, target=step.vmm))
        try:
            fault.apply(victim)
            evidence = fault.evidence(victim)
        except OSError as error:
            raise StepFailed(f"{step.fault} could not be applied to {step.vmm}: {error}") from error
        self._write(
            Fault(
                t=self._now(), fault=step.fault, event="evidence", step=self._step, target=step.vmm,
                struck=evidence.struck, detail=evidence.detail,
            )
        )  # fmt: skip

    # -- in short -----------------------------------------------------------------------------------------

    def _no_move(self, why: str) -> None:
        under_way = [name for name, pending in self.stage.moves.items() if not pending.over]
        if under_way:
            raise StepFailed(f"a move into {', '.join(under_way)} is under way: {why}")

    @property
    def _step(self) -> int:
        return self.stage.fleet.step

    def _now(self) -> int:
        return self.stage.fleet.recorder.now()

    def _write(self, record: Counted | Held | Asked | Fault) -> None:
        self.stage.fleet.recorder.write(record)

    def _note(self, topic: Any, text: str) -> None:
        self.stage.fleet.recorder.note(topic, text, self._step)


_STEPS: dict[type, Callable[[Actor, Any], None]] = {
    e.Launch: Actor.launch,
    e.Finish: Actor.finish,
    e.Mirror: Actor.mirror,
    e.Run: Actor.run,
    e.Count: Actor.count,
    e.Pause: Actor.pause,
    e.Migrate: Actor.migrate,
    e.Move: Actor.move,
    e.Join: Actor.join,
    e.Hold: Actor.hold,
    e.Ask: Actor.ask,
    e.Status: Actor.status,
    e.Observe: Actor.observe,
    e.Strike: Actor.strike,
    e.Close: Actor.close,
}
