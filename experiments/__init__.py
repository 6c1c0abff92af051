# SPDX-License-Identifier: Apache-2.0
"""The catalogue: experiments as YAML files, one a file, the folder its kind.

resilience/   a migration that something happens to
capacity/     how many guests, and which limit bites
incidents/    named, dated failures
conformance/  the kernel's own tests, with the ledger switched on
"""

from __future__ import annotations

from pathlib import Path

from chaos import experiment
from chaos.errors import UsageError
from chaos.experiment import Experiment

_HERE = Path(__file__).parent


def catalogue() -> dict[str, Path]:
    """Name → file of every experiment that comes with this package, in order of kind and name."""
    return {path.stem: path for path in sorted(_HERE.rglob("*.yaml"))}


def find(name: str) -> Experiment:
    """The experiment of this name, or in the file of this path. Raises `UsageError`."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return experiment.load(Path(name))
    known = catalogue()
    if name not in known:
        raise UsageError(
            f"there is no experiment {name!r}",
            remedy=f"the catalogue has {', '.join(known)}; a file of your own is given by its path",
        )
    return experiment.load(known[name])
