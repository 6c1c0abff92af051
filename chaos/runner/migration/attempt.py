# SPDX-License-Identifier: Apache-2.0
"""One attempt to hand a guest over, phase by phase; `chaos.runner.migration` has the table.

Whoever fails says so in an answer, which is recorded like any other, and ends the attempt. What is left of it then is
an `AttemptEnded`: who has the guest, by what the two VMMs have answered and not by what should be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from chaos.experiment.steps import Phase
from chaos.history.reading import explained, owns
from chaos.history.records import Done
from chaos.linux import seqpacket
from chaos.linux.loop import LOOK_AGAIN, TimedOut
from chaos.runner.guests import Guest, Guests
from chaos.runner.vmms import ANSWER_WITHIN, StepFailed
from chaos.vmm.messages import (
    Accept,
    Commit,
    Confirm,
    Connect,
    Disconnect,
    GetState,
    Listen,
    Move,
    Operation,
    ReceiveState,
    Sample,
    SendFd,
    SetState,
    Status,
    name_of,
)

# A guest that is back counts at once; this is for a machine in trouble. No time is measured with it.
TICK_WITHIN = 10.0

AttemptOutcome = Literal["committed", "aborted", "refused", "lost"]


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """How an attempt ended, and in which phase. `guest` is the VM that has the guest, "" if it is lost; `why` what
    failed, "" if nothing did. `stood` is how long each vCPU stood still, in ns, as far as that could be seen."""

    outcome: AttemptOutcome
    phase: str
    guest: str
    why: str = ""
    stood: tuple[int, ...] = ()


class PhaseFailed(Exception):
    """An operation without which the attempt cannot go on. `done` is its answer, None if nobody could be asked."""

    def __init__(self, why: str, done: Done | None = None) -> None:
        super().__init__(why)
        self.done = done


@dataclass(slots=True)
class Attempt:
    """`before` is called with each phase before it begins. `within` bounds, in seconds, whatever one VMM waits for of
    the other. `every` is how often the guest leaves to its VMM, None if it does not run."""

    guests: Guests
    source: Guest
    destination: Guest
    within: float
    before: Callable[[Phase], None]
    every: int | None = None
    phase: str = ""
    last_ticks: tuple[int, ...] = field(default=())

    def carry_out(self) -> AttemptEnded:
        """Raises `StepFailed` if a VMM does not answer at all."""
        self.every = self.source.every
        try:
            self._up_to_the_move()
        except PhaseFailed as failed:
            return self._abort(failed)
        try:
            return self._after_the_move()
        except PhaseFailed as failed:
            self._disconnect()
            return AttemptEnded("lost", self.phase, "", str(failed))

    # -- the phases ---------------------------------------------------------------------------------------

    def _up_to_the_move(self) -> None:
        """Whatever fails here leaves the source what it was."""
        source, destination = self.source, self.destination
        self._begin("connect")
        self._connect()
        if self.every is not None:
            self._begin("pause")
            self._pause()
        if self._carries_state:
            self._begin("send-state")
            self._both(
                (source, GetState(vm=source.name, within_ms=self._ms), ()),
                (destination, ReceiveState(vm=destination.name, within_ms=self._ms), ()),
            )
        self._begin("send-fd")
        self._do(source, SendFd(vm=source.name, to=destination.vmm.name))
        self._begin("move")
        self._do(destination, Move(vm=destination.name, source=source.name))

    def _after_the_move(self) -> AttemptEnded:
        """The source is dead, and there is no way back."""
        destination = self.destination
        if self._carries_state:
            self._begin("load-state")
            self._do(destination, SetState(vm=destination.name))
        if self.every is not None:
            self._begin("resume")
            self._enter(destination)
        else:  # it stands there now where it stood here
            destination.paused, self.source.paused = self.source.paused, False
        why = self._commit()
        if not destination.vmm.alive:
            return AttemptEnded("lost", self.phase, "", why)
        return AttemptEnded("committed", self.phase, destination.name, why, self._stood(destination))

    def _connect(self) -> None:
        source, destination, network = self.source, self.destination, self.guests.network
        address = network.address(destination.vmm.name, source.vmm.name)
        ours, theirs = seqpacket.pair()
        with ours, theirs:
            listens = self._do(
                destination, Listen(vm=destination.name, peer=source.name, address=address), fds=(theirs.number,)
            )
            port = int(str(listens.value["port"]))
            connect = Connect(vm=source.name, peer=destination.name, address=address, port=port, within_ms=self._ms)
            accept = Accept(vm=destination.name, peer=source.name, within_ms=self._ms)
            self._both((source, connect, (ours.number,)), (destination, accept, ()))

    def _pause(self) -> None:
        self._expect_alive(self.source)
        done = self._expect(self.source, "pause", self.guests.leave(self.source, phase=self.phase))
        ticks = done.value.get("last_ticks", [])
        assert isinstance(ticks, list)
        self.last_ticks = tuple(int(tick) for tick in ticks)

    def _enter(self, guest: Guest) -> None:
        assert self.every is not None
        self._expect_alive(guest)
        self._expect(guest, "run", self.guests.enter(guest, self.every, phase=self.phase))

    def _commit(self) -> str:
        """Why one of the two does not know that the other does, "" if both know. The guest runs all the same."""
        source, destination = self.source, self.destination
        try:
            self._begin("commit")
            self._expect_alive(source)
            self._do(destination, Commit(vm=destination.name, within_ms=self._ms))
            self._begin("confirm")
            confirms = [(guest, Confirm(vm=guest.name, within_ms=self._ms), ()) for guest in (destination, source)]
            self._both(*confirms, alone=True)
        except PhaseFailed as failed:
            self._disconnect()
            return str(failed)
        return ""

    def _abort(self, failed: PhaseFailed) -> AttemptEnded:
        """Let go of each other, and let the guest go on at the source, if it still can."""
        phase, self.phase = self.phase, "abort"
        self._disconnect()
        why = str(failed)
        try:
            self._expect_alive(self.source)
            if self.every is not None and not self.source.running:
                self._enter(self.source)
            elif self.every is None and failed.done is not None and failed.done.outcome == "info":
                self._expect_owner(self.source)
        except PhaseFailed as worse:
            return AttemptEnded("lost", phase, "", f"{why}; {worse}" if str(worse) != why else why)
        outcome: AttemptOutcome = "refused" if phase == "move" and _by_kernel(failed.done) else "aborted"
        return AttemptEnded(outcome, phase, self.source.name, why, self._stood(self.source))

    def _disconnect(self) -> None:
        for guest in (self.destination, self.source):
            if guest.vmm.alive:
                self.guests.do(guest, Disconnect(vm=guest.name), phase=self.phase)

    # -- in short -----------------------------------------------------------------------------------------

    @property
    def _ms(self) -> int:
        return round(self.within * 1000)

    @property
    def _carries_state(self) -> bool:
        return not self.guests.is_es(self.source)

    def _begin(self, phase: Phase) -> None:
        self.phase = phase
        self.before(phase)

    def _do(self, guest: Guest, operation: Operation, *, fds: tuple[int, ...] = ()) -> Done:
        self._expect_alive(guest)
        done = self.guests.do(guest, operation, phase=self.phase, fds=fds)
        return self._expect(guest, name_of(operation), done)

    def _both(self, *parts: tuple[Guest, Operation, tuple[int, ...]], alone: bool = False) -> None:
        """Operations that wait for each other. With `alone` one is made even if the other side is dead: what that said
        last may have arrived."""
        vmms, late = self.guests.vmms, self.within + ANSWER_WITHIN
        there = [part for part in parts if part[0].vmm.alive or not alone]
        for guest, _, _ in there:
            self._expect_alive(guest)
        pending = [vmms.invoke(guest.vmm, operation, fds=fds, phase=self.phase) for guest, operation, fds in there]
        try:
            answers = [vmms.wait(each, late) for each in pending]
        except TimedOut as error:
            raise StepFailed(str(error)) from error
        for guest, _, _ in (part for part in parts if part not in there):
            self._expect_alive(guest)
        for (guest, operation, _), done in zip(there, answers, strict=True):
            self._expect(guest, name_of(operation), done)

    def _expect(self, guest: Guest, name: str, done: Done) -> Done:
        if done.outcome != "ok":
            raise PhaseFailed(f"{name} of {guest.name}: {explained(done)}", done)
        return done

    def _expect_alive(self, guest: Guest) -> None:
        if not guest.vmm.alive:
            raise PhaseFailed(f"the VMM of {guest.name} is dead")

    def _expect_owner(self, guest: Guest) -> None:
        """Of a guest that does not run, its context says where it is."""
        done = self.guests.do(guest, Status(vm=guest.name), phase=self.phase)
        if done.outcome == "info" or owns(done) is False:
            raise PhaseFailed(f"{guest.name} owns no context any more", done)

    def _stood(self, guest: Guest) -> tuple[int, ...]:
        """From the last tick at the source to the first wherever the guest is now, for each vCPU."""
        if not self.every or not all(self.last_ticks):
            return ()
        vmms = self.guests.vmms
        first: tuple[int, ...] = ()

        def counts() -> bool:
            nonlocal first
            sampled = vmms.ask(guest.vmm, Sample(vm=guest.name)).sampled
            first = sampled.first_ticks if sampled is not None else ()
            return (bool(first) and all(first)) or (sampled is not None and bool(sampled.ended))

        try:
            vmms.loop.wait(counts, TICK_WITHIN, f"{guest.name} to count", look=LOOK_AGAIN)
        except (StepFailed, TimedOut):  # how long it stood cannot be said; that it does not count, others will say
            return ()
        return tuple(now - then for now, then in zip(first, self.last_ticks, strict=False)) if all(first) else ()


def connect(guests: Guests, source: Guest, destination: Guest) -> None:
    """Give two VMMs a Unix socket to each other, for a descriptor and nothing more. Raises `StepFailed`."""
    ours, theirs = seqpacket.pair()
    with ours, theirs:
        guests.must(source, Connect(vm=source.name, peer=destination.name), fds=(ours.number,))
        guests.must(destination, Connect(vm=destination.name, peer=source.name), fds=(theirs.number,))


def send(guests: Guests, source: Guest, destination: Guest) -> Done:
    return guests.must(source, SendFd(vm=source.name, to=destination.vmm.name))


def _by_kernel(done: Done | None) -> bool:
    """Whether it was the ioctl that was refused: a move also waits for the source's descriptor."""
    return done is not None and done.outcome == "fail" and str(done.value.get("call", "")).startswith("KVM_")
