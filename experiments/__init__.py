# SPDX-License-Identifier: Apache-2.0
"""The catalogue: experiments as YAML files, one a file, the folder its kind.

resilience/   a migration that something happens to
conformance/  the kernel's own tests, with the ledger switched on
sweeps/       every allocation and every copy of the kernel's in a call of a VM's life fails, one after the other
"""

from __future__ import annotations

import difflib
from pathlib import Path

from chaos import fault as faults
from chaos.errors import UsageError
from chaos.experiment import load
from chaos.experiment.model import Experiment

_HERE = Path(__file__).parent


def catalogue() -> dict[str, Path]:
    """Name → file of every experiment that comes with this package, in order of kind and name."""
    return {path.stem: path for path in sorted(_HERE.rglob("*.yaml"))}


def select(expression: str | None) -> dict[str, Path]:
    """Those of the catalogue of which the expression is true, all if there is none. Raises `UsageError`."""
    from experiments.choosing import matches, tags

    found = catalogue()
    if expression is None:
        return found
    loaded = {name: (path, load.load(path)) for name, path in found.items()}
    chosen = {
        name: path for name, (path, one) in loaded.items() if matches(expression, name, tags(path.parent.name, one))
    }
    if not chosen:
        raise UsageError(f"no experiment is selected by {expression!r}", remedy="`sevchaos list` names all")
    return chosen


def scaffold(name: str, *, kind: str, fault: str) -> str:
    """The text of a commented experiment of this name to start from, that applies `fault` at its end."""
    import jinja2

    target = {"vm": "old", "host": ""}.get(faults.load(fault).TARGET, "source")
    template = jinja2.Template((_HERE / "scaffold.yaml.j2").read_text(), undefined=jinja2.StrictUndefined)
    return f"{template.render(name=name, kind=kind, fault=fault, target=target)}\n"


def find(name: str) -> Experiment:
    """The experiment of this name, or in the file of this path. Raises `UsageError`."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return load.load(Path(name))
    known = catalogue()
    if name not in known:
        like = difflib.get_close_matches(name, known)
        raise UsageError(
            f"there is no experiment {name!r}" + (f"; there is {', '.join(like)}" if like else ""),
            remedy="`sevchaos list` names all; a file of your own is given by its path",
        )
    return load.load(known[name])
