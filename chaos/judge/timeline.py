# SPDX-License-Identifier: Apache-2.0
"""What was under way when the kernel said or did something.

The kernel's records carry a time, and those of its tracer a thread; what they belong to is worked out here, by whoever
reads a history, and not written down. It could not be, when it is recorded: an event may be read before the thread is
known that made it, and after the answer of its operation was.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from chaos.history.reading import argument
from chaos.history.records import History, Invoke, Traced

ROUNDING = 1_000  # the tracer's times are to the nearest microsecond, those around a system call to the nanosecond


@dataclass(frozen=True, slots=True)
class Span:
    """An operation, from its first system call to its last as far as that was told."""

    invoke: Invoke
    begin: int
    end: int


class During:
    """The operations of a history by thread and time."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._threads: dict[int, list[Span]] = {}
        self._processes: set[int] = set()
        self._unanswered: list[Invoke] = []
        for invoke, done in history.operations():
            self._processes.add(invoke.pid)
            if done is None:
                self._unanswered.append(invoke)
            else:
                span = Span(invoke, done.began or invoke.t, done.ended or done.t)
                self._threads.setdefault(done.tid or invoke.pid, []).append(span)
        for calls in self._threads.values():
            calls.sort(key=lambda span: span.begin)

    def at(self, t: int) -> tuple[Invoke, ...]:
        """The operations that were under way then, in the order in which they were begun."""
        operations = self._history.operations()
        return tuple(invoke for invoke, done in operations if invoke.t <= t and (done is None or t <= done.t))

    def made(self, event: Traced) -> Invoke | None:
        """The operation that the event is part of, None if it is part of none.

        Nobody has told the thread of an operation that never answered: an event of a thread that is nobody else's is
        its, if there is only one such operation. A move is never made by a process's first thread. An operation that
        was killed ends with its process: what its thread does in dying counts with it.
        """
        calls = self._threads.get(event.tid, ())
        at = bisect_right(calls, event.t + ROUNDING, key=lambda span: span.begin)
        if at and event.t <= calls[at - 1].end + ROUNDING:
            return calls[at - 1].invoke
        stranger = event.tid not in self._threads and event.tid not in self._processes
        lost = [
            invoke
            for invoke in self._unanswered
            if invoke.t <= event.t and (stranger or (event.tid == invoke.pid and invoke.f != "move"))
        ]
        return lost[0] if len(lost) == 1 else None

    def left(self, entered: Traced) -> Traced | None:
        """When the thread left the function again, None if that was not seen."""
        ends = (
            record
            for record in self._history.records
            if isinstance(record, Traced) and record.event == "leave" and record.t >= entered.t
            if (record.tid, record.function) == (entered.tid, entered.function)
        )
        return min(ends, key=lambda event: event.t, default=None)

    @cached_property
    def events(self) -> dict[int, tuple[Traced, ...]]:
        """The events of each operation that has some, by its number and in the order of their times."""
        events: dict[int, list[Traced]] = {}
        for record in self._history.records:
            if isinstance(record, Traced) and (invoke := self.made(record)) is not None:
                events.setdefault(invoke.op, []).append(record)
        return {op: tuple(sorted(found, key=lambda event: event.t)) for op, found in events.items()}


def told(event: Traced) -> str:
    """The event in words: "entered misc_cg_uncharge (key sev, amount 1, cgroup source)"."""
    values = ", ".join(f"{name} {value}" for name, value in event.values.items())
    return f"{'entered' if event.event == 'enter' else 'left'} {event.function}" + (f" ({values})" if values else "")


def named(invoke: Invoke) -> str:
    """The operation in words: "move of new"."""
    return f"{invoke.f} of {argument(invoke, 'vm') or invoke.agent}"
