# SPDX-License-Identifier: Apache-2.0
"""Written findings: deviations that have been understood, each with a document and the kernels it was seen on.

They are data (`known.yaml`). One cause may break several promises, so a finding has a list of deviations. It excuses a
deviation only if promise, signature and kernel are its own; a deviation it stays, with the finding named beside it.

A finding holds in a series from the first version on which it was seen to the one in which it was fixed. Outside of
that its deviation counts: an older kernel has it for a reason that nobody has looked into, a newer one has it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated

import msgspec

from chaos.errors import InternalError
from chaos.judge.verdict import Outcome, Verdict
from chaos.linux.version import order, series
from chaos.promises import PROMISES

Series = Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+$")]
KernelVersion = Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+\.\d+$")]
_SEEN = {Outcome.KEPT, Outcome.BROKEN}


class Deviation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a finding shows in a verdict: which promise it breaks, and with which signature, to the letter."""

    promise: str
    signature: Annotated[str, msgspec.Meta(min_length=1)]


class Versions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one series: the exact versions on which a finding was `seen`, and the first in which it is `fixed`, "" if
    none is."""

    seen: Annotated[tuple[KernelVersion, ...], msgspec.Meta(min_length=1)]
    fixed: Annotated[str, msgspec.Meta(pattern=r"^(\d+\.\d+\.\d+)?$")] = ""

    @property
    def first(self) -> str:
        return min(self.seen, key=order)

    def hold(self, kernel: str) -> bool:
        return order(self.first) <= order(kernel) and (not self.fixed or order(kernel) < order(self.fixed))


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kernels` maps a series ("6.1") to its versions. `document` is the path of its page in the source tree,
    `shown_by` are experiments of the catalogue in whose every run it is seen, on each of its kernels."""

    id: Annotated[str, msgspec.Meta(pattern=r"^\d{4}$")]
    title: str
    document: str
    deviations: Annotated[tuple[Deviation, ...], msgspec.Meta(min_length=1)]
    kernels: Annotated[dict[Series, Versions], msgspec.Meta(min_length=1)]
    shown_by: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]

    def holds(self, kernel: str) -> bool:
        """Whether this kernel is one that has it, as far as anybody knows."""
        versions = self.kernels.get(series(kernel))
        return versions is not None and versions.hold(kernel)

    def __str__(self) -> str:
        return f"finding {self.id}: {self.title}"


def load() -> tuple[Finding, ...]:
    """The findings that come with this version. Raises `InternalError` if its own data is wrong."""
    return parse(files("chaos.judge").joinpath("known.yaml").read_bytes())


def parse(data: bytes) -> tuple[Finding, ...]:
    """Findings of a YAML list. Raises `InternalError` saying which entry is wrong."""
    import yaml

    try:
        findings = msgspec.convert(yaml.safe_load(data), tuple[Finding, ...])
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise InternalError(f"chaos/judge/known.yaml: {error}") from error
    for finding in findings:
        told = [(name, v) for name, of in finding.kernels.items() for v in (*of.seen, of.fixed) if v]
        wrong = [version for name, version in told if series(version) != name]
        wrong += [seen for of in finding.kernels.values() for seen in of.seen if not of.hold(seen)]
        wrong += [deviation.promise for deviation in finding.deviations if deviation.promise not in PROMISES]
        if wrong:
            raise InternalError(f"chaos/judge/known.yaml: finding {finding.id}: {', '.join(wrong)} cannot be")
    if len({finding.id for finding in findings}) != len(findings):
        raise InternalError("chaos/judge/known.yaml: two findings have the same id")
    return findings


def matching(verdict: Verdict, kernel: str, known: Sequence[Finding]) -> Finding | None:
    """The finding that a deviation seen on this kernel is, if it is one."""
    return next((finding for finding in _alike(verdict, known) if finding.holds(kernel)), None)


def elsewhere(verdict: Verdict, kernel: str, known: Sequence[Finding]) -> Finding | None:
    """The finding that it would be on other versions of the kernel than this one, on which it is none."""
    return next(iter(_alike(verdict, known)), None) if matching(verdict, kernel, known) is None else None


def _alike(verdict: Verdict, known: Sequence[Finding]) -> list[Finding]:
    """Those that break the same promise with the same signature, on whatever kernel.

    A promise that the experiment does not list need not be kept, so what is unknown or skipped of it says nothing:
    there the signature is that of its deviations alone.
    """
    if verdict.outcome is not Outcome.BROKEN:
        return []
    signature = verdict.signature if verdict.listed else "+".join(verdict.deviations)
    return [f for f in known if any((d.promise, d.signature) == (verdict.promise, signature) for d in f.deviations)]


def unseen(experiment: str, verdicts: Sequence[Verdict], kernel: str, known: Sequence[Finding]) -> list[Finding]:
    """Those that this kernel has and this experiment shows, and nothing of which was seen.

    Any of its deviations will do, also in company. Where a promise that it breaks was to be kept and is unknown or
    skipped, nobody can say.
    """
    missing = []
    for finding in known:
        promises = {deviation.promise for deviation in finding.deviations}
        asked = {v.outcome for v in verdicts if v.promise in promises and v.listed}
        if experiment not in finding.shown_by or not finding.holds(kernel) or not asked <= _SEEN or not asked:
            continue
        if not shows(finding, verdicts, known):
            missing.append(finding)
    return missing


def shows(finding: Finding, verdicts: Sequence[Verdict], known: Sequence[Finding]) -> bool:
    """Whether any part of any of its deviations is seen in these verdicts, also in company, on whatever kernel. What is
    by itself another finding, and in a signature of this one for company only, says nothing of this one."""
    parts = {(d.promise, part) for d in finding.deviations for part in d.signature.split("+")} - others(finding, known)
    return any((v.promise, part) in parts for v in verdicts for named in v.deviations for part in named.split("+"))


def others(finding: Finding, known: Sequence[Finding]) -> frozenset[tuple[str, str]]:
    """Promise and signature of the deviations of all other findings."""
    return frozenset((d.promise, d.signature) for other in known if other.id != finding.id for d in other.deviations)


def told_unseen(finding: Finding, experiment: str, kernel: str) -> str:
    """A sentence about one of those."""
    said = f"finding {finding.id} was not seen on {kernel} in {experiment}, which shows it"
    return (
        f"{said}, although it was seen on this version"
        if kernel in finding.kernels[series(kernel)].seen
        else f"{said}: fixed?"
    )
