# SPDX-License-Identifier: Apache-2.0
"""What no type can say of an experiment: whether the names in it refer to something, and its parts fit together."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from chaos import fault
from chaos.errors import UsageError
from chaos.experiment.model import Experiment, Kernels
from chaos.experiment.steps import (
    UNARMED,
    ArmStep,
    CallStep,
    CommandStep,
    DebugStep,
    FaultStep,
    HoldStep,
    InitStep,
    InterruptsStep,
    IoeventfdStep,
    IrqfdStep,
    LaunchStep,
    MigrateStep,
    MirrorStep,
    MovesStep,
    ObserveStep,
    Part,
    PlatformStep,
    ReleaseStep,
    RunStep,
    SignalStep,
    Step,
    SweepStep,
    TakingStep,
    TogetherStep,
    UndoStep,
    each_of,
    places,
    walk,
)
from chaos.fault import Target
from chaos.history.reading import NEW_KEYS
from chaos.kinds import TYPES, Kind
from chaos.linux.version import order
from chaos.promises import PROMISES

FEATURES = (1 << 64) - 1
COMMANDS = 256  # that one step may try
MOVES = 1 << 17  # of one loop, which are 3 MB of records
GSIS = range(32, 256)  # a GSI raises the vector of its number, and those below are exceptions
PORTS = range(0x20, 0x60)  # of those below the guest uses three


def problems(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """What the schema cannot say: references. Yields place, problem, remedy."""
    known = ", ".join(PROMISES)
    named = {"promises": experiment.promises, "unaskable": experiment.unaskable}
    for key, promise in ((key, promise) for key, promises in named.items() for promise in promises):
        if promise not in PROMISES:
            yield key, f"there is no promise {promise!r}", f"the promises are {known}"
    if not experiment.promises:
        yield "promises", "it puts no promise to the test", f"name at least one of {known}"
    yield from _misplaced(experiment)
    if experiment.kernels is not None:
        yield from _no_kernel(experiment.kernels)
    if not experiment.script:
        yield "script", "it has no steps", "give at least one step"
    armed: set[str] = {*UNARMED}
    for place, step in places(experiment.script):
        for field, problem, remedy in _step_problems(experiment, step, armed):
            yield f"{place}.{field}", problem, remedy
        if isinstance(step, ArmStep):
            armed.add(step.hold)


def _misplaced(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """VMs of no VMM, and VMMs in a cgroup in which the kernel lets none live."""
    vmms = ", ".join(experiment.vmms)
    for name, vm in experiment.vms.items():
        if vm.vmm not in experiment.vmms:
            yield f"vms.{name}.vmm", f"there is no VMM {vm.vmm!r}", f"the VMMs are {vmms}"
        fits = TYPES.get(vm.kind, vm.type)
        if vm.type not in (0, fits):
            yield f"vms.{name}.type", f"a {vm.kind.value} guest cannot have type {vm.type}", f"give {fits}, or 0"
    for path in sorted(experiment.groups):
        lived_in = [name for name, vmm in experiment.vmms.items() if vmm.cgroup == path]
        below = [other for other in experiment.groups if other.startswith(f"{path}/")]
        if lived_in and below and experiment.groups[path].misc:
            problem = f"{lived_in[0]} cannot live in {path!r}, whose children ({below[0]}) have the misc controller"
            yield f"vmms.{lived_in[0]}.cgroup", problem, f"put it below, or give cgroup {path!r} misc: false"


def _no_kernel(kernels: Kernels) -> Iterator[tuple[str, str, str]]:
    since, before = kernels.since, kernels.before
    if not (since or before):
        yield "kernels", "it names no kernel", "give since or before, or leave it out"
    elif since and before and order(since) >= order(before):
        yield "kernels.before", f"no kernel is since {since} and before {before}", "exchange them"


def _step_problems(
    experiment: Experiment, step: Step | MovesStep, armed: Collection[str]
) -> Iterator[tuple[str, str, str]]:
    """The same of a step. Yields key, problem, remedy."""
    yield from _references(experiment, step)
    yield from _argument_problems(step)
    yield from _interrupt_problems(experiment, step)
    match step:
        case FaultStep():
            yield from _fault_problems(experiment, step)
        case MigrateStep():
            yield from _migration_problems(experiment, step)
        case UndoStep():
            applied_steps = (other for _, other in walk(experiment.script) if isinstance(other, FaultStep))
            applied = sorted({(step.fault, step.target) for step in applied_steps})
            if (step.fault, step.target) not in applied:
                given = ", ".join(f"{name} to {target or 'the host'}" for name, target in applied) or "none at all"
                yield "fault", f"no step applies {step.fault!r} to {step.target!r}", f"what is applied: {given}"
        case LaunchStep() if step.vm in experiment.vms and experiment.vms[step.vm].kind is Kind.MIRROR:
            yield "vm", f"{step.vm} is a mirror, which is not launched", "use the step `mirror`"
        case ObserveStep(label="start" | "end"):
            yield "label", f"{step.label!r} is what the run itself observes", "give it another name"
        case ArmStep():
            places = [name for name in ("kernel", "firmware", "page") if getattr(step, name) is not None]
            if len(places) != 1:
                yield "hold", f"{len(places)} places are given", "give one of kernel, firmware and page"
            for place in places:
                for field, problem, remedy in _references(experiment, getattr(step, place)):
                    yield f"{place}.{field}", problem, remedy
        case HoldStep() if step.at not in armed:
            yield "at", f"no hold {step.at!r} is armed before", f"arm it, or give one of {', '.join(sorted(armed))}"
        case ReleaseStep() if step.hold not in armed:
            yield "hold", f"no hold {step.hold!r} is armed before", "arm it with the step `arm`"


def _interrupt_problems(experiment: Experiment, step: Step | MovesStep) -> Iterator[tuple[str, str, str]]:
    match step:
        case IrqfdStep() | InterruptsStep() if step.vm in experiment.vms and not experiment.vcpus(step.vm):
            yield "vm", f"{step.vm} has no vCPU that could be interrupted", "give it one"
    match step:
        case IrqfdStep() | SignalStep():
            yield from _range_problems("gsis", step.gsis, GSIS)
        case IoeventfdStep():
            yield from _range_problems("ports", step.ports, PORTS)


def _argument_problems(step: Step | MovesStep) -> Iterator[tuple[str, str, str]]:
    """What does not hang on the experiment."""
    match step:
        case TakingStep() if (step.source is None) == (step.fd is None):
            yield "source", "a VM and a wrong descriptor" if step.fd else "nothing to take", "give source, or fd"
        case CallStep() if step.read_only and step.operation != "launch_start":
            yield "read_only", f"{step.operation} has no arguments that are written", "leave it out"
        case InitStep() if step.features > FEATURES:
            yield "features", f"{step.features:#x} has more than 64 bits", f"give at most {FEATURES:#x}"
        case CommandStep() if not 0 < len(step.numbers) <= COMMANDS:
            yield "ids", f"{step.ids} are {len(step.numbers)} commands", f"give 1 to {COMMANDS}"
        case DebugStep() if not 0 < len(step.each) <= COMMANDS:
            yield "length", f"these are {len(step.each)} commands", f"give 1 to {COMMANDS}"
        case PlatformStep(command="PLATFORM_STATUS") if step.length or step.chain:
            yield "length", "PLATFORM_STATUS has a buffer of its own size", "leave the lengths out"
        case PlatformStep() if step.command in NEW_KEYS and (step.length or step.chain):
            yield "length", f"{step.command} has no buffer", "leave the lengths out"
        case PlatformStep() if step.chain and step.command != "PDH_CERT_EXPORT":
            yield "chain", f"{step.command} gives no chain of certificates", "leave it out"
        case RunStep() if step.every & (step.every - 1):
            yield "every", f"{step.every} is no power of two", "give 1, 2, 4, … or 0 for never"
        case MovesStep() if step.calls > MOVES:
            yield "rounds", f"these are {step.calls} moves", f"at most {MOVES} are recorded: give fewer"
        case TogetherStep():
            yield from _together_problems(step)
        case SweepStep():
            yield from _sweep_problems(step)


def _sweep_problems(sweep: SweepStep) -> Iterator[tuple[str, str, str]]:
    match sweep.step:
        case step if not getattr(step, "wait", True):
            yield "step", "an operation that is left under way cannot be swept", "wait for it"
        case DebugStep(each=commands) if len(commands) != 1:
            yield "step", f"these are {len(commands)} commands", "sweep one of them"
        case InitStep(each=str(each)):
            yield "step", f"an INIT for each bit of the {each} is many operations", "sweep one of them"
        case RunStep(every=0):
            yield "step", "a guest that never leaves would never be let go of", "give every: 1"
        case MigrateStep(supervise="retry"):
            yield "step", "a sweep makes what was refused once more by itself", "leave supervise out"


def _range_problems(key: str, given: str, allowed: range) -> Iterator[tuple[str, str, str]]:
    numbers = each_of(given)
    if not numbers or not {*numbers} <= {*allowed}:
        first, last = allowed[0], allowed[-1]
        yield key, f"{given} are not all among {first} to {last}", f"give some of {first}-{last}"


def _together_problems(step: TogetherStep) -> Iterator[tuple[str, str, str]]:
    vms = [inner.vm if isinstance(inner, MirrorStep) else inner.destination for inner in step.steps]
    twice = next((vm for vm in vms if vms.count(vm) > 1), None)
    if twice is not None:
        yield "steps", f"{twice} makes two of the operations", "give each another, or a loop more threads"
    for inner in step.meanwhile:
        if isinstance(inner, TogetherStep):
            yield "meanwhile", "operations that begin together are under way already", "add them to `steps`"
        if isinstance(inner, ObserveStep) and any(isinstance(other, MovesStep) for other in step.steps):
            # A move that fails may have been charged for an instant, and nobody knows when each of thousands did.
            yield "meanwhile", "counters that are read during a loop of moves tell nothing", "observe before and after"


def _migration_problems(experiment: Experiment, step: MigrateStep) -> Iterator[tuple[str, str, str]]:
    if len({vm.vmm for name, vm in experiment.vms.items() if name in (step.source, step.destination)}) == 1:
        problem = f"{step.source} and {step.destination} belong to one VMM, which hands nothing over to itself"
        yield "destination", problem, "name a VM of another VMM, or use the step `move`"


def _references(experiment: Experiment, part: Part) -> Iterator[tuple[str, str, str]]:
    """VMs and VMMs that are named and are not there."""
    vmms, vms = ", ".join(experiment.vmms), ", ".join(experiment.vms)
    for name in getattr(part, "sources", ()):
        if name not in experiment.vms:
            yield "sources", f"there is no VM {name!r}", f"the VMs are {vms}"
    for field in ("vm", "of", "source", "destination", "vmm"):
        value = getattr(part, field, None)
        allowed, kind = (vmms, "VMM") if field == "vmm" else (vms, "VM")
        if value is not None and value not in (experiment.vmms if field == "vmm" else experiment.vms):
            yield field, f"there is no {kind} {value!r}", f"the {kind}s are {allowed}"


_TARGETS: dict[Target, str] = {
    "vmm": "a VMM",
    "vm": "a VM",
    "cgroup": "a cgroup",
    "link": "the links of a VMM that migrates",
    "host": "the host, which has no name",
    "caller": "a VMM, or without a name whoever calls",
}


def _fault_problems(experiment: Experiment, step: FaultStep) -> Iterator[tuple[str, str, str]]:
    key = "fault"
    try:
        fault.load(step.fault)
        key = "options"
        found = fault.find(step.fault, step.options)
    except UsageError as error:
        yield key, error.message, error.remedy
        return
    for option, kind in found.NAMES.items():
        given, known = getattr(found, option), experiment.names(kind)
        if given not in known:
            yield f"options.{option}", f"there is no {kind} {given!r}", f"give one of {', '.join(sorted(known))}"
    target = found.TARGET
    allowed = experiment.names(target)
    if step.target not in allowed:
        given = repr(step.target) if step.target else "nothing"
        problem = f"{step.fault} strikes {_TARGETS[target]}, not {given}"
        yield "target", problem, f"give one of {', '.join(sorted(allowed))}"
