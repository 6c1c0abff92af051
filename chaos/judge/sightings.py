# SPDX-License-Identifier: Apache-2.0
"""Whether a finding is seen on a kernel: what a run of an experiment that shows it says of that.

This asks whether the kernel has it, and not whether it may: what is known of versions plays no part, so it can be asked
of a kernel on which nobody has looked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from chaos.judge.findings import Finding, others, shows
from chaos.judge.verdict import Outcome, RunVerdict, Verdict
from chaos.linux.version import order, series


class SightingOutcome(StrEnum):
    SEEN = "seen"
    NOT_SEEN = "not seen"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Sighting:
    """Of a finding on a kernel. `reason` is what the run says: the deviation, or why nobody can say; "" if it is seen
    no more than written down."""

    finding: Finding
    seen: SightingOutcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KernelSightings:
    """Of several findings on one kernel: `source` as the user names it, "" for what is written; `version` x.y.z, "" if
    no run came so far as to say it."""

    source: str
    version: str
    sightings: tuple[Sighting, ...]


def sighting(finding: Finding, run: RunVerdict, known: Sequence[Finding]) -> Sighting:
    """What a run of one of `finding.shown_by` says. It is not seen only where every promise that it breaks, of those
    that the experiment lists, is kept, or broken as just another finding has it: one that is broken in a way that
    nobody knows may hide what else there is."""
    promises = {deviation.promise for deviation in finding.deviations}
    mine = [verdict for verdict in run.verdicts if verdict.promise in promises]
    if shows(finding, mine, known):
        return Sighting(finding, SightingOutcome.SEEN, _told([v for v in mine if v.outcome is Outcome.BROKEN]))
    elsewhere = others(finding, known)
    asked = [v for v in mine if v.listed or v.outcome is Outcome.BROKEN]
    left = [v for v in asked if v.outcome is not Outcome.KEPT and (v.promise, v.signature) not in elsewhere]
    if asked and not left:
        return Sighting(finding, SightingOutcome.NOT_SEEN, _told(asked))
    if asked and {v.outcome for v in asked} == {Outcome.SKIPPED}:
        return Sighting(finding, SightingOutcome.SKIPPED, _told(asked))
    return Sighting(finding, SightingOutcome.UNKNOWN, _told([v for v in mine if v.outcome in _UNTELLING]))


_UNTELLING = (Outcome.BROKEN, Outcome.UNKNOWN, Outcome.SKIPPED)


def _told(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(
        f"{v.promise} {v.outcome.value}: {v.signature or v.reason if v.outcome is Outcome.BROKEN else v.reason}"
        for v in verdicts
    )


def written(known: Sequence[Finding]) -> list[KernelSightings]:
    """What is written of each version on which any of them was seen, or is fixed, in order. That nobody has seen a
    finding there does not say that it is not there."""
    versions = {v for finding in known for of in finding.kernels.values() for v in (*of.seen, of.fixed) if v}
    return [
        KernelSightings("", version, tuple(s for finding in known if (s := _written(finding, version))))
        for version in sorted(versions, key=order)
    ]


def _written(finding: Finding, version: str) -> Sighting | None:
    of = finding.kernels.get(series(version))
    if of is not None and version in of.seen:
        return Sighting(finding, SightingOutcome.SEEN)
    fixed = of is not None and of.fixed and order(of.fixed) <= order(version)
    return Sighting(finding, SightingOutcome.NOT_SEEN, "fixed") if fixed else None
