# SPDX-License-Identifier: Apache-2.0
"""What is said over the control channel: one JSON object a line, each way.

The controller asks, each request with a number of its choosing, and each gets one reply with that number: `done`,
`saved`, `status`, or `failed` with a reason. In between come events: `ready` once, `fired` for every rule of the plan
as it fires, and, when tracing is on, `traced` with the commands since the last one.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from chaos.lab.psp.mailbox import CommandRecord
from chaos.lab.psp.plan import FailpointPlan, Firing
from chaos.lab.psp.state import Saved


class PspSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A software PSP at rest, as plain JSON. `registers` is zlib-compressed. A plan is not part of it.

    One of another version does not decode (msgspec.ValidationError, which is a DecodeError).
    """

    version: Literal[1]
    firmware: Saved
    registers: bytes
    sequence: int
    executed: dict[str, int]


class PspMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all; the class decides `type`."""


class PspRequest(PspMessage, frozen=True, forbid_unknown_fields=True):
    id: int


class Save(PspRequest, frozen=True, forbid_unknown_fields=True, tag="save"):
    """Answered with `saved`."""


class Load(PspRequest, frozen=True, forbid_unknown_fields=True, tag="load"):
    """Only to a process started with --restore, once, before anything else."""

    snapshot: PspSnapshot


class SetPlan(PspRequest, frozen=True, forbid_unknown_fields=True, tag="plan"):
    """Replaces the plan there was, counters and all. An empty plan heals everything but a stall."""

    plan: FailpointPlan


class AddPlan(PspRequest, frozen=True, forbid_unknown_fields=True, tag="add"):
    """Follow this plan as well as those there are, whose counters go on."""

    plan: FailpointPlan


class WithdrawPlan(PspRequest, frozen=True, forbid_unknown_fields=True, tag="withdraw"):
    """The rules of this name fire no more, and what one of them stalls goes on."""

    name: str


class ReleaseStalled(PspRequest, frozen=True, forbid_unknown_fields=True, tag="release"):
    """Lets a stalled command go on. Fails if none is."""


class AskStatus(PspRequest, frozen=True, forbid_unknown_fields=True, tag="status"):
    """Answered with `status`."""


class Trace(PspRequest, frozen=True, forbid_unknown_fields=True, tag="trace"):
    """Turns `traced` events on or off."""

    on: bool


class Wbinvd(PspRequest, frozen=True, forbid_unknown_fields=True, tag="wbinvd"):
    """Tells the firmware that all caches were written back; only of use with --watch-wbinvd."""


class Quit(PspRequest, frozen=True, forbid_unknown_fields=True, tag="quit"):
    """Ends the process with exit code 0, after the reply."""


AnyRequest = Save | Load | SetPlan | AddPlan | WithdrawPlan | ReleaseStalled | AskStatus | Trace | Wbinvd | Quit


class PspReply(PspMessage, frozen=True, forbid_unknown_fields=True):
    id: int


class PspDone(PspReply, frozen=True, forbid_unknown_fields=True, tag="done"):
    pass


class PspFailed(PspReply, frozen=True, forbid_unknown_fields=True, tag="failed"):
    message: str


class SavedReply(PspReply, frozen=True, forbid_unknown_fields=True, tag="saved"):
    snapshot: PspSnapshot


class StatusReply(PspReply, frozen=True, forbid_unknown_fields=True, tag="status"):
    """How things stand.

    platform:     state of the platform, as its name
    guest_count:  live guest contexts
    owned:        ASID to handle, of active guests
    dirty:        how many ASIDs wait for a DF_FLUSH
    executed:     commands carried out, by name
    sequence:     commands seen
    pending:      a command is held back by the plan; `stalled`: until released
    held:         the name of the command that is held back until released, "" if none is; `held_by`: of the rule
    dead:         nothing will be answered any more
    fired:        every firing since the plan was set
    """

    platform: str
    guest_count: int
    owned: dict[int, int]
    dirty: int
    executed: dict[str, int]
    sequence: int
    pending: bool
    stalled: bool
    held: str
    held_by: str
    dead: bool
    fired: tuple[Firing, ...]


class PspReady(PspMessage, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The device is offered and commands are answered from now on."""

    pid: int


class Fired(PspMessage, frozen=True, forbid_unknown_fields=True, tag="fired"):
    firing: Firing


class PspTraced(PspMessage, frozen=True, forbid_unknown_fields=True, tag="traced"):
    """Commands, in order. `lost` counts those dropped before these because nobody read the channel."""

    records: tuple[CommandRecord, ...]
    lost: int = 0


AnyReply = PspDone | PspFailed | SavedReply | StatusReply
AnyEvent = PspReady | Fired | PspTraced

decode_request: Final = msgspec.json.Decoder(AnyRequest).decode
decode_answer: Final = msgspec.json.Decoder(AnyReply | AnyEvent).decode
_encode: Final = msgspec.json.Encoder().encode


def encode(message: PspMessage) -> bytes:
    """One line."""
    return _encode(message) + b"\n"
