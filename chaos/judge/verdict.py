# SPDX-License-Identifier: Apache-2.0
"""What a run is worth: one verdict a promise, each with the records it rests on, and the worst of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from chaos.errors import ExitCode


class Outcome(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"

    @property
    def exit_code(self) -> ExitCode:
        return {
            Outcome.KEPT: ExitCode.KEPT,
            Outcome.BROKEN: ExitCode.BROKEN,
            Outcome.UNKNOWN: ExitCode.UNKNOWN,
            Outcome.SKIPPED: ExitCode.SKIPPED,
        }[self]


# From worst to best; a run in which anything was kept is not "skipped".
_SEVERITY = (Outcome.BROKEN, Outcome.UNKNOWN, Outcome.KEPT, Outcome.SKIPPED)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One promise, judged.

    `signature` names a kind of deviation in a stable way (no numbers of one run in it), so that it can be matched
    with a written finding, and some reasons why a question was not answered, so that an experiment can state the one
    that it cannot avoid. `records` are `seq` numbers. `accepted` is why an outcome other than kept does not count
    against the run: the finding it matches, or the reason the experiment gives for a question it cannot ask.
    """

    promise: str
    outcome: Outcome
    reason: str
    records: tuple[int, ...] = ()
    expected: str = ""
    seen: str = ""
    signature: str = ""
    accepted: str = ""


class RunVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a run: the worst of its promises, broken before unknown. `left` says what of the run could not
    be removed from the host, "" if nothing was left."""

    experiment: str
    kernel: str
    host: str
    seed: int
    outcome: Outcome
    verdicts: tuple[Verdict, ...]
    left: str = ""

    @property
    def exit_code(self) -> ExitCode:
        """Of the run alone, with what was accepted left out of the count."""
        code = self._judged
        return ExitCode.UNCLEAN if self.left and code is not ExitCode.BROKEN else code

    @property
    def _judged(self) -> ExitCode:
        counted = [verdict.outcome for verdict in self.verdicts if not verdict.accepted]
        if self.verdicts and not counted:  # all that was seen is a written finding, or nothing could be asked
            seen = any(verdict.outcome is Outcome.BROKEN for verdict in self.verdicts)
            return ExitCode.KEPT if seen else ExitCode.SKIPPED
        return worst(counted).exit_code


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of them. Of none: unknown, because nothing was shown."""
    return min(outcomes, key=_SEVERITY.index, default=Outcome.UNKNOWN)


def exit_code(runs: Sequence[RunVerdict]) -> ExitCode:
    """Of several runs: the worst one's."""
    codes = [run.exit_code for run in runs]
    for code in (ExitCode.BROKEN, ExitCode.UNCLEAN, ExitCode.UNKNOWN, ExitCode.KEPT, ExitCode.SKIPPED):
        if code in codes:
            return code
    return ExitCode.UNKNOWN
