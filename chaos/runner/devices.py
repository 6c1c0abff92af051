# SPDX-License-Identifier: Apache-2.0
"""Which VMs are created with a device.

Its descriptor has to be dead when the VM is, so a VM has one whose context is to be moved away. But since 6.5 closing
it takes the VM's lock (kvm_device_release() with the release() of kvm-vfio), which a move keeps that is stopped in the
kernel. A process that was killed would not end, and a close not return, before that move goes on: of a VM to which the
script does that, the device is left out. Nobody could ask it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from chaos.experiment import steps as s
from chaos.experiment.model import Experiment

MayEnd = Callable[[s.FaultStep], Collection[str]]
AnyStep = s.Step | s.MovesStep
VmPair = tuple[str, str]


def with_device(experiment: Experiment, ends: MayEnd) -> frozenset[str]:
    """The VMs of the experiment that get a device. `ends` says of a fault whose end it may be."""
    moved, gone = set[str](), set[str]()
    for step, under_way in _steps(experiment.script, ()):
        if not isinstance(step, s.MirrorStep):
            moved.update(source for source, _ in _takes(step))
        match step:
            case s.CloseStep():
                gone.update({step.vm} & {vm for pair in under_way for vm in pair})
            case s.FaultStep() if under_way:  # whoever makes a move ends with it: only the source's lock is another's
                dying = ends(step)
                gone.update(source for source, _ in under_way if experiment.vms[source].vmm in dying)
    return frozenset(moved - gone)


def _takes(step: AnyStep) -> tuple[VmPair, ...]:
    """(source, destination) of the moves and mirrors that the step itself makes."""
    match step:
        case s.MoveStep(source=str(source)) | s.MigrateStep(source=source):
            return ((source, step.destination),)
        case s.MirrorStep(source=str(source)):
            return ((source, step.vm),)
        case s.MovesStep():
            return tuple((source, step.destination) for source in step.sources)
        case s.TogetherStep():
            return tuple(pair for each in step.steps for pair in _takes(each))
    return ()


def _steps(script: Sequence[AnyStep], around: tuple[VmPair, ...]) -> Iterator[tuple[AnyStep, tuple[VmPair, ...]]]:
    """Every step, and which VMs may be locked then: those of a move that was not waited for, or of the step around."""
    pending: tuple[VmPair, ...] = ()
    for step in script:
        yield step, (*around, *pending)
        match step:
            case s.MoveStep(wait=False):
                pending += _takes(step)
            case s.JoinStep():
                pending = tuple(pair for pair in pending if pair[1] != step.vm)
            case s.TogetherStep():
                yield from _steps(step.meanwhile, _takes(step))
            case s.SweepStep():
                yield from _steps((*step.before, step.step, *step.refused, *step.after), ())
            case s.MigrateStep():
                for inner in step.before.values():
                    yield from _steps(inner, _takes(step))
