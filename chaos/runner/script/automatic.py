# SPDX-License-Identifier: Apache-2.0
"""What the runner asks by itself, so that an experiment says what is done and not what a checker wants to know.

    before   a step that moves, mirrors, pauses or closes: the counters; of the VMs that it is about how far the guest
             has come, or where it stands if it is paused, and the status of the context
    again    between two attempts of a migration: the same
    after    it: the same, and of a source, which is dead now or must not be, every descriptor
    last     once all faults are undone, what is owed, and the same of every VM that a move was about; a guest that was
             paused when it was to migrate, and still is, is let run: it must go on then

It asks where that disturbs nothing: no operation is under way or held, no hold is armed, no storm blows, and no fault
is applied that would answer in the kernel's stead (`Fault.DISTURBS`). What cannot be asked then is owed, and asked as
soon as it can be. Nor does it take a vCPU out of the guest that never leaves it by itself (`every: 0`): a move may be
about to wait for that one. What a step has asked is not asked again until something has changed.

That a question could not be put ends no run: whoever misses the answer says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from chaos.errors import SevchaosError
from chaos.experiment import steps as s
from chaos.history.records import QUESTION
from chaos.runner.guests import Guest
from chaos.runner.script import observe, running
from chaos.runner.script.executor import Executor
from chaos.runner.vmms import StepFailed

# So many that a guest which stands still is seen to, and few enough for a guest that leaves at each.
TICKS = 16
COUNT_WITHIN = 60.0

_ASKING = s.ObserveStep | s.StatusStep | s.AskStep | s.CountStep
_MOVING = s.MoveStep | s.MovesStep | s.MigrateStep | s.MirrorStep
_DISTURBING = s.ArmStep | s.FaultStep | s.StormStep


@dataclass(slots=True)
class AutomaticQuestions:
    """`wanted` unless the experiment asks alone. `asked` is when each question was put last, by its name and VM, in
    `OperationLog.changes`. `owed` are the VMs of steps that are over and were not asked about, `concerned` those of all
    that moved something, both in order; `sources` are those among them that something was taken of, `stood` those whose
    guest was paused when a migration of it was over. `over` is the step that is owed for. What is asked goes into the
    history as that step's."""

    executor: Executor
    wanted: bool
    asked: dict[tuple[str, str], int] = field(default_factory=dict)
    owed: dict[str, None] = field(default_factory=dict)
    concerned: dict[str, None] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    stood: dict[str, None] = field(default_factory=dict)
    over: int = 0

    def __post_init__(self) -> None:
        self.executor.between = self._between

    def before(self, script: tuple[s.Step, ...], number: int) -> None:
        """Step `number` is about to be carried out."""
        step = script[number]
        if isinstance(step, _ASKING) or not self.wanted:
            return
        self._settle()
        upcoming = number
        if isinstance(step, _DISTURBING):  # then this is the last moment at which that move's VMs can be asked
            later = (n for n, each in enumerate(script) if n > number and any(_moved(each)))
            upcoming = next(later, number)
        subjects = dict.fromkeys(_subjects(script[upcoming]))
        if subjects and self._quiet():
            with self._about(number):
                if not isinstance(step, s.PauseStep):
                    self._observe(f"before-{upcoming}")
                self._ask_each(subjects, status=any(_moved(script[upcoming])))

    def _between(self, step: s.MigrateStep) -> None:
        if self.wanted and self._quiet():
            with self._about(self.executor.log.step):
                self._observe(f"again-{self.executor.log.step}")
                self._ask_each(_both(step), status=True)

    def carried_out(self, number: int, step: s.Step) -> None:
        """Also if it failed."""
        if isinstance(step, _ASKING):
            self._note(step.__struct_config__.tag, "" if isinstance(step, s.ObserveStep) else step.vm)
        subjects = dict.fromkeys(_subjects(step))
        if subjects and not isinstance(step, s.PauseStep):
            self.owed |= subjects
            self.over = number
        if any(_moved(step)):
            self.concerned |= subjects
            self.sources |= set(_moved(step))
        if isinstance(step, s.MigrateStep):
            self.stood |= {vm: None for vm in subjects if self.executor.guests[vm].paused}

    def last(self) -> None:
        """Everything is undone, and nothing closed yet."""
        if self.wanted and self._quiet():
            self._settle()
            dead = self.executor.log.moved_from  # who are asked once more when all guests are out
            self.owed = {vm: None for vm in self.concerned if vm not in dead}
            self.over = self.executor.log.step
            self._settle()
            with self._about(self.over):
                for vm in map(self.executor.guests.__getitem__, self.stood):
                    self._let_run(vm)

    def _settle(self) -> None:
        """Ask what is owed, if it can be asked now."""
        if not self.owed or not self._quiet():
            return
        owed, self.owed = self.owed, {}
        with self._about(self.over):
            self._observe(f"after-{self.over}")
            for vm in map(self.executor.guests.__getitem__, owed):
                self._count(vm)
                if vm.name in self.concerned:
                    self._status(vm)
                if vm.name in self.sources and vm.every != 0:
                    self._ask(vm)

    @contextlib.contextmanager
    def _about(self, step: int) -> Iterator[None]:
        """What is asked inside is recorded as asked about this step."""
        log = self.executor.log
        at, log.step, log.phase = log.step, step, QUESTION
        try:
            yield
        finally:
            log.step, log.phase = at, ""

    def _quiet(self) -> bool:
        """Whether a question would neither disturb anything nor be disturbed."""
        executor = self.executor
        under_way = [p for vmm in executor.vmms.named.values() for p in vmm.pending.values() if p.recorded]
        storms = any(vm.before_close is not None or vm.kept_out for vm in executor.guests.all)
        disturbed = any(a.fault.disturbs and not (a.withheld or a.undone) for a in executor.applied)
        return not (under_way or storms or disturbed or executor.armed or executor.ctx.firmware.may_stall)

    # -- the questions ------------------------------------------------------------------------------------

    def _ask_each(self, vms: Iterable[str], *, status: bool) -> None:
        for vm in map(self.executor.guests.__getitem__, vms):
            self._count(vm)
            if status:
                self._status(vm)

    def _observe(self, label: str) -> None:
        if self._is_new("observe"):
            self._guarded("observe", lambda: self.executor.observer.observe(label, self.executor.log.step))
            self._note("observe")

    def _count(self, vm: Guest) -> None:
        if vm.running and vm.every:
            step = s.CountStep(vm=vm.name, ticks=TICKS, within=COUNT_WITHIN)
            self._put("count", vm, lambda: running.count(self.executor, step))
        elif vm.paused and vm.name not in self.executor.log.moved_from and not self.executor.guests.is_es(vm):
            self._put("count", vm, lambda: running.look_at_paused(self.executor, vm))

    def _let_run(self, vm: Guest) -> None:
        """Whoever paused it has no more steps to want that for."""
        stands = vm.paused and vm.created and vm.vmm.alive and vm.name not in self.executor.log.moved_from
        if stands and self.executor.guests.may_run(vm):
            self._guarded(f"run of {vm.name}", lambda: running.run(self.executor, s.RunStep(vm=vm.name)))
            self._count(vm)

    def _status(self, vm: Guest) -> None:
        if vm.name not in self.executor.log.moved_from:  # that of the dead is among what `ask` asks
            self._put("status", vm, lambda: observe.status(self.executor, s.StatusStep(vm=vm.name)))

    def _ask(self, vm: Guest) -> None:
        self._put("ask", vm, lambda: observe.ask(self.executor, s.AskStep(vm=vm.name)))

    def _put(self, question: str, vm: Guest, put: Callable[[], None]) -> None:
        if vm.created and vm.vmm.alive and self._is_new(question, vm.name):
            self._guarded(f"{question} of {vm.name}", put)
            self._note(question, vm.name)

    def _guarded(self, what: str, put: Callable[[], object]) -> None:
        try:
            put()
        except (StepFailed, SevchaosError, OSError) as error:
            self.executor.note("progress", f"{what}, which no step asked for: {error}")

    def _is_new(self, question: str, vm: str = "") -> bool:
        return self.asked.get((question, vm)) != self.executor.log.changes

    def _note(self, question: object, vm: str = "") -> None:
        self.asked[str(question), vm] = self.executor.log.changes


def _subjects(step: s.Step) -> tuple[str, ...]:
    """The VMs that the step moves something from or to, or which it takes out of the guest or closes."""
    if isinstance(step, s.PauseStep | s.CloseStep):
        return (step.vm,)
    return tuple(vm for _, inner in s.walk((step,)) if isinstance(inner, _MOVING) for vm in _both(inner))


def _moved(step: s.Step) -> tuple[str, ...]:
    """The VMs that the step takes a context from, or makes a mirror of."""
    return tuple(vm for _, inner in s.walk((step,)) if isinstance(inner, _MOVING) for vm in _both(inner)[:-1])


def _both(step: _MOVING) -> tuple[str, ...]:
    """The VMs that it takes from, and that which takes."""
    match step:
        case s.MovesStep():
            return (*step.sources, step.destination)
        case s.MirrorStep():
            return (*filter(None, (step.source,)), step.vm)
        case s.MigrateStep():
            return step.source, step.destination
    return (*filter(None, (step.source,)), step.destination)
