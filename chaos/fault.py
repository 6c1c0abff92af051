# SPDX-License-Identifier: Apache-2.0
"""What a fault is, and where faults come from.

A fault is three verbs, given the scene that it strikes and the name of what it is to strike there:

    apply     break it
    evidence  did it strike? Asked right after `apply`, and if the answer is "not yet", again before `undo`. A run in
              which a planned fault left no evidence says nothing. `sevchaos run --withhold FAULT` leaves `apply` out
              and asks all the same: what is not done must leave no evidence
    undo      make it whole again, if that can be; registered before `apply`, always called, and alone if that failed

A fault is a dataclass. Its fields are its options, so that a file is checked against them before anything runs; what
it has to remember between the verbs are fields that are not `init`. A new object is made for every strike. Faults
register themselves under the entry point group `sevchaos.faults`; the engine knows none by name.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from chaos import convert
from chaos.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from chaos.cgroup.group import Cgroup
    from chaos.history.records import Done, Value
    from chaos.linux.kfault import Kfault
    from chaos.netns.link import End
    from chaos.runner.holds.failpoints import Failpoints
    from chaos.vmm.messages import Question

GROUP = "sevchaos.faults"
# caller: a VMM whose calls alone count, or with no target whoever calls.
Target = Literal["vmm", "vm", "cgroup", "link", "host", "caller"]


class Victim(Protocol):
    """A VMM process, as the runner sees it."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...

    @property
    def pidfd(self) -> int:
        """Refers to the process and no other, also when its pid is used again."""

    @property
    def busy(self) -> tuple[int, ...]:
        """The threads that are in system calls of operations under way."""

    @property
    def status(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it has not been reaped."""

    def wait_end(self, within: float) -> bool:
        """Whether it ended within so many seconds. It is reaped then."""


class Pending(Protocol):
    """An operation that was handed over and is not waited for."""

    @property
    def done(self) -> Done | None:
        """How it ended, and when its system call began and ended; None while it has not."""

    @property
    def tid(self) -> int:
        """The thread that makes its system call, 0 before it does."""


class Scene(Protocol):
    """What there is to strike. Raises `Unsupported` where the host has no such thing."""

    @property
    def shared(self) -> bool:
        """Whether others live on this host, of whom nothing may be struck."""

    def chance(self) -> int:
        """A seed of 63 bits, another each time: of the run's own, which is its only source of chance."""

    def vmm(self, name: str) -> Victim: ...

    def vmm_of(self, vm: str) -> Victim:
        """The VMM that a VM belongs to."""

    @property
    def vmms(self) -> tuple[Victim, ...]:
        """The experiment's VMMs that live."""

    def cgroup(self, name: str) -> Cgroup:
        """By its path below the run's own, which is "."."""

    def below(self, cgroup: str) -> tuple[str, ...]:
        """The cgroups below it that there are now, parents first."""

    def home(self, vmm: str) -> str:
        """The cgroup that it lives in, by its path."""

    def living_in(self, cgroup: str) -> tuple[Victim, ...]:
        """The VMMs that live in it or below."""

    # What follows is recorded as an operation, since what the kernel may answer afterwards hangs on it. Raises OSError.

    def enter(self, vmm: str, cgroup: str) -> None:
        """Put the whole process into another cgroup."""

    def limit(self, cgroup: str, key: str, number: int | None) -> None:
        """Set misc.max of a key, None for no limit."""

    def add_cgroup(self, cgroup: str) -> None:
        """Make one again that was removed."""

    def remove_cgroup(self, cgroup: str) -> None: ...

    def disable_misc(self, cgroup: str) -> None:
        """Take the misc controller from the cgroups directly below, and with it their charges from their accounts."""

    def enable_misc(self, cgroup: str) -> None: ...

    def take(self, vmm: str, vm: str, key: str) -> Done:
        """Have a VMM create a VM of this name and take a context of `key` for it; how its INIT was answered."""

    def close(self, vmm: str, vm: str) -> None:
        """Have a VMM close a VM that it took a context for."""

    def lose_fd(self, vm: str, fd: str) -> Done:
        """Have a descriptor closed behind the back of the VM's VMM: "vm", "vcpu 0" or "sev"."""

    def set_memory(self, vm: str, there: bool) -> Done:
        """Have the VM's memory slot put there or taken away."""

    def memlock(self, vmm: str, size: int | None) -> None:
        """Have the VMM without CAP_IPC_LOCK, and RLIMIT_MEMLOCK at so many bytes; None for both as they were."""

    def add_vcpu(self, vm: str, id: int, then: Callable[[], None]) -> Pending:
        """Have the VM's VMM create a vCPU that nobody drives, in a thread of its own, and go on. `then` is called when
        that is over."""

    # What is not.

    def moves(self, vm: str) -> tuple[Pending, ...]:
        """The moves so far that have it as their source or their destination, also those under way."""

    def ask(self, vmm: str, question: Question) -> Mapping[str, Value] | None:
        """What a VMM answers (`chaos.vmm.messages`), None if it ends first."""

    def enable(self, cgroup: str, controller: str) -> None:
        """Have the cgroup get a controller from those above it until the run is over. Raises OSError: EBUSY if somebody
        lives in one of those."""

    def remember(self, path: Path, text: str) -> None:
        """Have `text` written into this file of the host's if the runner is killed before it was undone."""

    def forget(self, path: Path, text: str) -> None:
        """It was undone."""

    def kfault(self) -> Kfault:
        """The kernel's functions, held, delayed or made to fail; loads the module in the lab."""

    @property
    def firmware(self) -> Failpoints:
        """The firmware's commands, made to fail, to be late or to be stalled; in the lab only."""

    def memory(self, vm: str) -> int:
        """A descriptor of the file that the guest's memory is; the run's own."""

    def links(self, vmm: str) -> tuple[tuple[End, End, Victim], ...]:
        """The links between this VMM and those that it migrates with: its own end, the other's, and whose that is."""

    def wait(self, happened: Callable[[], bool], within: float, what: str) -> bool:
        """Whether it happened within so many seconds; the run goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """`struck` is None for "not yet": it is asked again before the fault is undone, and counts as no by then."""

    struck: bool | None
    detail: str


class Fault(abc.ABC):
    """Inherit, be a dataclass, say what TARGET is: `target` names one. Verbs may raise OSError.

    The docstring, WHERE (it may strike), NEEDS (what a host must have) and PROOF are what `sevchaos explain` says.
    NAMES says of which options the value names something of the experiment, and what. LETS_GO is off if neither `apply`
    nor `undo` can let anything go that is held in the kernel, as a signal does that takes a vCPU out of its guest.
    """

    TARGET: ClassVar[Target]
    WHERE: ClassVar[str] = "at any step, before any phase of a migration, in any hold"
    NEEDS: ClassVar[str] = "nothing that a run does not need anyway"
    PROOF: ClassVar[str]
    NAMES: ClassVar[Mapping[str, Target]] = {}
    LETS_GO: ClassVar[bool] = True

    def require(self, scene: Scene, target: str) -> None:  # noqa: B027 - most need nothing
        """Raises `Unsupported` if this host cannot do it. Asked before anything is done; there are no VMMs yet."""

    def ends(self, scene: Scene, target: str) -> tuple[str, ...]:
        """The VMMs whose end it may be. Asked before `apply`."""
        return (target,) if self.TARGET == "vmm" else ()

    @abc.abstractmethod
    def apply(self, scene: Scene, target: str) -> None: ...

    @abc.abstractmethod
    def evidence(self, scene: Scene, target: str) -> Evidence:
        """Read from what it struck, never from what `apply` meant to do: that may have failed, or been withheld."""

    @abc.abstractmethod
    def undo(self, scene: Scene, target: str) -> str:
        """What was done, in a few words."""


def names() -> tuple[str, ...]:
    return tuple(sorted(point.name for point in importlib.metadata.entry_points(group=GROUP)))


def load(name: str) -> type[Fault]:
    """The class of the fault of this name. Raises `UsageError`."""
    points = tuple(importlib.metadata.entry_points(group=GROUP, name=name))
    if not points:
        raise UsageError(f"there is no fault {name!r}", remedy=f"the faults are {', '.join(names()) or '(none)'}")
    kind: type[Fault] = points[0].load()
    return kind


def find(name: str, options: Mapping[str, object]) -> Fault:
    """The fault of this name with these options. Raises `UsageError`."""
    kind = load(name)
    options_there_are = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    remedy = f"its options are {', '.join(options_there_are) or '(none)'}"
    unknown = [option for option in options if option not in options_there_are]
    if unknown:
        raise UsageError(f"fault {name!r} has no option {unknown[0]!r}", remedy=remedy)
    try:
        return convert.convert(dict(options), kind)
    except convert.Wrong as wrong:
        allowed = f"give {wrong.allowed}; " if wrong.key else ""
        raise UsageError(f"fault {name!r}: {wrong}", remedy=f"{allowed}{remedy}") from wrong
