# SPDX-License-Identifier: Apache-2.0
"""What an experiment is: pure data, with a schema, loaded from YAML and never executed.

An experiment names its VMMs (processes, each in a cgroup of its own name below the run's), its VMs, and a script of
steps. A VM belongs to one VMM; VMs that share a `memory` are the two ends of a migration of one guest.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from chaos.experiment.steps import (
    InitCommand,
    InitStep,
    MigrateStep,
    Name,
    ParameterName,
    ParameterValue,
    Part,
    Step,
    VcpuStep,
    walk,
)
from chaos.fault import Target
from chaos.kinds import TYPES, Kind

_LEVEL = r"[a-z][a-z0-9-]{0,40}"
GroupPath = Annotated[
    str, msgspec.Meta(pattern=rf"^{_LEVEL}(/{_LEVEL}){{0,15}}$", description="a cgroup below the run's: a or a/b")
]


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


KernelSeries = Annotated[
    str, msgspec.Meta(pattern=r"^(\d+\.\d+)?$", description='a series in quotes, as "7.2", for 7.20 is another')
]


class Kernels(Part, frozen=True, kw_only=True):
    """The kernels that have what the experiment is about: those of mainline from `since` on and older than `before`, ""
    for no such bound, and `why` in words. Both are series ("7.2"), and hold whatever a stable series took back."""

    since: KernelSeries = ""
    before: KernelSeries = ""
    why: str


class Unaskable(Part, frozen=True, kw_only=True):
    """Why a promise is unknown, as the verdict's `signature` has it, to the letter; and that in words."""

    signature: Annotated[str, msgspec.Meta(min_length=1)]
    why: str


class Experiment(Part, frozen=True, kw_only=True):
    """`why` says in two sentences why anyone should care. `promises` are those it puts to the test. `unaskable`
    names promises whose question this experiment cannot ask, each with the reason; they end unknown all the same, and
    for any other reason they count. With `questions: own` nothing is asked of the VMs and the counters but by steps.
    `cgroups` says more of some; there are also those that a VMM lives in, and all above them. `ccp` are parameters that
    the PSP's driver must have been loaded with: a lab is booted so, and another host that was not is skipped. On a
    kernel that is none of `kernels` it is skipped as well."""

    name: Name
    why: str
    promises: tuple[str, ...]
    vmms: dict[Name, Vmm]
    vms: dict[Name, Vm]
    script: tuple[Step, ...]
    unaskable: dict[str, Unaskable] = msgspec.field(default_factory=dict)
    cgroups: dict[GroupPath, Group] = msgspec.field(default_factory=dict)
    questions: Literal["automatic", "own"] = "automatic"
    ccp: dict[ParameterName, ParameterValue] = msgspec.field(default_factory=dict)
    kernels: Kernels | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the misc controller that it needs capacity of."""
        inits = (step for _, step in walk(self.script) if isinstance(step, InitStep) and step.vm in self.vms)
        tried = {key_of_init(self.vms[step.vm], step.command) for step in inits}
        return frozenset({*tried, *(vm.kind.key for vm in self.vms.values() if vm.kind.owns)})

    def vcpus(self, vm: str) -> int:
        """How many it may come to have."""
        added = sum(isinstance(step, VcpuStep) and step.vm == vm for _, step in walk(self.script))
        return self.vms[vm].vcpus + added

    @property
    def handovers(self) -> tuple[tuple[str, str], ...]:
        """From which VMM to which a guest is handed over, in the order of the script."""
        migrations = (step for _, step in walk(self.script) if isinstance(step, MigrateStep))
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
