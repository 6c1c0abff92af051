# SPDX-License-Identifier: Apache-2.0
"""Carrying out a script, step by step.

A step is a function of the executor; the table below says which is whose. Operations that the kernel refuses are
answers, and the script goes on: what they mean is for the checkers. What makes the rest of a script meaningless (a
launch that fails, a guest that does not count, a hold that is not reached) raises `StepFailed`.
"""

from __future__ import annotations

from chaos.errors import Unsupported
from chaos.experiment import steps as s
from chaos.fault import FaultContext, find, naming_successors
from chaos.runner.script import (
    concurrent,
    drivers,
    faults,
    holds,
    interrupts,
    moves,
    observe,
    running,
    storms,
    sweeps,
    vms,
)
from chaos.runner.script.automatic import AutomaticQuestions
from chaos.runner.script.executor import Executor, Handlers
from chaos.runner.vmms import StepFailed

STEPS: Handlers = {
    s.LaunchStep: vms.launch,
    s.CreateStep: vms.create,
    s.CallStep: vms.call,
    s.InitStep: vms.init,
    s.VcpuStep: vms.vcpu,
    s.CommandStep: vms.command,
    s.DebugStep: vms.debug,
    s.PlatformStep: vms.platform,
    s.ReloadStep: drivers.reload,
    s.FinishStep: vms.finish,
    s.MirrorStep: vms.mirror,
    s.CloseStep: vms.close,
    s.RunStep: running.run,
    s.CountStep: running.count,
    s.PauseStep: running.pause,
    s.StormStep: storms.storm,
    s.CalmStep: storms.calm,
    s.IrqfdStep: interrupts.irqfd,
    s.IoeventfdStep: interrupts.ioeventfd,
    s.SignalStep: interrupts.signal,
    s.InterruptsStep: interrupts.interrupts,
    s.MemslotStep: interrupts.memslot,
    s.MigrateStep: moves.migrate,
    s.MoveStep: moves.move,
    s.TogetherStep: concurrent.together,
    s.JoinStep: moves.join,
    s.ArmStep: holds.arm,
    s.HoldStep: holds.hold,
    s.ReleaseStep: holds.release,
    s.AskStep: observe.ask,
    s.StatusStep: observe.status,
    s.ObserveStep: observe.observe,
    s.FaultStep: faults.apply,
    s.UndoStep: faults.undo,
    s.SweepStep: sweeps.sweep,
}


def perform(executor: Executor, script: tuple[s.Step, ...], questions: AutomaticQuestions) -> None:
    """Carry a script out. Raises `StepFailed`, having said which step it was."""
    for number, step in enumerate(script):
        executor.log.step = number
        questions.before(script, number)
        try:
            executor.carry_out(step)
        except StepFailed as failed:
            name = step.__struct_config__.tag
            raise StepFailed(f"step {number} ({name}): {failed}", step=number) from failed
        finally:
            questions.carried_out(number, step)
    executor.log.step = len(script)


def require_all(script: tuple[s.Step, ...], ctx: FaultContext) -> None:
    """Whether the host can do what the script's faults and holds want, and may have it done to it: on a shared one
    nothing is touched that others need. Raises `Unsupported`, `UsageError`."""
    shared = ctx.shared
    if shared and (mirror := moved_mirror(script)):
        raise _theirs_too(f"a move of the mirror {mirror} may cost the host an ASID until its next boot (finding 0004)")
    for _, step in s.walk(script):
        if isinstance(step, s.FaultStep):
            fault = find(step.fault, step.options)
            if shared and not step.target:
                raise _theirs_too(f"the fault {step.fault} strikes the whole host")
            with naming_successors(ctx):
                fault.require(ctx, step.target)
        elif isinstance(step, s.PlatformStep) and shared:
            raise _theirs_too(f"{step.command} of /dev/sev may cost a host SEV until its next boot (finding 0010)")
        elif isinstance(step, s.ReloadStep):
            _lab_alone(ctx, "the drivers of a machine of somebody's own are not ours to load anew")
        elif isinstance(step, s.DebugStep):
            wrong = f"{step.operation} may have the firmware write into other memory of the host's (finding 0011)"
            _lab_alone(ctx, wrong)
        elif isinstance(step, s.SweepStep):
            ctx.let_points_fail()
        elif isinstance(step, s.ArmStep):
            if shared and step.kernel is not None and step.kernel.vmm is None:
                raise _theirs_too(f"the hold {step.hold} stops whoever calls {step.kernel.function}")
            holds.require(ctx, step)


def _lab_alone(ctx: FaultContext, wrong: str) -> None:
    """For what nobody else's machine can do with. Raises `Unsupported`, with what would be wrong."""
    try:
        ctx.firmware.require()
    except Unsupported as error:
        raise Unsupported(wrong, remedy="use the lab") from error


def moved_mirror(script: tuple[s.Step, ...]) -> str:
    """A mirror that is to be moved, "" if none is."""
    mirrors: set[str] = set()
    for _, step in s.walk(script):
        match step:
            case s.MirrorStep(vm=vm):
                mirrors.add(vm)
            case s.MoveStep(source=str(source)) | s.MigrateStep(source=source) if source in mirrors:
                return source
            case s.MovesStep(sources=sources) if mirrors & set(sources):
                return min(mirrors & set(sources))
    return ""


def _theirs_too(what: str) -> Unsupported:
    return Unsupported(f"{what}, and this one is shared with others", remedy="use a host of its own, or the lab")
