# SPDX-License-Identifier: Apache-2.0
"""The firmware's contexts, replayed from the commands that it was sent, and what was done to those on purpose.

When a VM goes, KVM sends DEACTIVATE and DECOMMISSION once each, gives the charge back, and does not look at the answers
(sev_unbind_asid, sev_decommission, sev_asid_free in arch/x86/kvm/svm/sev.c). So a firmware that was made to refuse
keeps a context that nobody will ever take from it. That is owed to the fault and no leak of the kernel's: where it can
be counted the counts are put right by it, and where it cannot nothing is concluded from them.

The words of `Firmware.fault` are those of docs/firmware.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from errno import EBUSY, ETIMEDOUT
from itertools import pairwise

from chaos.history.reading import argument
from chaos.history.records import Done, Firmware, History, Invoke, Kernel, Note, Observation
from chaos.judge.ledger.commands import DEBUGS, DOUBT, LOOKS, Matched

STARTS = frozenset({"LAUNCH_START", "RECEIVE_START"})
ENDS = "DECOMMISSION"
GONE = "firmware-gone"
"""What a verdict's signature says where the firmware cannot be asked any more."""
TIMED_OUT = "timed out, disabling PSP"  # drivers/crypto/ccp/sev-dev.c
HONEST = frozenset({"", "delay", "stall", "withhold"})
"""What leaves the answer as the firmware gives it, in the end."""
NOT_DONE = frozenset({"fail", "skip"})
SENDS = {
    "init": frozenset({"INIT", "INIT_EX", "DF_FLUSH"}),
    "launch_start": frozenset({"LAUNCH_START", "ACTIVATE"}),
    "dbg_encrypt": frozenset(DEBUGS.values()),
}
"""Of the operations that are more than the command of their name, which they send."""
# What leaves a context with its ASID, where the kernel thinks it has none: the firmware then refuses DECOMMISSION.
_LEFT_BOUND = {"ACTIVATE": {"lie"}, "DEACTIVATE": NOT_DONE}


@dataclass(frozen=True, slots=True)
class Owed:
    """A context that is in the firmware from `t` on and that no VM has. `record` is the command that left it there."""

    t: int
    record: Firmware
    why: str


@dataclass(slots=True)
class Contexts:
    """`live` are the starts of contexts that were never ended and are not owed to a fault. `ended` are the
    DECOMMISSIONs of the others. `refused` are those that the firmware refused for no fault's sake, and those of
    contexts that a fault had kept when they were asked for before. `gone` is why the firmware cannot be asked any more,
    "" if it can, and `gone_at` since when. `seen` are all commands, `tampered` those to which something was done.
    `gaps` are the pairs between which records are missing. It is `whole` if none are, from the first command on."""

    live: dict[int, Firmware] = field(default_factory=dict)
    ended: list[Firmware] = field(default_factory=list)
    refused: list[Firmware] = field(default_factory=list)
    owed: list[Owed] = field(default_factory=list)
    gone: str = ""
    gone_at: int = 0
    gaps: tuple[tuple[Firmware, Firmware], ...] = ()
    whole: bool = False
    seen: tuple[Firmware, ...] = ()
    tampered: list[Firmware] = field(default_factory=list)
    matched: Matched = field(default_factory=Matched)
    _bound: set[int] = field(default_factory=set)
    _kept: set[int] = field(default_factory=set)
    _garbled: bool = False

    @classmethod
    def of(cls, history: History) -> Contexts:
        seen = [record for record in history.records if isinstance(record, Firmware)]
        gaps = tuple((a, b) for a, b in pairwise(seen) if b.order != a.order + 1)
        notes = [r for r in history.records if isinstance(r, Note) and r.topic == "witness"]
        lost = history.damage or any(note.witness in ("", "firmware") for note in notes)
        whole = bool(seen) and seen[0].order == 0 and not gaps and not lost
        contexts = cls(seen=tuple(seen), gaps=gaps, whole=whole, matched=Matched.of(history))
        for line in history.records:
            if isinstance(line, Kernel) and TIMED_OUT in line.text:
                contexts._lose(line.t, "the kernel has given it up as dead")
        for record in seen:
            contexts._take(record)
        return contexts

    # -- what is asked ------------------------------------------------------------------------------------

    def guests(self, observation: Observation) -> int | None:
        """The firmware's guest count without what is owed to faults; None if the count says nothing."""
        if observation.guests is None or self.blind(observation):
            return None
        return observation.guests - len(self.owed_at(observation.t))

    def blind(self, observation: Observation) -> str:
        """Why the guest count of an observation says nothing, "" if it does."""
        if self.gone_by(observation.until):
            return self.gone
        if self.gaps and self.tampered:
            return "not every command was recorded, and some were tampered with"
        for record in self._tampered(LOOKS, observation, observation.t, observation.until):
            return f"the answer was tampered with ({record.fault})"
        return ""

    def gone_by(self, t: int) -> bool:
        """Whether nothing that the firmware is asked from then on is answered by the one that has the contexts."""
        return bool(self.gone) and t >= self.gone_at

    @property
    def obeys(self) -> bool:
        """Whether the firmware was watched from the first command to the last and nothing was done to any answer."""
        return self.whole and not (self.tampered or self.gone)

    def owed_at(self, t: int) -> tuple[Owed, ...]:
        return tuple(owed for owed in self.owed if owed.t <= t)

    def honest(self, invoke: Invoke, done: Done) -> bool:
        """Whether the answer to a GUEST_STATUS is the firmware's own word, or the kernel's, who never asked it."""
        if done.outcome == "fail" and not done.firmware and done.errno not in (EBUSY, ETIMEDOUT):
            return True
        if self.gone_by(done.t):
            return False
        return not any(self._tampered(invoke.f.upper(), done, invoke.t, done.t))

    def flush_failed(self, invoke: Invoke, done: Done) -> bool:
        """Whether a DF_FLUSH was made to fail while the operation was under way: freed ASIDs are then not to be had."""
        return any(record.status for record in self._tampered("DF_FLUSH", done, invoke.t, done.t))

    def initialised(self, invoke: Invoke, done: Done) -> bool:
        """Whether INIT_EX was sent while the operation was under way, as far as anybody can say: the host writes the
        firmware's state down then."""
        sent = (r.t for r in self.seen if r.command == "INIT_EX")
        return not self.whole or any(invoke.t - DOUBT <= t <= done.t + DOUBT for t in sent)

    def refusals(self, invoke: Invoke, done: Done) -> frozenset[int]:
        """The statuses with which a firmware that was tampered with refused commands of the operation's, as it was seen
        to. One that does what it must refuses only what it has a reason for, which is another question."""
        if not self.whole or self.obeys:
            return frozenset()
        commands, began = _sent_by(invoke), done.began or invoke.t
        near = (r for r in self.seen if r.command in commands and began - DOUBT <= r.t <= done.t + DOUBT)
        return frozenset(record.status for record in near if record.status > 0)

    def _tampered(self, command: str, answered: Done | Observation, began: int, ended: int) -> Iterator[Firmware]:
        """The commands of that name that were tampered with and are, or may be, what this answer is of."""
        own = self.matched.orders.get(answered.seq)
        last, first = self.matched.between(began, ended)
        for record in self.tampered:
            if record.command != command:
                continue
            near = began - DOUBT <= record.t <= ended + DOUBT and last < record.order < first
            if record.order == own or (own is None and near):
                yield record

    # -- the replay ---------------------------------------------------------------------------------------

    def _take(self, record: Firmware) -> None:
        word = _word(record)
        if word not in HONEST:
            self.tampered.append(record)
        if word == "dead":
            self._lose(record.t, "it is dead")
        elif word == "reset":
            self._lose(record.t, "it was reset")
        if record.command in STARTS:
            self._start(record, word)
        elif record.command == ENDS:
            self._end(record, word)
        elif word in _LEFT_BOUND.get(record.command, ()) and record.handle is not None:
            self._bound.add(record.handle)

    def _lose(self, t: int, why: str) -> None:
        if not self.gone or t < self.gone_at:
            self.gone, self.gone_at = f"the firmware cannot be asked: {why}", t

    def _start(self, record: Firmware, word: str) -> None:
        """A handle may be given anew once its context has ended."""
        handle = record.handle
        if handle is None or word in NOT_DONE or (record.status and word != "lie"):
            return
        self._bound.discard(handle)
        self._kept.discard(handle)
        if word in ("lie", "garbage"):  # the kernel never learns the handle
            self._garbled |= word == "garbage"
            self.owed.append(Owed(record.t, record, f"the kernel was not told of context {handle} ({record.fault})"))
        else:
            self.live[handle] = record

    def _end(self, record: Firmware, word: str) -> None:
        handle = -1 if record.handle is None else record.handle
        started = self.live.get(handle)
        if handle in self._kept:  # it was asked for before
            self.refused.append(record)
        elif word == "lie" or (record.status == 0 and word not in NOT_DONE):
            if self.live.pop(handle, None) is not None:
                self.ended.append(record)
        elif record.status < 0 or self.gone_by(record.t):
            pass  # nobody has heard of it
        elif started is not None and (word not in HONEST or handle in self._bound):
            del self.live[handle]
            self._kept.add(handle)
            fault = record.fault or "it was still bound to an ASID, by a fault"
            self.owed.append(Owed(record.t, record, f"context {handle} was not decommissioned ({fault})"))
        elif started is not None or not self._garbled:
            self.refused.append(record)


def _sent_by(invoke: Invoke) -> frozenset[str]:
    """The commands that the operation has the firmware be sent; of /dev/sev that may be the INIT of a platform that is
    down as well."""
    if invoke.f == "platform":
        return SENDS["init"] | {argument(invoke, "command").removesuffix("2")}  # GET_ID2 sends GET_ID
    return SENDS.get(invoke.f, frozenset({invoke.f.upper()}))


def _word(record: Firmware) -> str:
    return record.fault.partition(":")[0]


def told(owed: Sequence[Owed]) -> str:
    """What is owed, in words; "" if nothing is."""
    return ", ".join(_reasons(owed))


def _reasons(owed: Sequence[Owed]) -> Iterator[str]:
    for each in owed[:3]:
        yield each.why
    if len(owed) > 3:
        yield f"and {len(owed) - 3} more"
