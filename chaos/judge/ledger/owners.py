# SPDX-License-Identifier: Apache-2.0
"""What a GUEST_STATUS says of who owns a context, given what had been done to its VM before.

Commands reach the firmware by the number of a descriptor of /dev/sev, which LAUNCH_START leaves with the context. One
that was moved has lost it (docs/findings/0001), and so has a mirror that is made of its VM afterwards; one that was not
launched has none yet. GUEST_STATUS of such a VM answers EBADF, and only where there is a context. Any other EBADF comes
from a descriptor that is not there, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from chaos.history.reading import argument, owns
from chaos.history.records import Done, History, Invoke
from chaos.judge.ledger.effects import took_effect


@dataclass(frozen=True, slots=True)
class Owners:
    """`numbers` has, by VM, the records from which on its context had no number of a descriptor (True) or its own, or
    there was no context (False). `cut_off` are the records at which processes lost their /dev/sev, with the process."""

    numbers: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)
    cut_off: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, history: History) -> Owners:
        operations = tuple(history.operations())
        cut_off = ((i.seq, i.agent) for i, _ in operations if i.f == "lose_fd" and argument(i, "fd") == "sev")
        owners = cls(cut_off=tuple(cut_off))
        for invoke, done in operations:
            for lost in owners._changes(invoke, done):
                owners.numbers.setdefault(argument(invoke, "vm"), []).append((invoke.seq, lost))
        return owners

    def says(self, invoke: Invoke, done: Done) -> bool | None:
        """Whether the VM of this GUEST_STATUS owns a context, None if the answer does not say."""
        reaches = not any(seq < invoke.seq and agent == invoke.agent for seq, agent in self.cut_off)
        return owns(done, numberless=reaches and self._numberless(argument(invoke, "vm"), invoke.seq))

    def _changes(self, invoke: Invoke, done: Done | None) -> Iterator[bool]:
        """What the operation does to the number that its VM's context goes by; nothing if nothing."""
        happened = done is None or done.outcome == "info" or took_effect(invoke, done)
        if not happened:
            return
        source, vm = argument(invoke, "source"), argument(invoke, "vm")
        if invoke.f in ("create", "launch_start"):
            yield False
        elif invoke.f == "mirror":
            yield self._numberless(source, invoke.seq)
        elif invoke.f == "init" or (invoke.f == "move" and source != vm):
            yield True
        elif invoke.f == "moves" and (done is None or done.outcome == "info"):
            yield True  # those of a loop that succeeded are recorded by themselves, unless it was killed

    def _numberless(self, vm: str, before: int) -> bool:
        return next((lost for seq, lost in reversed(self.numbers.get(vm, [])) if seq < before), False)
