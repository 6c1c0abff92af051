# SPDX-License-Identifier: Apache-2.0
"""Written findings: deviations that have been understood, each with a document and the kernels it was seen on.

They are data (`known.yaml`). One cause may break several promises, so a finding has a list of deviations. It excuses a
deviation only if promise, signature and kernel series are its own; a deviation it stays, with the finding named beside
it. One that a newer kernel of the same series has mended simply does not occur there any more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated

import msgspec

from chaos.errors import InternalError
from chaos.judge.verdict import Outcome, Verdict
from chaos.promises import PROMISES

Series = Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+$")]
KernelVersion = Annotated[str, msgspec.Meta(pattern=r"^\d+\.\d+\.\d+$")]


class Deviation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a finding shows in a verdict: which promise it breaks, and with which signature, to the letter."""

    promise: str
    signature: Annotated[str, msgspec.Meta(min_length=1)]


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kernels` maps a series ("6.1") to the exact versions it was seen on. `document` is the path of its page in the
    source tree."""

    id: Annotated[str, msgspec.Meta(pattern=r"^\d{4}$")]
    title: str
    document: str
    deviations: Annotated[tuple[Deviation, ...], msgspec.Meta(min_length=1)]
    kernels: Annotated[dict[Series, tuple[KernelVersion, ...]], msgspec.Meta(min_length=1)]

    def __str__(self) -> str:
        return f"finding {self.id}: {self.title}"


def series(kernel: str) -> str:
    """ "6.12" of "6.12.117", "" if that is no version of a kernel."""
    found = re.match(r"(\d+\.\d+)(?:\.|-|$)", kernel)
    return found.group(1) if found else ""


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
        wrong = [v for name, versions in finding.kernels.items() for v in versions if series(v) != name]
        wrong += [deviation.promise for deviation in finding.deviations if deviation.promise not in PROMISES]
        if wrong:
            raise InternalError(f"chaos/judge/known.yaml: finding {finding.id}: {', '.join(wrong)} cannot be")
    if len({finding.id for finding in findings}) != len(findings):
        raise InternalError("chaos/judge/known.yaml: two findings have the same id")
    return findings


def matching(verdict: Verdict, kernel: str, known: Sequence[Finding]) -> Finding | None:
    """The finding that a deviation seen on this kernel is, if it is one."""
    if verdict.outcome is not Outcome.BROKEN:
        return None
    seen = Deviation(promise=verdict.promise, signature=verdict.signature)
    return next((f for f in known if seen in f.deviations and series(kernel) in f.kernels), None)
