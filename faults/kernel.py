# SPDX-License-Identifier: Apache-2.0
"""Faults of a kernel function, by kfault: its calls return something without being made, or come late.

With these a defect can be planted in a stock kernel, to see whether the promise that it breaks is found broken. An
account that was falsified stays false after the run, so what comes next wants a lab of its own.
"""

from __future__ import annotations

import abc
import errno
from dataclasses import dataclass, field
from typing import ClassVar

from chaos.errors import Unsupported, UsageError
from chaos.fault import Evidence, Fault, FaultContext, Target
from chaos.linux.kfault import Action, Event, Happening, Kfault, Refused, Slot, arming

# A call that no run gets to: to hear what the module says to being armed, and strike nobody.
_NEVER = 1 << 62
_SHOWN = 5


@dataclass(kw_only=True, slots=True)
class _Calls(Fault):
    """What is done to calls `nth` to `nth + times - 1` of a function, counted from when it is applied; with `times` 0,
    to all from there on."""

    TARGET: ClassVar[Target] = "caller"
    NEEDS: ClassVar[str] = "kfault.ko, which the lab has, and a kernel that has not inlined the function"
    ACTION: ClassVar[Action]
    HAPPENED: ClassVar[Happening]

    function: str
    nth: int = 1
    times: int = 1
    _kfault: Kfault | None = field(init=False, default=None)
    _slot: Slot | None = field(init=False, default=None)

    @property
    @abc.abstractmethod
    def _argument(self) -> int:
        """What `chaos.linux.kfault.arming` wants with this action."""

    @abc.abstractmethod
    def _arm(self, kfault: Kfault, nth: int, pid: int | None) -> Slot:
        """Raises `Refused`."""

    def __post_init__(self) -> None:
        try:
            arming(self.ACTION, self.function, argument=self._argument, nth=self.nth, times=self.times, pid=None)
        except UsageError as error:
            raise ValueError(error.message) from error

    def require(self, ctx: FaultContext, target: str) -> None:
        kfault = ctx.kfault()
        kfault.require(self.function)
        try:
            kfault.clear(self._arm(kfault, _NEVER, None))
        except Refused as refused:
            raise Unsupported(refused.message, remedy=refused.remedy) from refused

    def apply(self, ctx: FaultContext, target: str) -> None:
        self._kfault = ctx.kfault()
        self._slot = self._arm(self._kfault, self.nth, ctx.vmms[target].pid if target else None)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        if self._kfault is None or self._slot is None:
            return Evidence(False, f"nothing was armed in {self.function}")
        calls = self._kfault.told(self._slot, self.HAPPENED)
        if not calls:
            return Evidence(None, f"no call of {self.function} was {self.HAPPENED}")
        more = f", and {len(calls) - _SHOWN} more" if len(calls) > _SHOWN else ""
        return Evidence(True, f"{self.function} {self.HAPPENED}: {', '.join(map(_told, calls[:_SHOWN]))}{more}")

    def undo(self, ctx: FaultContext, target: str) -> str:
        if self._kfault is None or self._slot is None:
            return "nothing was armed"
        return f"{self.function} is itself again; {self._kfault.clear(self._slot)} calls were counted"


@dataclass(kw_only=True, slots=True)
class Return(_Calls):
    """Leave calls of a kernel function out and let them return `value`: a number, or an error by its name as -EBUSY.

    They are calls `nth` to `nth + times - 1` from now on, or with `times` 0 all from `nth` on. Which functions may
    return what is in docs/kfault.md. What such a call would have done is not done, and nothing makes it good later.

    An errno that comes of it is put down to the fault. With `planted` it is judged as the kernel's own: so a defect is
    planted that P7 must find.
    """

    ACTION: ClassVar[Action] = Action.RETURN
    HAPPENED: ClassVar[Happening] = Happening.RETURNED
    PROOF: ClassVar[str] = "kfault says of each call that was left out which thread of which process had made it"

    value: int | str
    planted: bool = False

    @property
    def disturbs(self) -> bool:
        return not self.planted

    @property
    def _argument(self) -> int:
        if isinstance(self.value, int):
            return self.value
        number = getattr(errno, self.value.removeprefix("-"), None)
        if not self.value.startswith("-E") or not isinstance(number, int):
            raise UsageError(f"value {self.value!r} is no number, and no error like -EBUSY")
        return -number

    def _arm(self, kfault: Kfault, nth: int, pid: int | None) -> Slot:
        return kfault.returns(self.function, value=self._argument, nth=nth, times=self.times, pid=pid)


@dataclass(kw_only=True, slots=True)
class Delay(_Calls):
    """Stop calls of a kernel function where it begins, each for so many `microseconds`.

    They are calls `nth` to `nth + times - 1` from now on, or with `times` 0 all from `nth` on. Which functions there
    are is in docs/kfault.md.
    """

    ACTION: ClassVar[Action] = Action.DELAY
    HAPPENED: ClassVar[Happening] = Happening.DELAYED
    PROOF: ClassVar[str] = "kfault says of each call that it stopped which thread of which process had made it"

    microseconds: int

    @property
    def _argument(self) -> int:
        return self.microseconds

    def _arm(self, kfault: Kfault, nth: int, pid: int | None) -> Slot:
        return kfault.delay(self.function, microseconds=self.microseconds, nth=nth, times=self.times, pid=pid)


def _told(event: Event) -> str:
    return f"call {event.call} by {event.pid}/{event.tid}"
