# SPDX-License-Identifier: Apache-2.0
"""What every report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chaos.experiment.model import Experiment
from chaos.history.records import History
from chaos.judge.verdict import RunVerdict


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has been judged, and the directory that holds its records."""

    experiment: Experiment
    history: History
    verdict: RunVerdict
    directory: Path
