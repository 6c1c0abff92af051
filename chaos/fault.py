# SPDX-License-Identifier: Apache-2.0
"""What a fault is, what it is given, and where faults come from.

A fault is three verbs, given a `FaultContext` and the name of what it breaks:

    apply     break it
    evidence  did it take effect? Asked right after `apply`, and if the answer is "not yet", again before `undo`. A run
              in which a planned fault left no evidence says nothing. `sevchaos run --withhold FAULT` leaves `apply` out
              and asks all the same: what is not done must leave no evidence
    undo      make it whole again, if that can be; registered before `apply`, always called, and alone if that failed

A fault is a dataclass. Its fields are its options, so that a file is checked against them before anything runs; what
it has to remember between the verbs are fields that are not `init`. A new object is made each time one is applied.
Faults register themselves under the entry point group `sevchaos.faults`; the engine knows none by name.

The context is a handful of objects, each a Protocol here. The runner's own objects have these methods; none passes on
to another, so that what a fault may do is written in one place.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from chaos import convert
from chaos.errors import UsageError

# All of them are on floors below. Every command that reads an experiment loads this module and needs none of them, and
# they would take a third of its start.
if TYPE_CHECKING:
    from chaos.cgroup.group import Cgroup
    from chaos.history.records import Done, Value
    from chaos.kvm.sev import Platform
    from chaos.linux.kfault import Kfault
    from chaos.netns.link import LinkEnd
    from chaos.vmm.messages import Question

GROUP = "sevchaos.faults"
StorageState = Literal["missing", "full", "read-only", "torn"]
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
        """The threads that carry out operations under way."""

    @property
    def status(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it has not been reaped."""

    def wait_end(self, within: float) -> bool:
        """Whether it ended within so many seconds. It is reaped then."""

    def ask(self, question: Question) -> Mapping[str, Value] | None:
        """What it answers (`chaos.vmm.messages`), None if it ends first."""

    def limit_memlock(self, size: int | None) -> None:
        """Have it without CAP_IPC_LOCK, and RLIMIT_MEMLOCK at so many bytes; None for both as they were. Recorded as an
        operation. Raises OSError."""


class Pending(Protocol):
    """An operation that was handed over and is not waited for."""

    @property
    def done(self) -> Done | None:
        """How it ended, and when its system call began and ended; None while it has not."""

    @property
    def tid(self) -> int:
        """The thread that makes its system call, 0 before it does."""


class Vmms(Protocol):
    """The experiment's VMMs."""

    def __getitem__(self, name: str) -> Victim:
        """The latest of this name, also if it has ended."""

    @property
    def living(self) -> tuple[Victim, ...]: ...


class Cgroups(Protocol):
    """The run's cgroups, by path below the run's own, which is ".". What changes something is recorded as an operation,
    since what the kernel may answer afterwards hangs on it. Raises OSError."""

    def __getitem__(self, path: str) -> Cgroup: ...

    def below(self, path: str) -> tuple[str, ...]:
        """The cgroups below it that there are now, parents first."""

    def home(self, vmm: Victim) -> str:
        """The cgroup that it lives in, by its path."""

    def living_in(self, path: str) -> tuple[Victim, ...]:
        """The VMMs that live in it or below."""

    def enter(self, vmm: Victim, path: str) -> None:
        """Put the whole process into another cgroup."""

    def limit(self, path: str, key: str, number: int | None) -> None:
        """Set misc.max of a key, None for no limit."""

    def add(self, path: str) -> None:
        """Make one again that was removed."""

    def remove(self, path: str) -> None: ...

    def disable_misc(self, path: str) -> None:
        """Take the misc controller from the cgroups directly below, and with it their charges from their accounts."""

    def enable_misc(self, path: str) -> None: ...


class Vms(Protocol):
    """The experiment's VMs, and those that a fault makes. What changes something is recorded as an operation."""

    def vmm_of(self, vm: str) -> Victim:
        """The VMM that a VM belongs to."""

    def take(self, vmm: str, vm: str, key: str) -> Done:
        """Have a VMM create a VM of this name and take a context of `key` for it; how its INIT was answered."""

    def give_back(self, vmm: str, vm: str) -> None:
        """Have a VMM close a VM that it took a context for."""

    def lose_fd(self, vm: str, fd: str) -> Done:
        """Have a descriptor closed behind the back of the VM's VMM: "vm", "vcpu 0" or "sev"."""

    def set_memory(self, vm: str, there: bool) -> Done:
        """Have the VM's memory slot put there or taken away."""

    def add_vcpu(self, vm: str, id: int, then: Callable[[], None]) -> Pending:
        """Have the VM's VMM create a vCPU that never runs, in a thread of its own, and go on. `then` is called when
        that is over."""

    def is_dead(self, vm: str) -> bool:
        """Whether a move took its context away, so that every ioctl on it must fail with EIO."""

    def moves(self, vm: str) -> tuple[Pending, ...]:
        """The moves so far that have it as their source or their destination, also those under way."""

    def memory(self, vm: str) -> int:
        """A descriptor of the file that the guest's memory is; the run's own."""


class HostSettings(Protocol):
    """Settings of the whole host, which the run's own end does not restore."""

    def remember(self, path: Path, text: str) -> None:
        """Have `text` written into this file of the host's if the runner is killed before it was undone."""

    def forget(self, path: Path, text: str) -> None:
        """It was undone."""


class FailpointHits(Protocol):
    """One failpoint of a plan: how often it took effect, and when first and last, in ns of the host's
    CLOCK_MONOTONIC."""

    @property
    def failpoint(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...


class PlanReport(Protocol):
    """What a plan has done so far, each of its failpoints in order."""

    @property
    def points(self) -> tuple[FailpointHits, ...]: ...


class PlanInForce(Protocol):
    """Failpoints that the firmware follows."""

    def look(self) -> PlanReport: ...

    def withdraw(self) -> None:
        """Have them followed no more, and let the command go that one of them stalls. May be called twice."""


class FirmwareControl(Protocol):
    """The firmware's commands, made to fail, to be late or to be stalled; in the lab only."""

    def require(self) -> None:
        """Raises `Unsupported` if it is not ours to break."""

    @property
    def platform(self) -> Platform:
        """/dev/sev. Raises `Unsupported`."""

    def arm(self, failpoints: str) -> PlanInForce:
        """Have it follow these failpoints (docs/firmware.md) from now on. Raises ValueError, OSError, `Unsupported`."""

    def reset(self) -> None:
        """Shut the platform down through the driver, so that the next guest initialises it. Raises OSError."""

    def set_patience(self, seconds: int) -> int:
        """Have the driver wait so many seconds for an answer; returns how many it did. Raises OSError."""


class Storage(Protocol):
    """The file in which the host keeps the firmware's state. What changes it is recorded as an operation."""

    @property
    def file(self) -> Path:
        """Raises `Unsupported` if there is none."""

    def spoil(self, how: StorageState) -> None:
        """Make it unfit to keep the state, until `mend`. Raises OSError."""

    def mend(self) -> None: ...

    def takes(self) -> OSError | None:
        """What keeps anybody from writing the whole state there, None if nothing does."""

    @property
    def torn(self) -> bool:
        """Whether the file is there, and not of the length that it was written in. Raises OSError."""


class FaultContext(Protocol):
    """The run, as a fault may break it. Raises `Unsupported` where the host has no such thing."""

    @property
    def shared(self) -> bool:
        """Whether others live on this host, of whom nothing may be broken."""

    @property
    def vmms(self) -> Vmms: ...

    @property
    def vms(self) -> Vms: ...

    @property
    def cgroups(self) -> Cgroups: ...

    @property
    def host(self) -> HostSettings: ...

    @property
    def firmware(self) -> FirmwareControl: ...

    @property
    def storage(self) -> Storage: ...

    def kfault(self) -> Kfault:
        """The kernel's functions, held, delayed or made to fail; loads the module in the lab."""

    def count_entries(self, cpu: int) -> None:
        """Have the kernel count with which ASIDs it enters guests on a CPU, from now until this is asked for again or
        the run is over; what it counted is recorded then, and so is that it could not."""

    def let_points_fail(self) -> None:
        """Set the kernel's own fault injection up, until the run is over, so that it lets any point fail that it is
        asked to. Nothing fails by that alone. Raises `Unsupported`, also on a shared host."""

    def enable_controller(self, cgroup: str, controller: str) -> None:
        """Have the cgroup get a controller from those above it until the run is over. Raises OSError: EBUSY if somebody
        lives in one of those."""

    def links(self, vmm: str) -> tuple[tuple[LinkEnd, LinkEnd, Victim], ...]:
        """The links between this VMM and those that it migrates with: its own end, the other's, and whose that is."""

    def wait(self, happened: Callable[[], bool], within: float, what: str) -> bool:
        """Whether it happened within so many seconds; the run goes on meanwhile."""

    def chance(self) -> int:
        """A seed of 63 bits, another each time: of the run's own, which is its only source of chance."""


GONE = {
    "vmm": "ctx.vmms[NAME]", "vmm_of": "ctx.vms.vmm_of(VM)", "cgroup": "ctx.cgroups[PATH]",
    "below": "ctx.cgroups.below(PATH)", "home": "ctx.cgroups.home(ctx.vmms[NAME])",
    "living_in": "ctx.cgroups.living_in(PATH)", "enter": "ctx.cgroups.enter(ctx.vmms[NAME], PATH)",
    "limit": "ctx.cgroups.limit(PATH, KEY, NUMBER)", "add_cgroup": "ctx.cgroups.add(PATH)",
    "remove_cgroup": "ctx.cgroups.remove(PATH)", "disable_misc": "ctx.cgroups.disable_misc(PATH)",
    "enable_misc": "ctx.cgroups.enable_misc(PATH)", "take": "ctx.vms.take(VMM, VM, KEY)",
    "close": "ctx.vms.give_back(VMM, VM)", "lose_fd": "ctx.vms.lose_fd(VM, FD)",
    "set_memory": "ctx.vms.set_memory(VM, THERE)", "memlock": "ctx.vmms[NAME].limit_memlock(SIZE)",
    "add_vcpu": "ctx.vms.add_vcpu(VM, ID, THEN)", "moves": "ctx.vms.moves(VM)", "memory": "ctx.vms.memory(VM)",
    "ask": "ctx.vmms[NAME].ask(QUESTION)", "enable": "ctx.enable_controller(PATH, CONTROLLER)",
    "remember": "ctx.host.remember(PATH, TEXT)", "forget": "ctx.host.forget(PATH, TEXT)",
}  # fmt: skip
"""What verbs of faults were called before the context had objects, and what each is now."""


@contextlib.contextmanager
def naming_successors(ctx: FaultContext) -> Iterator[None]:
    """A verb that asks the context for what it once had raises `UsageError`, which names what that is now."""
    try:
        yield
    except AttributeError as error:
        if error.obj is not ctx or error.name not in GONE:
            raise
        gone = f"a fault asks its context for {error.name!r}, which is gone"
        raise UsageError(gone, remedy=f"use {GONE[error.name]}") from error


@dataclass(frozen=True, slots=True)
class Evidence:
    """`struck` is None for "not yet": it is asked again before the fault is undone, and counts as no by then."""

    struck: bool | None
    detail: str


class Fault(abc.ABC):
    """Inherit, be a dataclass, say what TARGET is: `target` names one. Verbs may raise OSError.

    The docstring, WHERE (it may be applied), NEEDS (what a host must have) and PROOF are what `sevchaos explain` says.
    NAMES says of which options the value names something of the experiment, and what. LETS_GO is off if neither `apply`
    nor `undo` can let anything go that is held in the kernel, as a signal does that takes a vCPU out of its guest.
    FATAL is on if it sends a fatal signal, whatever it finds: a move that goes on all the same breaks P8.
    DISTURBS is off if VMs, counters and firmware answer all the same while it is applied: a process that was killed is
    gone, and a limit is no question's. As long as one that does is not undone, the runner asks nothing by itself.
    """

    TARGET: ClassVar[Target]
    WHERE: ClassVar[str] = "at any step, before any phase of a migration, in any hold"
    NEEDS: ClassVar[str] = "nothing that a run does not need anyway"
    PROOF: ClassVar[str]
    NAMES: ClassVar[Mapping[str, Target]] = {}
    LETS_GO: ClassVar[bool] = True
    FATAL: ClassVar[bool] = False
    DISTURBS: ClassVar[bool] = True

    def require(self, ctx: FaultContext, target: str) -> None:  # noqa: B027 - most need nothing
        """Raises `Unsupported` if this host cannot do it. Asked before anything is done; there are no VMMs yet."""

    def ends(self, ctx: FaultContext, target: str) -> tuple[str, ...]:
        """The VMMs whose end it may be. Asked before `apply`."""
        return (target,) if self.TARGET == "vmm" else ()

    @property
    def disturbs(self) -> bool:
        return self.DISTURBS

    @abc.abstractmethod
    def apply(self, ctx: FaultContext, target: str) -> None: ...

    @abc.abstractmethod
    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        """Read from what it broke, never from what `apply` meant to do: that may have failed, or been withheld."""

    @abc.abstractmethod
    def undo(self, ctx: FaultContext, target: str) -> str:
        """What was done, in a few words."""


def names() -> tuple[str, ...]:
    return tuple(sorted(point.name for point in importlib.metadata.entry_points(group=GROUP)))


def load(name: str) -> type[Fault]:
    """The class of the fault of this name. Raises `UsageError`."""
    points = tuple(importlib.metadata.entry_points(group=GROUP, name=name))
    if not points:
        raise UsageError(f"there is no fault {name!r}", remedy=f"the faults are {', '.join(names()) or '(none)'}")
    try:
        kind: type[Fault] = points[0].load()
    except ImportError as error:
        raise _refusal(name, error) from error
    return kind


def _refusal(name: str, error: ImportError) -> UsageError:
    if error.name == __name__ and "Scene" in error.msg:
        return UsageError(
            f"fault {name!r} imports Scene, which is FaultContext now, with ctx.vmms[target] for scene.vmm(target)",
            remedy="change its verbs; docs/own-faults.md says what each method is called now",
        )
    return UsageError(f"fault {name!r} cannot be loaded: {error.msg}", remedy="see to the package that it comes from")


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
    except convert.NotConvertible as refused:
        allowed = f"give {refused.allowed}; " if refused.key else ""
        raise UsageError(f"fault {name!r}: {refused}", remedy=f"{allowed}{remedy}") from refused
