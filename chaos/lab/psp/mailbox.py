# SPDX-License-Identifier: Apache-2.0
"""The registers: where a command comes in, and its status goes out.

The kernel writes a buffer's address, then a command id with bit 31 clear, and sleeps until an interrupt. The answer is
three writes whose order matters (anything else looks like a hang): status with bit 31 into the command register, then
"command complete" into the interrupt status, then the interrupt.

The registers are plain shared memory. Nothing traps, so the mailbox must be polled, and a register that clears its
bits when ones are written to it does not. Reads and writes are of whole 32-bit words in the machine's byte order (a
memoryview cast does each in one access; struct would go byte by byte, and could see half of a write).

One command at a time, as in the real one. A plan may hold one back: then it is *pending* until its time or its
release, and meanwhile `poll` returns at once.
"""

from __future__ import annotations

import mmap
import zlib
from collections import Counter
from collections.abc import Callable

import msgspec

from chaos.lab.psp import model
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.memory import BadAddress
from chaos.lab.psp.numbers import (
    CMDBUFF_HI,
    CMDBUFF_LO,
    CMDRESP,
    COMMAND_COMPLETE,
    COMMAND_MASK,
    COMMAND_SHIFT,
    FEATURE,
    FEATURE_SEV,
    INTERRUPT_ON_COMPLETION,
    INTSTS,
    RESPONSE_BIT,
    FirmwareStatus,
)
from chaos.lab.psp.plan import (
    Corrupt,
    DelayAnswer,
    Die,
    Fail,
    FailpointPlan,
    Firing,
    Planner,
    Reset,
    Stall,
    TellLength,
)


class CommandRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One command. Times are CLOCK_MONOTONIC nanoseconds, from seeing the command to having answered it.

    `status` is None for a command that was never answered: a dead firmware's, or one the host gave up on while it was
    held back, as another one took its place. `rule` is the place of the rule that fired, None for an honest answer, and
    `fault` says in the words of `failpoints` what it did, "" for nothing. `asked` are the addresses and lengths that it
    was given, where they are of interest (`model.asked`).
    """

    sequence: int
    command: str
    handle: int | None
    status: int | None
    start_ns: int
    end_ns: int
    rule: int | None = None
    fault: str = ""
    asked: dict[str, int] = {}


class _Pending(msgspec.Struct):
    """A command that came in. Held back it is until `due_ns`, None: until released.

    `outcome` is there if it was carried out already, `rule` if one fired for it, `name` is that rule's, and `fault`
    what it did.
    """

    word: int
    sequence: int
    start_ns: int
    rule: int | None = None
    name: str = ""
    fault: str = ""
    due_ns: int | None = None
    outcome: model.CommandOutcome | None = None
    asked: dict[str, int] = {}

    @property
    def id(self) -> int:
        return self.word >> COMMAND_SHIFT & COMMAND_MASK


class Mailbox:
    """The registers in `registers` (MAILBOX_SIZE bytes), with `firmware` behind them.

    interrupt:  called after an answer the command asked an interrupt for
    clock:      nanoseconds, never going back
    on_record:  told of every command when it is over
    on_firing:  told of every rule when it fires
    """

    def __init__(
        self,
        registers: mmap.mmap | bytearray,
        firmware: SoftwareFirmware,
        *,
        interrupt: Callable[[], None],
        clock: Callable[[], int],
        on_record: Callable[[CommandRecord], None] = lambda _record: None,
        on_firing: Callable[[Firing], None] = lambda _firing: None,
    ) -> None:
        self.firmware = firmware
        self.executed: Counter[str] = Counter()
        self.sequence = 0
        self._bytes = memoryview(registers)
        self._words = self._bytes.cast("B").cast("I")
        self._interrupt = interrupt
        self._clock = clock
        self._on_record = on_record
        self._on_firing = on_firing
        self._planner = Planner(FailpointPlan())
        self._pending: _Pending | None = None
        self.dead = False
        self._words[FEATURE // 4] = FEATURE_SEV

    def contents(self) -> bytes:
        """All registers, compressed. ValueError while a command is held back: half a command cannot be kept."""
        if self.dead:
            raise ValueError("the firmware is dead")
        if self._pending is not None:
            raise ValueError("a command is held back by the plan: release it first")
        return zlib.compress(bytes(self._bytes), 1)

    def restore(self, contents: bytes) -> None:
        """What `contents` gave. ValueError if it is not that."""
        size = len(self._bytes)
        try:
            data = zlib.decompressobj().decompress(contents, size + 1)  # no more, whatever it says
        except zlib.error as error:
            raise ValueError(f"saved registers are damaged: {error}") from error
        if len(data) != size:
            raise ValueError(f"saved registers are {len(data)} bytes or more, not {size}")
        self._bytes[:] = data

    def plan(self, plan: FailpointPlan) -> None:
        """Follow `plan`, and it alone, from the next command on. Its counters start from nothing."""
        self._planner = Planner(plan)

    def add(self, plan: FailpointPlan) -> None:
        """Follow `plan` as well."""
        self._planner.add(plan)

    def withdraw(self, name: str) -> None:
        """No rule of this name fires any more, and what one of them stalls goes on."""
        self._planner.withdraw(name)
        if self.stalled_by == name:
            self.release()

    @property
    def stalled(self) -> bool:
        """Whether a command waits for `release`."""
        return self._pending is not None and self._pending.due_ns is None

    @property
    def stalled_by(self) -> str | None:
        """The name of the rule for which a command waits, None if none does."""
        return self._pending.name if self._pending is not None and self._pending.due_ns is None else None

    @property
    def stalled_command(self) -> str:
        """The name of the command that waits for `release`, "" if none does."""
        return model.name(self._pending.id) if self._pending is not None and self.stalled else ""

    @property
    def pending(self) -> bool:
        """Whether a command is held back, by a stall or a delay."""
        return self._pending is not None

    def release(self) -> bool:
        """End a stall: the next `poll` answers. False if there was none."""
        if self._pending is None or self._pending.due_ns is not None:
            return False
        self._pending.due_ns = self._clock()
        return True

    def poll(self) -> bool:
        """Look once; answer what can be answered. True if a command came in or went out."""
        if self.dead:
            return False
        word = self._words[CMDRESP // 4]
        if self._pending is not None:
            if word == self._pending.word:
                return self._resume(self._pending)
            # The host no longer waits for it (the driver was loaded anew): drop it, unanswered.
            self._record(self._pending, None, self._subject(self._pending))
            self._pending = None
        if word == 0 or word & RESPONSE_BIT:
            return False
        self._begin(word)
        return True

    def _begin(self, word: int) -> None:
        self.sequence += 1
        command = _Pending(word, self.sequence, self._clock())
        command.asked = model.asked(self.firmware, command.id, self._address())
        planner = self._planner
        command.rule = planner.choose(model.name(command.id))
        rule = None if command.rule is None else planner.rule(command.rule)
        if rule is not None:
            command.name, command.fault = rule.name, str(rule.action)
        match rule.action if rule is not None else None:
            case Fail() as action:
                handle = self._execute(command).handle if action.carried_out else self._subject(command)
                self._fire(command)
                self._answer(command, model.CommandOutcome(action.code, handle))
            case DelayAnswer() as action:
                command.due_ns = command.start_ns + action.ns
                self._hold(command)
            case Stall() as action:
                command.outcome = self._execute(command) if action.carried_out else None
                self._hold(command)
            case Corrupt():
                outcome = self._execute(command)
                self._fire(command, applied=self._corrupt(command, planner))
                self._answer(command, outcome)
            case TellLength() as action:
                handle = self._subject(command)
                told = model.tell_length(self.firmware, command.id, self._address(), action.bytes)
                self._fire(command, applied=told)
                refused = model.CommandOutcome(FirmwareStatus.INVALID_LEN, handle)
                self._answer(command, refused if told else self._execute(command))
            case Die():
                self.dead = True
                self._fire(command)
                self._record(command, None, self._subject(command))
            case Reset():
                self.firmware.reset()
                self._fire(command)
                self._answer(command, self._execute(command))
            case None:
                self._answer(command, self._execute(command))

    def _hold(self, command: _Pending) -> None:
        self._pending = command
        self._fire(command)

    def _resume(self, command: _Pending) -> bool:
        if command.due_ns is None or self._clock() < command.due_ns:
            return False
        self._pending = None
        self._answer(command, command.outcome or self._execute(command))
        return True

    def _address(self) -> int:
        return int(self._words[CMDBUFF_HI // 4]) << 32 | int(self._words[CMDBUFF_LO // 4])

    def _execute(self, command: _Pending) -> model.CommandOutcome:
        self.executed[model.name(command.id)] += 1
        return model.execute(self.firmware, command.id, self._address())

    def _subject(self, command: _Pending) -> int | None:
        return model.subject(self.firmware, command.id, self._address())

    def _corrupt(self, command: _Pending, planner: Planner) -> bool:
        size = model.buffer_size(command.id)
        if command.rule is None or not size:
            return False
        try:
            self.firmware.write(self._address(), planner.garbage(command.rule, size))
        except BadAddress:
            return False
        return True

    def _answer(self, command: _Pending, outcome: model.CommandOutcome) -> None:
        self._words[CMDRESP // 4] = RESPONSE_BIT | outcome.status
        if command.word & INTERRUPT_ON_COMPLETION:
            self._words[INTSTS // 4] = COMMAND_COMPLETE
            self._interrupt()
        self._record(command, outcome.status, outcome.handle)

    def _record(self, command: _Pending, status: int | None, handle: int | None) -> None:
        self._on_record(
            CommandRecord(
                sequence=command.sequence,
                command=model.name(command.id),
                handle=handle,
                status=status,
                start_ns=command.start_ns,
                end_ns=self._clock(),
                rule=command.rule,
                fault=command.fault,
                asked=command.asked,
            )
        )

    def _fire(self, command: _Pending, *, applied: bool = True) -> None:
        assert command.rule is not None
        action = command.fault
        if not applied:
            command.fault = ""
        self._on_firing(
            Firing(
                rule=command.rule,
                name=command.name,
                action=action,
                command=model.name(command.id),
                sequence=command.sequence,
                at_ns=self._clock(),
                applied=applied,
            )
        )
