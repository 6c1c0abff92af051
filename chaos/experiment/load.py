# SPDX-License-Identifier: Apache-2.0
"""An experiment from a file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from chaos import convert
from chaos.errors import UsageError
from chaos.experiment import yamlfile
from chaos.experiment.check import problems
from chaos.experiment.model import Experiment, Unaskable, Vm
from chaos.experiment.steps import CountStep, MigrateStep, Name, Part, PauseStep, RunStep, Step, SweepStep
from chaos.kinds import Kind

P = TypeVar("P", bound=Part)
_SAID_MOST = 700  # characters of what is wrong, and of what to do about it


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
        return replace(
            other,
            name=self.name,
            why=self.why,
            vms={name: self._vm(vm) for name, vm in other.vms.items()},
            script=_unrun(other.script) if self.kind == "sev-es" else other.script,
            **{field: value for field, value in changes.items() if value is not None},
        )

    def _vm(self, vm: Vm) -> Vm:
        return replace(
            vm,
            kind=Kind(self.kind) if vm.kind is Kind.SEV else vm.kind,
            type=self.type,
            vcpus=self.vcpus if self.vcpus is not None and vm.kind is not Kind.MIRROR else vm.vcpus,
        )


def _unrun(script: tuple[Step, ...]) -> tuple[Step, ...]:
    """The script without what lets a guest run."""
    return tuple(_unrun_inside(step) for step in script if not isinstance(step, RunStep | CountStep | PauseStep))


def _unrun_inside(step: Step) -> Step:
    match step:
        case MigrateStep():
            return replace(step, before={phase: _unrun(inner) for phase, inner in step.before.items()})
        case SweepStep():
            parts = {"before": step.before, "refused": step.refused, "after": step.after}
            return replace(step, **{key: _unrun(inner) for key, inner in parts.items()})
    return step


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
    for where, problem, remedy in problems(experiment):
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
    except convert.NotConvertible as refused:
        allowed = f"give {refused.allowed}; " if refused.allowed else ""
        said = str(refused) if refused.key else f"the file: {refused}"
        raise _refusal(path, said, f"{allowed}docs/experiments.md says more") from refused
