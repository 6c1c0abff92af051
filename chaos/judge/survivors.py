# SPDX-License-Identifier: Apache-2.0
"""Who outlived a fatal signal.

That a process has ended is on record (`Exited`). That one has not shows in what it does: a thread is given a fatal
signal before it comes back to user space, so a process that begins another operation long after it was sent one was
not killed by it. One that begins nothing any more may be waiting where no signal reaches it, as for the firmware; that
is no survivor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chaos.history.reading import fatal
from chaos.history.records import Done, Exited, Fault, History, Invoke

NS = 1_000_000_000
# Of 300 runs in the lab the slowest killed process was gone 0.26 s after the signal: it has to close its VM, and CPUs
# are shared. This leaves a starved machine forty times as long, and is a third of what the runner waits for a killed
# process.
ENDS_WITHIN = 10.0
# Done to a process, not by it.
_NOT_ITS_OWN = frozenset({"enter", "memlock"})


@dataclass(frozen=True, slots=True)
class Survivor:
    """The process `agent`, which `fault` sent a fatal signal, and what it began more than ENDS_WITHIN later."""

    fault: Fault
    agent: str
    invoke: Invoke
    done: Done

    @property
    def after(self) -> float:
        """In seconds."""
        return (self.done.began - self.fault.t) / NS


def survivors(history: History) -> Iterator[Survivor]:
    """At most one of each fault and process."""
    operations = tuple(history.operations())
    for fault in history.records:
        if isinstance(fault, Fault) and fault.event == "apply" and fatal(fault):
            for agent in dict.fromkeys(fault.ends):
                found = _survived(history, fault, agent, operations)
                if found is not None:
                    yield found


def _survived(
    history: History, fault: Fault, agent: str, operations: tuple[tuple[Invoke, Done | None], ...]
) -> Survivor | None:
    ends = (r.seq for r in history.records if isinstance(r, Exited) and r.agent == agent and r.seq > fault.seq)
    end = next(ends, len(history.records))
    for invoke, done in operations:
        if invoke.agent == agent and invoke.f == "spawn" and invoke.seq > fault.seq:
            return None  # from here on the name is another process's
        own = invoke.agent == agent and invoke.f not in _NOT_ITS_OWN and fault.seq < invoke.seq < end
        if own and done is not None and done.outcome != "info" and done.began > fault.t + int(ENDS_WITHIN * NS):
            return Survivor(fault, agent, invoke, done)
    return None
