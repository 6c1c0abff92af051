# SPDX-License-Identifier: Apache-2.0
"""Kernel events of a run: what the kernel's own tracer saw of the moves and the charges.

`trace_pipe` gives a line an event, as text:

      python3-345   [001] .....   120.505123: misc_cg_try_charge_enter: (misc_cg_try_charge+0x4/0x110) type=0 css=0xff…

It is read whenever something is there, so that a kernel that panics costs the last few events and no more. A reader
that falls behind is told so in the same file, "CPU:1 [LOST 12 EVENTS]".

A charge names its cgroup by an address. Whose it is the tracer tells too: a cgroup's part of the misc controller is
allocated (`misc_cg_alloc`) by the thread that then is seen to have made the cgroup (`cgroup_mkdir`). Addresses are not
written down; a kernel may keep them secret.

Events are evidence for whoever reads a report. No verdict rests on them alone: they may be missing, and they are lost
when there are too many.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chaos.history.records import Traced, Value
from chaos.linux import tracefs
from chaos.linux.fd import OwnedFd
from chaos.linux.kallsyms import base_name
from chaos.linux.loop import Loop
from chaos.linux.tracefs import Instance, NoTracing
from chaos.runner.recorder import Recorder

Untraced = Callable[[], AbstractContextManager[None]]

MOST = 20_000
"""Of more events than this in a run the rest is left out: whoever tries a move a million times knows what it does."""

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO
_CHUNK = 1 << 16
_KEYS = {"0": "sev", "1": "sev_es"}  # enum misc_res_type
_LINE = re.compile(
    r" *.+-(?P<tid>\d+) +\[\d+\] \S+ +(?P<seconds>\d+)\.(?P<microseconds>\d{6}): (?P<name>\w+): (?P<rest>.*)"
)
_CALL = re.compile(
    r"\((?P<caller>.* <- )?(?P<function>[\w.]+)(?:\+0x\w+/0x\w+)?(?: \[\w+\])?\)(?P<fields>(?: \w+=\S+)*)"
)
_MADE = re.compile(r"root=\d+ id=\d+ level=\d+ path=(?P<path>.*)")
_LOST = re.compile(r"CPU:\d+ \[LOST (?:(?P<count>\d+) )?EVENTS\]")


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """A function was entered, or left."""

    t: int
    tid: int
    leaving: bool
    function: str
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class Made:
    """A thread has made the cgroup of this path, from the root of the hierarchy."""

    tid: int
    path: str


@dataclass(frozen=True, slots=True)
class EventsLost:
    """So many events were overwritten; at least so many, where the kernel does not count them."""

    count: int


class Damaged(ValueError):
    """A line that is no event."""


def parse(line: str) -> KernelEvent | Made | EventsLost:
    """A line of trace_pipe. Raises `Damaged`."""
    if lost := _LOST.fullmatch(line):
        return EventsLost(int(lost["count"] or 1))
    event = _LINE.fullmatch(line)
    if event is None:
        raise Damaged(line)
    if event["name"] == "cgroup_mkdir" and (made := _MADE.fullmatch(event["rest"])):
        return Made(int(event["tid"]), made["path"])
    call = _CALL.fullmatch(event["rest"])
    if call is None:
        raise Damaged(line)
    t = int(event["seconds"]) * 1_000_000_000 + int(event["microseconds"]) * 1_000
    fields = dict(field.split("=", 1) for field in call["fields"].split())
    return KernelEvent(t, int(event["tid"]), call["caller"] is not None, base_name(call["function"]), fields)


class TracedCgroups:
    """The cgroups of the run `name` by the address of their part of the misc controller."""

    def __init__(self, name: str) -> None:
        self._below = f"/{name}/"
        self._allocated: dict[int, str] = {}  # what each thread has allocated and not yet made a cgroup of
        self._names: dict[str, str] = {}

    def allocated(self, tid: int, address: str) -> None:
        self._allocated[tid] = address
        self._names.pop(address, None)  # it was somebody else's before

    def made(self, tid: int, path: str) -> None:
        address = self._allocated.pop(tid, None)
        _, found, name = path.partition(self._below)
        if address is not None and found:
            self._names[address] = name

    def name(self, address: str) -> str | None:
        return self._names.get(address)


class Recording:
    """The events of one run, from the tracer into its history."""

    def __init__(self, instance: Instance, recorder: Recorder, run: str) -> None:
        """Begins. Raises OSError."""
        self._instance = instance
        self._recorder = recorder
        self._cgroups = TracedCgroups(run)
        self._rest = b""
        self._count = self._lost = self._damaged = 0
        self._missed = instance.missed()
        self.pipe = instance.open("trace_pipe")
        try:
            instance.write("tracing_on", "1")
        except BaseException:
            self.pipe.close()
            raise

    def read(self) -> None:
        """Record what is there. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe.number, _CHUNK):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._take(line.decode(errors="replace"))

    def _take(self, line: str) -> None:
        try:
            event = parse(line)
        except Damaged:
            self._damaged += 1
            return
        match event:
            case EventsLost():
                self._lost += event.count
            case Made():
                self._cgroups.made(event.tid, event.path)
            case KernelEvent(function="misc_cg_alloc"):
                self._cgroups.allocated(event.tid, event.fields.get("css", ""))
            case KernelEvent():
                self._record(event)

    def _record(self, call: KernelEvent) -> None:
        self._count += 1
        if self._count <= MOST:
            event: Literal["enter", "leave"] = "leave" if call.leaving else "enter"
            values = self._values(call.fields)
            self._recorder.write(Traced(t=call.t, event=event, function=call.function, tid=call.tid, values=values))
        elif self._count == MOST + 1:
            self._instance.write("tracing_on", "0")
            self._recorder.lost("events", f"kernel events: more than {MOST}; the rest is not recorded")

    def _values(self, fields: dict[str, str]) -> dict[str, Value]:
        if "css" not in fields:
            return {name: int(value) for name, value in fields.items()}
        kind = fields.get("type", "")
        values: dict[str, Value] = {"key": _KEYS.get(kind, f"type {kind}"), "amount": int(fields.get("amount", 0))}
        cgroup = self._cgroups.name(fields["css"])
        if cgroup is not None:
            values["cgroup"] = cgroup
        return values

    def switch(self, *, on: bool) -> None:
        """Go on after a pause, or make one. Raises OSError."""
        if self._count <= MOST:
            self._instance.write("tracing_on", str(int(on)))

    def end(self) -> None:
        """Record what is left, and say what is missing. Raises OSError."""
        self._instance.write("tracing_on", "0")
        self.read()
        lost = self._lost + self._instance.missed() - self._missed
        if lost:
            self._recorder.lost("events", f"kernel events: {lost} were lost")
        if self._damaged or self._rest:
            self._recorder.lost("events", f"kernel events: {self._damaged + bool(self._rest)} lines are damaged")


class Tracer:
    """The kernel events of one run after the other. `why` says why there are none, "" if there are."""

    def __init__(self, instance: Instance | None, why: str) -> None:
        self._instance = instance
        self.why = why

    @classmethod
    def open(cls, root: Path = tracefs.ROOT, proc: Path = Path("/proc")) -> Tracer:
        if str((proc / "self/ns/pid").readlink()) != _INITIAL_PID_NAMESPACE:
            return cls(None, "the runner is in a container, where threads go by other numbers than the kernel's")
        try:
            return cls(tracefs.make(root), "")
        except NoTracing as error:
            return cls(None, str(error))

    @contextlib.contextmanager
    def recording(self, loop: Loop, recorder: Recorder, run: str) -> Iterator[Untraced]:
        """Record what the threads of the run do inside the block. `run` is the name of its cgroup. Gives what makes a
        pause: an event takes longer than a move, and that of the thousandth tells nothing new."""
        recording = self._begin(recorder, run)
        if recording is None:
            yield contextlib.nullcontext
            return
        pipe = recording.pipe

        def read() -> None:
            with self._surviving(loop, pipe, recorder):
                recording.read()

        @contextlib.contextmanager
        def paused() -> Iterator[None]:
            recorder.lost("events", "kernel events: none are recorded while loops of moves are under way")
            with self._surviving(loop, pipe, recorder):
                recording.switch(on=False)
            try:
                yield
            finally:
                with self._surviving(loop, pipe, recorder):
                    recording.switch(on=True)

        loop.watch(pipe.number, read)
        try:
            yield paused
        finally:
            loop.forget(pipe.number)
            with pipe, self._surviving(loop, pipe, recorder):
                recording.end()

    def _begin(self, recorder: Recorder, run: str) -> Recording | None:
        why = self.why
        if self._instance is not None:
            if self._instance.missing:
                absent = ", ".join(self._instance.missing)
                recorder.lost("events", f"kernel events: no probe can be put on {absent}")
            try:
                return Recording(self._instance, recorder, run)
            except OSError as error:
                why = f"{error.filename}: {error.strerror}"
        recorder.lost("events", f"there are no kernel events: {why}")
        return None

    @contextlib.contextmanager
    def _surviving(self, loop: Loop, pipe: OwnedFd, recorder: Recorder) -> Iterator[None]:
        """A tracer that fails costs its events and nothing else."""
        try:
            yield
        except OSError as error:
            loop.forget(pipe.number)
            recorder.lost("events", f"kernel events: no more of them: {error.strerror}")

    def close(self) -> None:
        """What cannot be removed now, the warden or `sevchaos clean` will find."""
        if self._instance is not None:
            with contextlib.suppress(OSError):
                self._instance.remove()
            self._instance = None
