# SPDX-License-Identifier: Apache-2.0
"""Holds, delays and failures at the entry of a chosen kernel function: the user-space side of `kfault.ko`.

    with Kfault.open() as kfault:
        slot = kfault.hold("misc_cg_try_charge", pid=destination)
        ...                                      # let the destination begin its move
        kfault.wait_reached(slot, within=5.0)    # it has not charged yet
        kfault.release(slot)

The open file owns what is armed through it. When it is closed, or its process dies, or the module is unloaded, every
slot is disarmed and whoever sleeps in one goes on: an experiment that is killed leaves no task stopped. The file must
therefore not be inherited by the processes that are to be held; it is opened close-on-exec, and who forks closes it.

Slots count the calls of everybody, or of one process or thread, from the moment they are armed; calls `nth` to
`nth + times - 1` get what was asked for. What happened is told by the kernel, as events, and only events are evidence
that a fault was there. docs/kfault.md has the list of functions and what may be asked of each.
"""

from __future__ import annotations

import errno
import os
import re
import select
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.errors import ExitCode, HostLacks, InternalError, SevchaosError, Unsupported, UsageError
from chaos.linux import kallsyms
from chaos.linux.fd import OwnedFd
from chaos.linux.task import NAMELESS, Sleeper, look

CONTROL = Path("/proc/kfault")
EVERY = 0  # as `times`: every call from the nth on

_MAX_NAME = 63  # as in kfault.h
_MAX_DELAY_US = (1 << 32) - 1
_EVENT_BYTES = 4096  # the module wants room for 256
_AT_ONCE = 512  # twice what the module keeps, so that an answer is among them however fast others come
_REMEDY_LOAD = "load the module: in the lab `insmod /lab/kfault.ko`, on a machine of your own see docs/kfault.md"
_REFUSALS = {
    errno.EPERM: "kfault's list does not allow it; docs/kfault.md has the list, `force=1` lets the module go beyond it",
    errno.ENOENT: "this kernel has no such function: inlined by the compiler, or its module is not loaded",
    errno.ENOSPC: "all slots are in use",
    errno.ESRCH: "the process or thread it was to be for is gone",
    errno.EOPNOTSUPP: "ftrace has no place in this function",
    errno.EBUSY: "something else, like a live patch, already changes where this function goes",
}


class Action(StrEnum):
    HOLD = "hold"
    DELAY = "delay"
    RETURN = "return"


class Happening(StrEnum):
    """What an event tells.

    `ATOMIC`: a call was not stopped, because it came where nobody may sleep. `EXITING`: nor was this one, because it
    was made by the owner on its way out. `CLEARED` and `COUNTED` carry as their call how many there have been.
    """

    ARMED = "armed"
    REACHED = "reached"
    RELEASED = "released"
    KILLED = "killed"
    DELAYED = "delayed"
    RETURNED = "returned"
    ATOMIC = "atomic"
    EXITING = "exiting"
    CLEARED = "cleared"
    COUNTED = "counted"


class BadEvent(InternalError):
    """A line from the module that is no event: module and client do not belong together."""


class Refused(HostLacks):
    """The kernel would not arm it; `errno` says why."""

    def __init__(self, what: str, number: int) -> None:
        why = _REFUSALS.get(number, os.strerror(number))
        super().__init__(f"kfault cannot {what}: {why}", remedy="the kernel log has the module's own words")
        self.errno = number


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """A thread that was watched; `sleeper` is None if it has ended."""

    pid: int
    tid: int
    sleeper: Sleeper | None

    def __str__(self) -> str:
        return f"{self.pid}/{self.tid} has ended" if self.sleeper is None else f"{self.pid}/{self.tid}: {self.sleeper}"


class NotReached(SevchaosError):
    """A deadline passed and the call that was to be stopped had not come. `calls` is how many the slot has counted."""

    exit_code = ExitCode.UNKNOWN

    def __init__(self, slot: Slot, within: float, calls: int, where: tuple[Whereabouts, ...]) -> None:
        told = "; ".join(map(str, where)) or "no process was watched"
        super().__init__(
            f"{slot} not reached in {within:g} s ({calls} matching calls): {told}",
            remedy="give it longer, or hold a function that lies on this operation's way",
        )
        self.slot = slot
        self.within = within
        self.calls = calls
        self.where = where


@dataclass(frozen=True, slots=True)
class Event:
    """`call` counts from 1 in its slot; `ns` is CLOCK_MONOTONIC; `lost` is how many events before this one were lost
    because nobody read. For `ARMED` and the like, pid and tid are the owner's."""

    what: Happening
    slot: int
    action: Action
    function: str
    pid: int
    tid: int
    call: int
    ns: int
    lost: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Something that is armed. `function` is the symbol that was found, with what the compiler appended."""

    number: int
    action: Action
    function: str
    nth: int
    times: int
    pid: int | None
    armed_ns: int

    def __str__(self) -> str:
        whose = "" if self.pid is None else f" for {self.pid}"
        return f"the {self.action} of {self.function} (call {self.nth}{whose})"


_FIELDS = ("event", "slot", "action", "function", "pid", "tid", "call", "ns", "lost")
_NUMBER = re.compile(r"[0-9]{1,20}", re.ASCII)


def parse_event(line: bytes) -> Event:
    """One line of the module's. Fields it does not know are passed over. Raises `BadEvent`."""
    fields: dict[str, str] = {}
    for word in line.decode(errors="replace").split():
        name, equals, value = word.partition("=")
        if not equals or name in fields:
            raise BadEvent(f"kfault said {line!r}: {word!r} is not a field, or there twice")
        fields[name] = value
    if missing := [name for name in _FIELDS if name not in fields]:
        raise BadEvent(f"kfault said {line!r}: no {missing[0]}")

    def number(name: str) -> int:
        if not _NUMBER.fullmatch(fields[name]):
            raise BadEvent(f"kfault said {line!r}: {name} is not a number")
        return int(fields[name])

    try:
        what, action = Happening(fields["event"]), Action(fields["action"])
    except ValueError as error:
        raise BadEvent(f"kfault said {line!r}: {error}") from None
    slot, pid, tid, call, ns, lost = map(number, ("slot", "pid", "tid", "call", "ns", "lost"))
    return Event(what, slot, action, fields["function"], pid, tid, call, ns, lost)


def arming(action: Action, function: str, *, argument: int | None, nth: int, times: int, pid: int | None) -> str:
    """The command. Raises `UsageError` for what the kernel would not take from anybody."""
    if len(function) > _MAX_NAME or not re.fullmatch(r"[A-Za-z_][\w.]*", function, re.ASCII):
        raise UsageError(f"{function!r} is not the name of a kernel function")
    if nth < 1 or times < 0 or max(nth, times) >= 1 << 63:
        raise UsageError(f"nth={nth}, times={times}: calls count from 1, and times=0 means every one from there on")
    if pid is not None and not 0 < pid < 1 << 31:
        raise UsageError(f"pid={pid}: not a process or thread")
    words = [action.value, function]
    if action is Action.DELAY:
        if argument is None or not 0 <= argument <= _MAX_DELAY_US:
            raise UsageError(f"a delay of {argument} us: it may be 0 to {_MAX_DELAY_US}")
        words.append(f"us={argument}")
    elif action is Action.RETURN:
        if argument is None or not -(1 << 63) <= argument < 1 << 63:
            raise UsageError(f"{argument} does not fit what a function returns")
        words.append(f"value={argument}")
    words += [f"nth={nth}", f"times={times}"]
    if pid is not None:
        words.append(f"pid={pid}")
    return " ".join(words)


class Kfault:
    """One open /proc/kfault. `log` keeps every event that was read, in order."""

    def __init__(self, fd: OwnedFd, *, proc: Path = Path("/proc"), ioctls: Mapping[int, str] = NAMELESS) -> None:
        self.fd = fd
        self.log: list[Event] = []
        self._unclaimed: list[Event] = []
        self._armed: dict[int, Slot] = {}
        self._proc = proc
        self._ioctls = ioctls

    @classmethod
    def open(cls, path: Path = CONTROL, *, proc: Path = Path("/proc"), ioctls: Mapping[int, str] = NAMELESS) -> Self:
        """`ioctls` are the names by which it tells which one a thread is in. Raises `HostLacks`."""
        try:
            return cls(OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)), proc=proc, ioctls=ioctls)
        except FileNotFoundError:
            raise HostLacks(f"{path} is not there: kfault.ko is not loaded", remedy=_REMEDY_LOAD) from None
        except PermissionError:
            raise HostLacks(f"{path} may not be opened", remedy="become root") from None

    # -- arming -------------------------------------------------------------------------------------------

    def require(self, function: str) -> None:
        """Raises `Unsupported` if this kernel has no such function to be stopped at."""
        found = self._copies(function)
        if function not in found and len(found) != 1:
            raise Unsupported(
                f"this kernel has no function {function} to be stopped at: it was inlined, or is another version's",
                remedy="docs/kfault.md says which functions which kernel has",
            )

    def hold(self, function: str, *, nth: int = 1, times: int = 1, pid: int | None = None) -> Slot:
        """Stop a call at the function's entry until it is released, or its thread is killed. Raises `Refused`."""
        return self._arm(Action.HOLD, function, None, nth, times, pid)

    def delay(self, function: str, *, microseconds: int, nth: int = 1, times: int = 1, pid: int | None = None) -> Slot:
        """Stop a call at the function's entry for so long. Raises `Refused`."""
        return self._arm(Action.DELAY, function, microseconds, nth, times, pid)

    def returns(self, function: str, *, value: int, nth: int = 1, times: int = 1, pid: int | None = None) -> Slot:
        """Leave a call out and let it return `value`; -16 is -EBUSY. Raises `Refused`."""
        return self._arm(Action.RETURN, function, value, nth, times, pid)

    def _arm(self, action: Action, function: str, argument: int | None, nth: int, times: int, pid: int | None) -> Slot:
        command = arming(action, function, argument=argument, nth=nth, times=times, pid=pid)
        try:
            self._write(command)
        except OSError as error:
            found = self._copies(function) if error.errno == errno.ENOENT else ()
            if len(found) != 1 or function in found:
                raise Refused(f"{action} {function}", error.errno or 0) from None
            return self._arm(action, found[0], argument, nth, times, pid)
        # Only arming makes this event, and every earlier one has been claimed here.
        armed = self._claim(lambda event: event.what is Happening.ARMED)
        if armed is None:
            raise InternalError(f"kfault took {command!r} and did not say so")
        slot = Slot(armed.slot, action, armed.function, nth, times, pid, armed.ns)
        self._unclaimed = [event for event in self._unclaimed if event.slot != slot.number or event.ns >= armed.ns]
        self._armed[slot.number] = slot
        return slot

    def _copies(self, function: str) -> tuple[str, ...]:
        return kallsyms.copies(function, kallsyms.kallsyms(self._proc))

    # -- what is armed ------------------------------------------------------------------------------------

    def release(self, slot: Slot) -> None:
        """Let those go on who are held in it now. It stays armed for what is left of its `times`."""
        self._command("release", slot)

    def clear(self, slot: Slot) -> int:
        """Disarm it and let everybody go on: how many calls it has counted."""
        self._command("clear", slot)
        del self._armed[slot.number]
        return self._told(slot, Happening.CLEARED)

    def count(self, slot: Slot) -> int:
        """How many calls it has counted so far."""
        self._command("count", slot)
        return self._told(slot, Happening.COUNTED)

    def _command(self, verb: str, slot: Slot) -> None:
        if self._armed.get(slot.number) is not slot:
            raise InternalError(f"{slot} is not armed")
        self._write(f"{verb} {slot.number}")

    def _told(self, slot: Slot, what: Happening) -> int:
        event = self._claim(lambda event: event.what is what and event.slot == slot.number)
        if event is None:
            raise InternalError(f"kfault did not answer about {slot}")
        return event.call

    def _write(self, command: str) -> None:
        """Raises OSError, but `HostLacks` if the module is gone."""
        try:
            os.write(self.fd.number, command.encode())
        except OSError as error:
            if error.errno == errno.EIO:
                raise _unloaded() from None
            raise

    # -- events -------------------------------------------------------------------------------------------

    def events(self) -> tuple[Event, ...]:
        """What has happened since the last look, without waiting. It is in `log` too, and stays to be waited for."""
        new: list[Event] = []
        while len(new) < _AT_ONCE:
            try:
                line = os.read(self.fd.number, _EVENT_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise _unloaded() if error.errno == errno.EIO else error from None
            new.append(parse_event(line))
        self.log += new
        self._unclaimed += new
        return tuple(new)

    def told(self, slot: Slot, what: Happening) -> tuple[Event, ...]:
        """All such events of this slot so far, whether or not they were waited for."""
        self.events()
        mine = (event for event in self.log if event.slot == slot.number and event.ns >= slot.armed_ns)
        return tuple(event for event in mine if event.what is what)

    def wait(self, slot: Slot, what: Happening, *, within: float, call: int | None = None) -> Event | None:
        """The next such event of this slot that was not waited for before; None if it does not come in `within`
        seconds. `call` asks for the one about that call."""

        def wanted(event: Event) -> bool:
            return event.slot == slot.number and event.what is what and call in (None, event.call)

        deadline = time.monotonic() + within
        poll = select.poll()
        poll.register(self.fd.number, select.POLLIN)
        while (event := self._claim(wanted)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            poll.poll(left * 1000)
        return event

    def wait_reached(self, slot: Slot, *, within: float, watch: Iterable[int] = ()) -> Event:
        """The next call that is stopped in this slot. If none comes, `NotReached` says where the processes of `watch`,
        and the one the slot is for, were instead."""
        event = self.wait(slot, Happening.REACHED, within=within)
        if event is None:
            processes = dict.fromkeys([*(() if slot.pid is None else (slot.pid,)), *watch])
            where = tuple(there for pid in processes for there in whereabouts(pid, self._proc, self._ioctls))
            event = self.wait(slot, Happening.REACHED, within=0)  # while we looked
        if event is None:
            raise NotReached(slot, within, self.count(slot), where)
        return event

    def _claim(self, wanted: Callable[[Event], bool]) -> Event | None:
        self.events()
        for at, event in enumerate(self._unclaimed):
            if wanted(event):
                return self._unclaimed.pop(at)
        return None

    # -- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Disarm everything, and let everybody go on."""
        self._armed.clear()
        self.fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def whereabouts(pid: int, proc: Path = Path("/proc"), ioctls: Mapping[int, str] = NAMELESS) -> tuple[Whereabouts, ...]:
    """Every thread of a process, or the one thread that `pid` names."""
    try:
        leader = re.search(r"^Tgid:\t(\d+)$", (proc / str(pid) / "status").read_text(), re.MULTILINE)
        whole = leader is not None and int(leader[1]) == pid
        tids = sorted(int(task.name) for task in (proc / str(pid) / "task").iterdir()) if whole else [pid]
    except OSError:
        tids = []
    return tuple(Whereabouts(pid, tid, look(pid, tid, proc, ioctls=ioctls)) for tid in tids or [pid])


def _unloaded() -> HostLacks:
    return HostLacks("kfault.ko was unloaded while it was in use", remedy=_REMEDY_LOAD)
