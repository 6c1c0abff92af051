# SPDX-License-Identifier: Apache-2.0
"""What a run is worth: one verdict a promise, each with the records it rests on, and the worst of them."""

from __future__ import annotations

from collections import Counter
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
    `elsewhere` is the finding that it would be on other versions of the kernel than this: there it counts. `deviations`
    are the signatures of what is broken alone, and `skips` of what this kind of host could not ask; `signature` joins
    both with those of what is unknown.

    `listed` unless the experiment does not put this promise to the test. Then it counts only where it is broken.
    """

    promise: str
    outcome: Outcome
    reason: str
    records: tuple[int, ...] = ()
    expected: str = ""
    seen: str = ""
    signature: str = ""
    accepted: str = ""
    elsewhere: str = ""
    deviations: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    listed: bool = True

    @property
    def counts(self) -> bool:
        """Whether the run's verdict is made of it: who has seen a deviation need not have looked for it."""
        return self.listed or self.outcome is Outcome.BROKEN


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How many promises ended how, of those that count. Those that were accepted are no part of `broken` and `unknown`.
    Of all of them `partly_skipped` are neither kept nor skipped as a whole, and had a part that was skipped."""

    kept: int = 0
    broken: int = 0
    unknown: int = 0
    skipped: int = 0
    accepted_broken: int = 0
    accepted_unknown: int = 0
    partly_skipped: int = 0


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How many promises of all runs may be skipped, as a whole or in part, and how many unknown. None: any number."""

    skipped: int | None = None
    unknown: int | None = None


UNBOUNDED = Bounds()


class RunVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on a run: the worst of the promises that count, broken before unknown. `left` says what of the run
    could not be removed from the host, "" if nothing was left. `notes` are what else is to be told of it, and counts
    nothing: a written finding that this run shows, and did not show."""

    experiment: str
    kernel: str
    host: str
    seed: int
    outcome: Outcome
    verdicts: tuple[Verdict, ...]
    left: str = ""
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """Of the run alone, with what was accepted left out of the count."""
        code = self._judged
        return ExitCode.UNCLEAN if self.left and code is not ExitCode.BROKEN else code

    @property
    def _judged(self) -> ExitCode:
        """What was accepted does not count against the run, and shows nothing for it: something has to be kept."""
        against = worst([v.outcome for v in self.verdicts if v.counts and not v.accepted] or [Outcome.SKIPPED])
        every = {v.outcome for v in self.verdicts if v.counts}
        if against in (Outcome.BROKEN, Outcome.UNKNOWN) or Outcome.KEPT in every:
            return against.exit_code
        return ExitCode.SKIPPED if every == {Outcome.SKIPPED} else ExitCode.UNKNOWN

    @property
    def tally(self) -> Tally:
        return tally([self])


def tally(runs: Iterable[RunVerdict]) -> Tally:
    """The promises of several runs."""
    counted = [verdict for run in runs for verdict in run.verdicts if verdict.counts]
    ended = Counter(f"{'accepted_' * bool(v.accepted)}{v.outcome.value}" for v in counted)
    partly = sum(bool(v.skips) and v.outcome in (Outcome.BROKEN, Outcome.UNKNOWN) for v in counted)
    return Tally(**ended, partly_skipped=partly)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of them. Of none: unknown, because nothing was shown."""
    return min(outcomes, key=_SEVERITY.index, default=Outcome.UNKNOWN)


def exceeded(runs: Sequence[RunVerdict], bounds: Bounds) -> tuple[str, ...]:
    """What there is more of than may be, in words."""
    counts = tally(runs)
    skipped, unknown = counts.skipped + counts.partly_skipped, counts.unknown + counts.accepted_unknown
    said = []
    if bounds.skipped is not None and skipped > bounds.skipped:
        said.append(f"{skipped} promises skipped, as a whole or in part, --max-skipped is {bounds.skipped}")
    if bounds.unknown is not None and unknown > bounds.unknown:
        said.append(f"{unknown} promises unknown, --max-unknown is {bounds.unknown}")
    return tuple(said)


def exit_code(runs: Sequence[RunVerdict], bounds: Bounds = UNBOUNDED) -> ExitCode:
    """Of several runs: the worst one's; unknown if more than may be was skipped or unknown."""
    codes = {run.exit_code for run in runs} | ({ExitCode.UNKNOWN} if exceeded(runs, bounds) else set())
    for code in (ExitCode.BROKEN, ExitCode.UNCLEAN, ExitCode.UNKNOWN, ExitCode.KEPT, ExitCode.SKIPPED):
        if code in codes:
            return code
    return ExitCode.UNKNOWN
