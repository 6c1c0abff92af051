# SPDX-License-Identifier: Apache-2.0
"""The witness of ASIDs: with which ones a CPU has entered guests (`chaos.linux.vm_entries`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from chaos.history.records import Entered
from chaos.linux.tracefs import NoTracing
from chaos.linux.vm_entries import EntryCounter
from chaos.runner.recorder import Recorder

_SHOWN = 16


@dataclass(slots=True)
class EntryWitness:
    """At most one count of each CPU is under way."""

    recorder: Recorder
    _under_way: dict[int, tuple[int, EntryCounter]] = field(default_factory=dict)

    def begin(self, cpu: int) -> None:
        """Count anew from now on. Where it cannot be counted that is recorded."""
        self.end(cpu)
        try:
            self._under_way[cpu] = self.recorder.now(), EntryCounter(cpu)
        except NoTracing as error:
            self.recorder.lost("entries", f"entries into guests: {error}")

    def end(self, cpu: int) -> None:
        """Record what was counted, if anything was."""
        if cpu not in self._under_way:
            return
        since, counter = self._under_way.pop(cpu)
        try:
            for each in counter.read():
                shown = tuple(sorted(each.shared)[:_SHOWN])
                record = Entered(
                    t=self.recorder.now(), cpu=cpu, since=since, vcpu=each.vcpu, tids=each.tids, asid=each.asid,
                    generations=len(each.generations), shared=shown, count=each.count,
                )  # fmt: skip
                self.recorder.write(record)
        except (NoTracing, OSError) as error:
            self.recorder.lost("entries", f"entries into guests: {error}")
        finally:
            counter.close()
