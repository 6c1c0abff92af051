# SPDX-License-Identifier: Apache-2.0
"""The verdicts that checkers make of the answers to their questions, and one verdict of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from chaos.history.records import Record
from chaos.judge.verdict import Outcome, Verdict


def kept(promise: str, reason: str, records: Iterable[Record] = ()) -> Verdict:
    return Verdict(promise=promise, outcome=Outcome.KEPT, reason=reason, records=numbers(records))


def unknown(promise: str, reason: str, records: Iterable[Record] = (), *, signature: str = "") -> Verdict:
    """With a signature an experiment may state that it expects just this; without one nobody can."""
    return Verdict(
        promise=promise, outcome=Outcome.UNKNOWN, reason=reason, records=numbers(records), signature=signature
    )


def skipped(promise: str, reason: str, records: Iterable[Record] = (), *, what: str) -> Verdict:
    """`what` names the question that this kind of host cannot be asked, for the signature."""
    named = f"skipped:{what}"
    return Verdict(
        promise=promise,
        outcome=Outcome.SKIPPED,
        reason=reason,
        records=numbers(records),
        signature=named,
        skips=(named,),
    )


def broken(
    promise: str, reason: str, records: Iterable[Record], *, signature: str, expected: str, seen: str
) -> Verdict:
    return Verdict(
        promise=promise,
        outcome=Outcome.BROKEN,
        reason=reason,
        records=numbers(records),
        signature=signature,
        expected=expected,
        seen=seen,
        deviations=(signature,),
    )


def numbers(records: Iterable[Record]) -> tuple[int, ...]:
    return tuple(sorted({record.seq for record in records}))


# Within one promise a part that was skipped leaves the promise not wholly shown, which is less than kept.
_ORDER = (Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED, Outcome.KEPT)


def combine(promise: str, parts: Sequence[Verdict]) -> Verdict:
    """One verdict of the answers to several questions: the worst, with every reason once, the worst first.

    The signature joins those of all that is broken, unknown and skipped, so that a written finding cannot excuse a
    question that was not answered, or could not be asked, nor an experiment one that it does not name. An unknown
    without a signature is "part-unknown" beside deviations, and leaves those beside it none.
    """
    if not parts:
        return unknown(promise, "nothing was asked")
    ordered = sorted(parts, key=lambda part: _ORDER.index(part.outcome))
    outcome = ordered[0].outcome
    signatures = {part.signature for part in ordered if part.outcome is not Outcome.KEPT}
    if "" in signatures:
        signatures = signatures - {""} | {"part-unknown"} if outcome is Outcome.BROKEN else set()
    return Verdict(
        promise=promise,
        outcome=outcome,
        reason="; ".join(dict.fromkeys(clause for part in ordered for clause in part.reason.split("; "))),
        records=tuple(sorted({number for part in ordered for number in part.records})),
        expected="; ".join(dict.fromkeys(part.expected for part in ordered if part.expected)),
        seen="; ".join(dict.fromkeys(part.seen for part in ordered if part.seen)),
        signature="+".join(sorted(signatures)),
        deviations=tuple(sorted({named for part in ordered for named in part.deviations})),
        skips=tuple(sorted({named for part in ordered for named in part.skips})),
    )
