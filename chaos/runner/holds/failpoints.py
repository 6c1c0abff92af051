# SPDX-License-Identifier: Apache-2.0
"""The firmware as a run can break it: commands failed, delayed, stalled, and what a stalled one looks like from inside.

No program on a host can break the firmware under it, so the outside is asked to (`chaos.runner.questions`); where the
firmware is a real one the answer is no, and that is `Unsupported`.

A stalled command holds whoever sent it. The driver sends one command at a time and waits for its answer with a mutex of
its own held (`sev_cmd_mutex`), in a sleep that no signal ends; an ioctl on a VM keeps that VM's `kvm->lock` as well. So
two witnesses must agree: the kernel, that the thread sleeps there, and the firmware, that it has the command and does
not answer. The driver's patience is limited: after `psp_cmd_timeout` seconds, 100 unless the module was told otherwise,
it takes the firmware for dead, for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chaos.errors import InternalError, Unsupported
from chaos.kvm.numbers import Ioctl
from chaos.kvm.sev import Platform
from chaos.lab.psp.failpoints import parse
from chaos.lab.psp.plan import Stall
from chaos.linux.task import SYS_IOCTL, Sleeper
from chaos.runner.holds.places import PlaceKind
from chaos.runner.questions import ArmFailpoints, LookAtFailpoints, Looked, WithdrawFailpoints
from chaos.runner.uplink import Outside
from chaos.seed import split

PATIENCE = Path("/sys/module/ccp/parameters/psp_cmd_timeout")

# Where the driver waits for an answer; which of the two has a name of its own is the compiler's choice.
PLACES = frozenset({"sev_wait_cmd_ioc", "__sev_do_cmd_locked"})


class RunFailpoints:
    """Those that a run has the firmware follow. `seed` is the run's. `platform` is /dev/sev, None if it cannot be
    opened."""

    def __init__(self, outside: Outside, seed: int, platform: Platform | None, patience: Path = PATIENCE) -> None:
        self._outside = outside
        self._seed = seed
        self._platform = platform
        self._patience = patience
        self._count = 0
        self._stalling: set[str] = set()
        self.kept: set[str] = set()  # holds, by name, that keep the driver's lock

    def require(self) -> None:
        """Raises `Unsupported` if it is not ours to break."""
        self.look("")

    @property
    def platform(self) -> Platform:
        """/dev/sev. Raises `Unsupported`."""
        if self._platform is None:
            raise Unsupported("/dev/sev cannot be opened", remedy="become root")
        return self._platform

    def arm(self, failpoints: str) -> Armed:
        """Follow these failpoints (docs/firmware.md) from now on. Raises what `Outside.ask` does, and ValueError."""
        rules = parse(failpoints)
        self._count += 1
        name = f"plan-{self._count}"
        # Of the run's seed and a number, so that two plans of one run have luck of their own.
        self._outside.ask(ArmFailpoints(name=name, failpoints=failpoints, seed=split(self._seed, name)))
        if any(isinstance(rule.action, Stall) for rule in rules):
            self._stalling.add(name)
        return Armed(self, name)

    @property
    def may_stall(self) -> bool:
        """Whether a command may be stalled, now or at any moment. Who asks the firmware then waits for a release."""
        return bool(self._stalling or self.kept)

    def withdraw(self, name: str) -> None:
        self._outside.ask(WithdrawFailpoints(name=name))
        self._stalling.discard(name)

    def look(self, name: str) -> Looked:
        answer = self._outside.ask(LookAtFailpoints(name=name))
        if not isinstance(answer, Looked):
            raise InternalError(f"the outside answered {answer!r} to look")
        return answer

    def reset(self) -> None:
        """Shut the platform down through the driver, so that the next guest initialises it. Raises OSError."""
        self.require()  # it would take a real machine's identity with it
        self.platform.factory_reset()

    def set_patience(self, seconds: int) -> int:
        """Have the driver wait so many seconds for an answer; returns how many it did. Raises OSError.

        It looks at the parameter only when a command was answered, so one is sent: how the platform is.
        """
        before = int(self._patience.read_text())
        self._patience.write_text(f"{seconds}\n")
        self.platform.status()
        return before


@dataclass(frozen=True, slots=True)
class Armed:
    """Failpoints that are followed."""

    firmware: RunFailpoints
    name: str

    def look(self) -> Looked:
        """What they have done so far."""
        return self.firmware.look(self.name)

    def withdraw(self) -> None:
        """Follow them no more, and let the command go that one of them stalls. May be called twice."""
        self.firmware.withdraw(self.name)


@dataclass(frozen=True, slots=True)
class FirmwareStall:
    """A hold: the `nth` command of that name is not answered until it is released."""

    armed: Armed
    command: str
    kind: PlaceKind = "firmware"
    function: str = ""

    @classmethod
    def arm(cls, firmware: RunFailpoints, command: str, *, nth: int) -> FirmwareStall:
        return cls(firmware.arm(f"{command}#{nth}=stall"), command)

    def stops(self, sleeper: Sleeper, tid: int) -> bool:
        """The kernel says that the thread waits for the firmware, and the firmware that it does not answer."""
        return waits_for_answer(sleeper) and self.armed.look().stalled == self.command

    def release(self) -> None:
        self.armed.withdraw()


def waits_for_answer(sleeper: Sleeper) -> bool:
    """Whether the thread sleeps in the driver, in an ioctl on a VM or in none (a close has no ioctl)."""
    in_ioctl = sleeper.call[:1] == (SYS_IOCTL,)
    on_vm = sleeper.in_ioctl(Ioctl.KVM_MEMORY_ENCRYPT_OP)
    return sleeper.state == "D" and sleeper.sleeping in PLACES and (on_vm or not in_ioctl)
