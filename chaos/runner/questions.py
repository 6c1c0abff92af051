# SPDX-License-Identifier: Apache-2.0
"""What a runner can ask of the outside while a run is under way, and is answered at once.

The outside starts the host and writes the history down. In the lab it also owns the firmware, which no program inside
can break. A question is a line on the runner's standard output among the records, and its answer a line on its standard
input, where orders come otherwise. One question at a time; both carry its number, so that an answer that comes too late
is not taken for the answer to the next.

What was armed belongs to the outside, which takes it back at the end of every run, however that ends.
"""

from __future__ import annotations

import msgspec

_QUESTION = b'{"ask":'
_ANSWER = b'{"answer":'


class _OutsideQuestion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="ask"):
    number: int = 0


class ArmFailpoints(_OutsideQuestion, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="arm"):
    """Follow these failpoints from now on, to be known by this name. `seed` decides where they leave it to chance."""

    name: str
    failpoints: str
    seed: int


class WithdrawFailpoints(_OutsideQuestion, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="withdraw"):
    """Follow those of this name no more, and answer the command that one of them stalls."""

    name: str


class LookAtFailpoints(_OutsideQuestion, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="look"):
    """What those of this name have done so far."""

    name: str


class FailpointCount(msgspec.Struct, frozen=True, kw_only=True):
    """One failpoint: how often it took effect, and when first and last, CLOCK_MONOTONIC of the host."""

    failpoint: str
    count: int
    first: int = 0
    last: int = 0


class _OutsideAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="answer"):
    number: int = 0


class Granted(_OutsideAnswer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="granted"):
    pass


class NothingToBreak(_OutsideAnswer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """This host has no such thing to break."""

    reason: str


class CouldNotBreak(_OutsideAnswer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="failed"):
    """It could not be done, though this host has such a thing."""

    reason: str


class Looked(_OutsideAnswer, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="looked"):
    """Each failpoint, in order. `stalled` is the command that one of them keeps without an answer, "" if none does."""

    points: tuple[FailpointCount, ...]
    stalled: str


OutsideQuestion = ArmFailpoints | WithdrawFailpoints | LookAtFailpoints
OutsideAnswer = Granted | NothingToBreak | CouldNotBreak | Looked

_questions: msgspec.json.Decoder[OutsideQuestion] = msgspec.json.Decoder(OutsideQuestion)
_answers: msgspec.json.Decoder[OutsideAnswer] = msgspec.json.Decoder(OutsideAnswer)


def encode(message: OutsideQuestion | OutsideAnswer) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def numbered(answer: OutsideAnswer, number: int) -> OutsideAnswer:
    """The answer as that to the question of this number."""
    return msgspec.structs.replace(answer, number=number)


def is_question(line: bytes) -> bool:
    """Whether a line of the runner's is one, and no record."""
    return line.startswith(_QUESTION)


def decode(line: bytes) -> OutsideQuestion:
    """Raises msgspec.DecodeError."""
    return _questions.decode(line)
