# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: pure data, with a schema, loaded from YAML and never executed.

An experiment names its VMMs (processes, each in a cgroup of its own name below the run's), its VMs, and a script of
steps. A VM belongs to one VMM; VMs that share a `memory` are the two ends of a migration of one guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from chaos import fault
from chaos.errors import UsageError
from chaos.verdict import PROMISES

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,40}$", description="lower case, digits, dashes")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Ticks = Annotated[int, msgspec.Meta(gt=0, le=1_000_000)]


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


# What INIT2 makes of a VM hangs on its type alone. A plain VM may have any: it is given its context by a move.
TYPES = {Kind.SEV: 2, Kind.SEV_ES: 3}


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Step(_Part, frozen=True, kw_only=True, tag_field="do"):
    pass


class Vmm(_Part, frozen=True, kw_only=True):
    """A VMM process, in the cgroup of this name."""

    cgroup: Name


class Vm(_Part, frozen=True, kw_only=True):
    """A VM of `vmm`. `memory` names the guest memory that it maps. `type` is what it is created as: 0 is given its
    kind by KVM_SEV_INIT or ES_INIT; 2 (SEV) and 3 (SEV-ES), since 6.10, by KVM_SEV_INIT2. A context moves between
    VMs of one type only."""

    vmm: Name
    kind: Kind
    memory: Name = "guest"
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    type: Literal[0, 2, 3] = 0


class Launch(_Step, frozen=True, kw_only=True, tag="launch"):
    """Create the VM with its vCPUs, and unless it is plain, take it through INIT, START, UPDATE, MEASURE, FINISH.

    With `finish` off the last two wait for `finish`: the registers of a SEV-ES mirror can be encrypted until then.
    """

    vm: Name
    finish: bool = True


class Finish(_Step, frozen=True, kw_only=True, tag="finish"):
    """Measure and finish a launch that was left open."""

    vm: Name


class Mirror(_Step, frozen=True, kw_only=True, tag="mirror"):
    """Make `vm` a mirror of `source`: it shares the context, and gets its vCPUs after that. Creates it, unless it was
    launched as something else, which the kernel then refuses."""

    source: Name
    vm: Name


class Run(_Step, frozen=True, kw_only=True, tag="run"):
    """Let the vCPUs run. The guest leaves to its VMM every `every` ticks (a power of two), or never if 0."""

    vm: Name
    every: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1


class Count(_Step, frozen=True, kw_only=True, tag="count"):
    """Wait until the guest has counted `ticks` further, and record its counter."""

    vm: Name
    ticks: Ticks
    within: Seconds = 60.0


class Pause(_Step, frozen=True, kw_only=True, tag="pause"):
    """Bring the vCPUs out of the guest."""

    vm: Name


class Migrate(_Step, frozen=True, kw_only=True, tag="migrate"):
    """The full hand-over of a VMM upgrade: connect, pause, send state, send the VM fd, move, load state, resume,
    commit."""

    source: Name
    destination: Name


class Move(_Step, frozen=True, kw_only=True, tag="move"):
    """The move alone. With `wait` off the script goes on while it is under way, until `join`."""

    source: Name
    destination: Name
    wait: bool = True


class Join(_Step, frozen=True, kw_only=True, tag="join"):
    """Wait for the move into `destination` that is under way."""

    destination: Name
    within: Seconds = 30.0


class Hold(_Step, frozen=True, kw_only=True, tag="hold"):
    """Wait until the move into `destination` sleeps inside the kernel at `at`, and show where it does.

    vcpu-running: a vCPU inside KVM_RUN keeps its mutex. The move has charged its cgroup and moved nothing.
    """

    destination: Name
    at: Annotated[str, msgspec.Meta(pattern="^vcpu-running$")] = "vcpu-running"
    within: Seconds = 30.0


class Ask(_Step, frozen=True, kw_only=True, tag="ask"):
    """Ask every file descriptor of the VM, in its own process and beside a live VM, whether it is dead."""

    vm: Name


class Status(_Step, frozen=True, kw_only=True, tag="status"):
    """GUEST_STATUS of the VM's context: handle, policy and state, or the errno."""

    vm: Name


class Observe(_Step, frozen=True, kw_only=True, tag="observe"):
    """Read the counters of every cgroup and the firmware's guest count."""

    label: Name


class Strike(_Step, frozen=True, kw_only=True, tag="fault"):
    """Apply a fault to a VMM. `options` are the fault's own and checked by it at load."""

    fault: Name
    vmm: Name
    options: dict[str, str | int | float | bool] = {}


class Close(_Step, frozen=True, kw_only=True, tag="close"):
    """Close every file descriptor of the VM."""

    vm: Name


Step = (
    Launch | Finish | Mirror | Run | Count | Pause | Migrate | Move | Join | Hold | Ask | Status | Observe | Strike
    | Close
)  # fmt: skip


class Experiment(_Part, frozen=True, kw_only=True):
    """`why` says in two sentences why anyone should care. `promises` are those it puts to the test. `unaskable`
    names promises whose question this experiment cannot ask, each with the reason; they end unknown all the same."""

    name: Name
    why: str
    promises: tuple[str, ...]
    vmms: dict[Name, Vmm]
    vms: dict[Name, Vm]
    script: tuple[Step, ...]
    unaskable: dict[str, str] = {}

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the misc controller that it needs capacity of."""
        return frozenset(vm.kind.key for vm in self.vms.values() if vm.kind.owns)

    @property
    def types(self) -> frozenset[int]:
        """Types of VM that it needs the kernel to know."""
        return frozenset(vm.type for vm in self.vms.values())


class Order(_Part, frozen=True, kw_only=True):
    """What a runner reads, one JSON object a line: carry this out. `seed` is the run's only source of chance."""

    experiment: Experiment
    seed: int
    host: Literal["lab", "local"]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Experiment)


def encode(experiment: Experiment) -> bytes:
    return _encoder.encode(experiment)


def decode(data: bytes) -> Experiment:
    """The inverse of `encode`, for the runner; a file goes through `load`."""
    return _decoder.decode(data)


def load(path: Path) -> Experiment:
    """Read and check an experiment file. Raises `UsageError` naming file, key, value and what is allowed."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", remedy="`sevchaos list` names the experiments") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML: {text}", remedy="correct it at the place named") from error
    try:
        experiment = msgspec.convert(data, Experiment)
    except msgspec.ValidationError as error:
        raise _explained(path, data, error) from error
    for where, problem, remedy in _problems(experiment):
        raise UsageError(f"{path}: {where}: {problem}", remedy=remedy)
    return experiment


def _explained(path: Path, data: object, error: msgspec.ValidationError) -> UsageError:
    problem, _, where = str(error).partition(" - at `$")
    value = _value_at(data, where.rstrip("`"))
    shown = "" if value is _NOWHERE else f" (it is {str(value)[:80]!r})"
    key = where.rstrip("`").lstrip(".") or "the file"
    return UsageError(f"{path}: {key}: {problem}{shown}", remedy="docs/experiments.md lists keys and their values")


_NOWHERE = object()


def _value_at(data: Any, where: str) -> object:
    """The value at a msgspec path like `.script[2].vm`."""
    for part in where.replace("]", "").replace("[", ".").split("."):
        if not part:
            continue
        try:
            data = data[int(part)] if part.isdigit() else data[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return _NOWHERE
    return data


def _problems(experiment: Experiment) -> Iterator[tuple[str, str, str]]:
    """What the schema cannot say: references. Yields place, problem, remedy."""
    known = ", ".join(PROMISES)
    for promise in (*experiment.promises, *experiment.unaskable):
        if promise not in PROMISES:
            yield "promises", f"there is no promise {promise!r}", f"the promises are {known}"
    if not experiment.promises:
        yield "promises", "it puts no promise to the test", f"name at least one of {known}"
    vmms = ", ".join(experiment.vmms)
    for name, vm in experiment.vms.items():
        if vm.vmm not in experiment.vmms:
            yield f"vms.{name}.vmm", f"there is no VMM {vm.vmm!r}", f"the VMMs are {vmms}"
        fits = TYPES.get(vm.kind, vm.type)
        if vm.type not in (0, fits):
            yield f"vms.{name}.type", f"a {vm.kind.value} guest cannot have type {vm.type}", f"give {fits}, or 0"
    for number, step in enumerate(experiment.script):
        for field, problem, remedy in _step_problems(experiment, step):
            yield f"script[{number}].{field}", problem, remedy


def _step_problems(experiment: Experiment, step: Step) -> Iterator[tuple[str, str, str]]:
    """The same of a step. Yields key, problem, remedy."""
    vmms, vms = ", ".join(experiment.vmms), ", ".join(experiment.vms)
    for field in ("vm", "source", "destination", "vmm"):
        value = getattr(step, field, None)
        allowed, kind = (vmms, "VMM") if field == "vmm" else (vms, "VM")
        if value is not None and value not in (experiment.vmms if field == "vmm" else experiment.vms):
            yield field, f"there is no {kind} {value!r}", f"the {kind}s are {allowed}"
    if isinstance(step, Strike):
        try:
            fault.find(step.fault, step.options)
        except UsageError as error:
            yield "fault", error.message, error.remedy
    if isinstance(step, Launch) and step.vm in experiment.vms and experiment.vms[step.vm].kind is Kind.MIRROR:
        yield "vm", f"{step.vm} is a mirror, which is not launched", "use the step `mirror`"
    if isinstance(step, Run) and step.every & (step.every - 1):
        yield "every", f"{step.every} is no power of two", "give 1, 2, 4, … or 0 for never"
