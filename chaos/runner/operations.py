# SPDX-License-Identifier: Apache-2.0
"""The operations of a run, as they are written into its history.

An operation has a number, an Invoke when it begins and a Done when it is over, whoever makes it: an agent, the runner
itself, or a loop of which it was one. Whoever changes what the kernel may answer writes it down here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import EIO
from typing import Any, Literal, Protocol

from chaos.history.records import Done, Exited, Fault, Invoke, Record, Released, Value
from chaos.runner.recorder import Recorder


class Process(Protocol):
    """Who an operation is made by, or done to."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...


class OperationLog:
    """`step` is the place in the script that records are made for: -1 before it, its length after it. `moved_from` are
    the VMs whose context a move took, by its answer. `changes` counts what may have changed an answer: while it stays
    the same, to ask again is to ask twice. `phase` is that of operations which are said to be part of none."""

    def __init__(self, recorder: Recorder) -> None:
        self.step = -1
        self.changes = 0
        self.phase = ""
        self.moved_from: set[str] = set()
        self._sources: dict[int, str] = {}  # of moves under way, by operation
        self._recorder = recorder
        self._next = 0

    def now(self) -> int:
        """In ns of CLOCK_MONOTONIC."""
        return self._recorder.now()

    def number(self) -> int:
        """The next operation's."""
        self._next += 1
        return self._next - 1

    def invoke(
        self, op: int, f: str, args: Mapping[str, Any], *, agent: str, pid: int, phase: str = "", t: int | None = None
    ) -> int:
        """An operation begins, at `t` or now; when that is."""
        t = self.now() if t is None else t
        if f == "move":
            self._sources[op] = str(args.get("source", ""))
        self.changes += f != "guest_status"
        self._recorder.write(
            Invoke(t=t, op=op, f=f, agent=agent, pid=pid, step=self.step, phase=phase or self.phase, args=dict(args))
        )
        return t

    def write(self, record: Record) -> None:
        """The end of an operation, or what was seen of some."""
        if isinstance(record, Done) and (source := self._sources.pop(record.op, "")) and record.outcome == "ok":
            self.moved_from.add(source)
        self.changes += isinstance(record, Exited | Fault | Released)
        self._recorder.write(record)

    def note(self, topic: Literal["skipped", "error", "left", "progress"], text: str) -> None:
        self._recorder.note(topic, text, self.step)

    def record(self, f: str, act: Callable[[], None], process: Process | None = None, **args: Value) -> None:
        """Carry out and record an operation that no agent makes, done to `process` if to any. Raises OSError."""
        agent, pid = ("", 0) if process is None else (process.name, process.pid)
        op, failed = self.number(), None
        began = self.invoke(op, f, args, agent=agent, pid=pid)
        try:
            act()
        except OSError as error:
            failed = error
        now, number = self.now(), 0 if failed is None else failed.errno or EIO
        outcome: Literal["ok", "fail"] = "ok" if failed is None else "fail"
        self.write(Done(t=now, op=op, outcome=outcome, errno=number, began=began, ended=now))
        if failed is not None:
            raise failed

    def made(self, process: Process, f: str, args: Mapping[str, Value], *, began: int, ended: int) -> None:
        """Write down an operation that succeeded in the course of another."""
        op, now = self.number(), self.now()
        self.invoke(op, f, args, agent=process.name, pid=process.pid, t=began)
        self.write(Done(t=now, op=op, outcome="ok", began=began, ended=ended))
