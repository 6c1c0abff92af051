# SPDX-License-Identifier: Apache-2.0
"""What the runner is told to do: one run."""

from __future__ import annotations

from typing import Literal

from chaos.experiment.model import Experiment
from chaos.experiment.steps import Part


class Order(Part, frozen=True, kw_only=True):
    """What a runner reads, one JSON object a line: carry this out. `seed` is the run's only source of chance. Faults of
    the names in `withhold` are not applied, to see that they leave no evidence then. With `shared` it is done although
    other SEV guests live on the host, and nothing is broken that is theirs too. After `timeout` seconds nobody listens
    any more."""

    experiment: Experiment
    seed: int
    host: Literal["lab", "local"]
    withhold: frozenset[str] = frozenset()
    shared: bool = False
    timeout: float = 180.0
