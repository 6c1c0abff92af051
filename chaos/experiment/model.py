# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: pure data, with a schema, loaded from YAML and never executed.

An experiment names its VMMs (processes, each in a cgroup of its own name below the run's), its VMs, and a script of
steps. A VM belongs to one VMM; VMs that share a `memory` are the two ends of a migration of one guest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from chaos import convert, fault
from chaos.errors import UsageError
from chaos.experiment import yamlfile
from chaos.experiment.steps import (
    UNARMED,
    Arm,
    Command,
    Count,
    Hold,
    Init,
    InitCommand,
    Launch,
    Migrate,
    Mirror,
    Moves,
    Name,
    Observe,
    Part,
    Pause,
    Release,
    Run,
    Step,
    Strike,
    Taking,
    Together,
    Undo,
    Vcpu,
    places,
    walk,
)
from chaos.fault import Target
from chaos.judge.verdict import PROMISES

P = TypeVar("P", bound=Part)
_LEVEL = r"[a-z][a-z0-9-]{0,40}"
GroupPath = Annotated[
    str, msgspec.Meta(pattern=rf"^{_LEVEL}(/{_LEVEL}){{0,15}}$", description="a cgroup below the run's: a or a/b")
]


class Kind(StrEnum):
    """What is launched in a VM. PLAIN is no context: the destination of a move. MIRROR has none either, nor vCPUs,
    until it becomes the mirror of another VM."""

    SEV = "sev"
    SEV_ES = "sev-es"
    PLAIN = "plain"
    MIRROR = "mirror"

    @property
    def owns(self) -> bool:
        """Whether it is launched with a context of its own."""
        return self in (Kind.SEV, Kind.SEV_ES)

    @property
    def key(self) -> str:
        """Under which key of the misc controller it is charged, if it owns a context."""
        return self.value.replace("-", "_")


FEATURES = (1 << 64) - 1
COMMANDS = 256  # that one step may try
MOVES = 1 << 17  # of one loop, which are 3 MB of records
_SAID_MOST = 700  # characters of what is wrong, and of what to do about it

# What INIT2 makes of a VM hangs on its type alone. A plain VM may have any: it is given its context by a move.
TYPES = {Kind.SEV: 2, Kind.SEV_ES: 3}


class Group(Part, frozen=True, kw_only=True):
    """A cgroup. `max` is what its misc.max is set to, by key, before anything lives in it. With `misc` off the cgroups
    below it have no misc controller, so that they all are this one to it."""

    max: dict[Literal["sev", "sev_es"], Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]] = msgspec.field(
        default_factory=dict
    )
    misc: bool = True


class Vmm(Part, frozen=True, kw_only=True):
    """A VMM process, in this cgroup below the run's."""

    cgroup: GroupPath


class Vm(Part, frozen=True, kw_only=True):
    """A VM of `vmm`. `memory` names the guest memory that it maps. `type` is what it is created as: 0 is given its
    kind by KVM_SEV_INIT or ES_INIT; 2 (SEV) and 3 (SEV-ES), since 6.10, by KVM_SEV_INIT2. A context moves between
    VMs of one type only. `vcpus` are those that it gets by itself, with the ids from 0 on."""

    vmm: Name
    kind: Kind
    memory: Name = "guest"
    vcpus: Annotated[int, msgspec.Meta(ge=0, le=16)] = 1
    type: Literal[0, 2, 3] = 0


class Unaskable(Part, frozen=True, kw_only=True):
    """Why a promise is unknown, as the verdict's `signature` has it, to the letter; and that in words."""

    signature: Annotated[str, msgspec.Meta(min_length=1)]
    why: str


class Experiment(Part, frozen=True, kw_only=True):
    """`why` says in two sentences why anyone should care. `promises` are those it puts to the test. `unaskable`
    names promises whose question this experiment cannot ask, each with the reason; they end unknown all the same, and
    for any other reason they count.
    `cgroups` says more of some; there are also those that a VMM lives in, and all above them."""

    name: Name
    why: str
    promises: tuple[str, ...]
    vmms: dict[Name, Vmm]
    vms: dict[Name, Vm]
    script: tuple[Step, ...]
    unaskable: dict[str, Unaskable] = msgspec.field(default_factory=dict)
    cgroups: dict[GroupPath, Group] = msgspec.field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the misc controller that it needs capacity of."""
        inits = (step for _, step in walk(self.script) if isinstance(step, Init) and step.vm in self.vms)
        tried = {key_of_init(self.vms[step.vm], step.command) for step in inits}
        return frozenset({*tried, *(vm.kind.key for vm in self.vms.values() if vm.kind.owns)})

    def vcpus(self, vm: str) -> int:
        """How many it may come to have."""
        added = sum(isinstance(step, Vcpu) and step.vm == vm for _, step in walk(self.script))
        return self.vms[vm].vcpus + added

    @property
    def handovers(self) -> tuple[tuple[str, str], ...]:
        """From which VMM to which a guest is handed over, in the order of the script."""
        migrations = (step for _, step in walk(self.script) if isinstance(step, Migrate))
        return tuple((self.vms[step.source].vmm, self.vms[step.destination].vmm) for step in migrations)

    @property
    def groups(self) -> dict[str, Group]:
        """Every cgroup below the run's, parents before children."""
        paths = {*self.cgroups, *(vmm.cgroup for vmm in self.vmms.values())}
        above = {path.rsplit("/", depth)[0] for path in paths for depth in range(path.count("/") + 1)}
        return {path: self.cgroups.get(path, Group()) for path in sorted(above)}

    def names(self, target: Target) -> frozenset[str]:
        """What a fault of this target can be applied to. The run's own cgroup is "."; the host has no name."""
        match target:
            case "vmm":
                return frozenset(self.vmms)
            case "vm":
                return frozenset(self.vms)
            case "cgroup":
                return frozenset({".", *self.groups})
            case "link":
                return frozenset(vmm for pair in self.handovers for vmm in pair)
            case "host":
                return frozenset({""})
            case "caller":
                return frozenset({"", *self.vmms})

    @property
    def types(self) -> frozenset[int]:
        """Types of VM that it needs the kernel to know."""
        return frozenset(vm.type for vm in self.vms.values())


def default_command(vm: Vm) -> InitCommand:
    """The INIT that the VM's type and kind ask for."""
    if vm.type:
        return "init2"
    return "es-init" if vm.kind is Kind.SEV_ES else "init"


def key_of_init(vm: Vm, command: InitCommand | None) -> str:
    """Under which key what this INIT makes of the VM is charged, if the kernel lets it."""
    command = command or default_command(vm)
    es = vm.type == TYPES[Kind.SEV_ES] if command == "init2" else command == "es-init"
    return (Kind.SEV_ES if es else Kind.SEV).key


class Likeness(Part, frozen=True, kw_only=True):
    """A file that says: as the experiment of the file `like` beside it, with other guests. What is launched as SEV is
    of `kind`, every VM is of `type`, and all but mirrors have `vcpus` if that is given. The others are as there, unless
    they are given too. A SEV-ES guest has no way to tell how far it has come (`chaos.vmm.guest`), so it is not run."""

    name: Name
    why: str
    like: Name
    kind: Literal["sev", "sev-es"] = "sev"
    type: Literal[0, 2, 3] = 0
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None
    promises: tuple[str, ...] | None = None
    unaskable: dict[str, Unaskable] | None = None

    def of(self, other: Experiment) -> Experiment:
        """The experiment."""
        changes = {field: getattr(self, field) for field in ("promises", "unaskable")}
        return msgspec.structs.replace(
            other,
            name=self.name,
            why=self.why,
            vms={name: self._vm(vm) for name, vm in other.vms.items()},
            script=_unrun(other.script) if self.kind == "sev-es" else other.script,
            **{field: value for field, value in changes.items() if value is not None},
        )

    def _vm(self, vm: Vm) -> Vm:
        return msgspec.structs.replace(
            vm,
            kind=Kind(self.kind) if vm.kind is Kind.SEV else vm.kind,
            type=self.type,
            vcpus=self.vcpus if self.vcpus is not None and vm.kind is not Kind.MIRROR else vm.vcpus,
        )


def _unrun(script: tuple[Step, ...]) -> tuple[Step, ...]:
    """The script without what lets a guest run."""
    kept = (step for step in script if not isinstance(step, Run | Count | Pause))
    return tuple(
        msgspec.structs.replace(step, before={phase: _unrun(inner) for phase, inner in step.before.items()})
        if isinstance(step, Migrate)
        else step
        for step in kept
    )


class Order(Part, frozen=True, kw_only=True):
    """What a runner reads, one JSON object a line: carry this out. `seed` is the run's only source of chance. Faults of
    the names in `withhold` are not applied, to see that they leave no evidence then. With `shared` it is done although
    other SEV guests live on the host, and nothing is struck that is theirs too."""

    experiment: Experiment
    seed: int
    host: Literal["lab", "local"]
    withhold: frozenset[str] = frozenset()
    shared: bool = False


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Experiment)


def encode(experiment: Experiment) -> bytes:
    return _encoder.encode(experiment)


def decode(data: bytes) -> Experiment:
    """The inverse of `encode`, for the runner; a file goes through `load`."""
    return _decoder.decode(data)


def load(path: Path) -> Experiment:
    """Read and check an experiment file. Raises `UsageError` naming file, key, value and what is allowed."""
    data = _read(path)
    likened = isinstance(data, dict) and "like" in data
    experiment = _like(path, data) if likened else _converted(path, data, Experiment)
    for where, problem, remedy in _problems(experiment):
        raise _refusal(path, f"{where}: {problem}", remedy)
    return experiment


def _refusal(path: Path, said: str, remedy: str) -> UsageError:
    """Of one screen, whatever the file holds."""
    said, remedy = (text if len(text) <= _SAID_MOST else f"{text[:_SAID_MOST]}…" for text in (said, remedy))
    return UsageError(f"{path}: {said}", remedy=remedy)


def _like(path: Path, data: object) -> Experiment:
    likeness = _converted(path, data, Likeness)
    other = path.with_name(f"{likeness.like}.yaml")
    if not other.is_file():
        raise UsageError(
            f"{path}: like: there is no {other.name} beside it", remedy="name an experiment of this folder"
        )
    found = _read(other)
    if isinstance(found, dict) and "like" in found:
        raise UsageError(f"{path}: like: {likeness.like} is like another one itself", remedy="name that other one")
    return likeness.of(_converted(other, found, Experiment))


def _read(path: Path) -> Any:
    return yamlfile.read(path, remedy="`sevchaos list` names the experiments; of a file give the path")


def _converted(path: Path, data: object, structure: type[P]) -> P:
    try:
        return convert.convert(data, structure)
    except convert.Wrong as wrong:
        allowed = f"give {wrong.allowed}; " if wrong.allowed else ""
        said = str(wrong) if wrong.key else f"the file: {wrong}"
        raise _refusal(path, said, f"{allowed}docs/experiments.md says more") from wrong


def _problems(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """What the schema cannot say: references. Yields place, problem, remedy."""
    known = ", ".join(PROMISES)
    named = {"promises": experiment.promises, "unaskable": experiment.unaskable}
    for key, promise in ((key, promise) for key, promises in named.items() for promise in promises):
        if promise not in PROMISES:
            yield key, f"there is no promise {promise!r}", f"the promises are {known}"
    if not experiment.promises:
        yield "promises", "it puts no promise to the test", f"name at least one of {known}"
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
    if not experiment.script:
        yield "script", "it has no steps", "give at least one step"
    armed: set[str] = {*UNARMED}
    for place, step in places(experiment.script):
        for field, problem, remedy in _step_problems(experiment, step, armed):
            yield f"{place}.{field}", problem, remedy
        if isinstance(step, Arm):
            armed.add(step.hold)


def _step_problems(
    experiment: Experiment, step: Step | Moves, armed: Collection[str]
) -> Iterator[tuple[str, str, str]]:
    """The same of a step. Yields key, problem, remedy."""
    yield from _references(experiment, step)
    yield from _argument_problems(step)
    match step:
        case Strike():
            yield from _fault_problems(experiment, step)
        case Migrate():
            yield from _migration_problems(experiment, step)
        case Undo():
            strikes = (other for _, other in walk(experiment.script) if isinstance(other, Strike))
            applied = sorted({(strike.fault, strike.target) for strike in strikes})
            if (step.fault, step.target) not in applied:
                given = ", ".join(f"{name} to {target or 'the host'}" for name, target in applied) or "none at all"
                yield "fault", f"no step applies {step.fault!r} to {step.target!r}", f"what is applied: {given}"
        case Launch() if step.vm in experiment.vms and experiment.vms[step.vm].kind is Kind.MIRROR:
            yield "vm", f"{step.vm} is a mirror, which is not launched", "use the step `mirror`"
        case Observe(label="start" | "end"):
            yield "label", f"{step.label!r} is what the run itself observes", "give it another name"
        case Arm():
            places = [name for name in ("kernel", "firmware", "page") if getattr(step, name) is not None]
            if len(places) != 1:
                yield "hold", f"{len(places)} places are given", "give one of kernel, firmware and page"
            for place in places:
                for field, problem, remedy in _references(experiment, getattr(step, place)):
                    yield f"{place}.{field}", problem, remedy
        case Hold() if step.at not in armed:
            yield "at", f"no hold {step.at!r} is armed before", f"arm it, or give one of {', '.join(sorted(armed))}"
        case Release() if step.hold not in armed:
            yield "hold", f"no hold {step.hold!r} is armed before", "arm it with the step `arm`"


def _argument_problems(step: Step | Moves) -> Iterator[tuple[str, str, str]]:
    """What does not hang on the experiment."""
    match step:
        case Taking() if (step.source is None) == (step.fd is None):
            yield "source", "a VM and a wrong descriptor" if step.fd else "nothing to take", "give source, or fd"
        case Init() if step.features > FEATURES:
            yield "features", f"{step.features:#x} has more than 64 bits", f"give at most {FEATURES:#x}"
        case Command() if not 0 < len(step.numbers) <= COMMANDS:
            yield "ids", f"{step.ids} are {len(step.numbers)} commands", f"give 1 to {COMMANDS}"
        case Run() if step.every & (step.every - 1):
            yield "every", f"{step.every} is no power of two", "give 1, 2, 4, … or 0 for never"
        case Moves() if step.calls > MOVES:
            yield "rounds", f"these are {step.calls} moves", f"at most {MOVES} are recorded: give fewer"
        case Together():
            yield from _together_problems(step)


def _together_problems(step: Together) -> Iterator[tuple[str, str, str]]:
    vms = [inner.vm if isinstance(inner, Mirror) else inner.destination for inner in step.steps]
    twice = next((vm for vm in vms if vms.count(vm) > 1), None)
    if twice is not None:
        yield "steps", f"{twice} makes two of the operations", "give each another, or a loop more threads"
    for inner in step.meanwhile:
        if isinstance(inner, Together):
            yield "meanwhile", "operations that begin together are under way already", "add them to `steps`"
        if isinstance(inner, Observe) and any(isinstance(other, Moves) for other in step.steps):
            # A move that fails may have been charged for an instant, and nobody knows when each of thousands did.
            yield "meanwhile", "counters that are read during a loop of moves tell nothing", "observe before and after"


def _migration_problems(experiment: Experiment, step: Migrate) -> Iterator[tuple[str, str, str]]:
    if len({vm.vmm for name, vm in experiment.vms.items() if name in (step.source, step.destination)}) == 1:
        problem = f"{step.source} and {step.destination} belong to one VMM, which hands nothing over to itself"
        yield "destination", problem, "name a VM of another VMM, or use the step `move`"


def _references(experiment: Experiment, part: Part) -> Iterator[tuple[str, str, str]]:
    """VMs and VMMs that are named and are not there."""
    vmms, vms = ", ".join(experiment.vmms), ", ".join(experiment.vms)
    for name in getattr(part, "sources", ()):
        if name not in experiment.vms:
            yield "sources", f"there is no VM {name!r}", f"the VMs are {vms}"
    for field in ("vm", "source", "destination", "vmm"):
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


def _fault_problems(experiment: Experiment, step: Strike) -> Iterator[tuple[str, str, str]]:
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
