# SPDX-License-Identifier: Apache-2.0
"""Runs with a defect in the kernel, as `sevchaos run` tells them."""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

import experiments
from chaos.lab.kernel.find import build_module, find_kernel
from tests.lab.conftest import command

PLANTED = Path(__file__).parents[1] / "planted"
PACKAGE = Path(__file__).parents[1] / "programs" / "planted_defect"

# What the JSON report calls the outcomes of a promise.
BROKEN, KEPT, SKIPPED = "broken", "kept", "skipped"

# A lab is booted for each kernel first, and a run with a defect may last as long as the runner's patience.
WITHIN = 900.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run. `verdicts` by promise; `evidence` is what the defect's fault was last seen to have done."""

    verdicts: dict[str, dict[str, Any]]
    evidence: str

    def outcome(self, promise: str) -> str:
        return str(self.verdicts[promise]["outcome"])

    @property
    def activated(self) -> bool:
        """Whether the kernel did anything that a stock one would not have done."""
        return "activated=" in self.evidence and not self.evidence.endswith(" activated=0")


class WithDefect(Protocol):
    def __call__(self, experiment: Path) -> Run: ...


def site_with_module(site: Path, source: str) -> Path:
    """The package as pip would leave it, with the module for this kernel."""
    place, info = site / "planted_defect", site / "planted_defect-1.dist-info"
    place.mkdir(parents=True)
    info.mkdir()
    (place / "__init__.py").write_text((PACKAGE / "planted_defect.py").read_text())
    kernel = find_kernel(source)
    module = build_module(kernel, "planted", source=PACKAGE / "module")
    modules = {kernel.release: base64.b64encode(zlib.compress(module.read_bytes())).decode()}
    (place / "modules.json").write_text(json.dumps(modules))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted_defect\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sevchaos.faults]\nplant = planted_defect:Plant\n")
    return site


@pytest.fixture(scope="session")
def site_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda kernel: site_with_module(tmp_path_factory.mktemp("planted") / "site", kernel))


@pytest.fixture
def with_defect(site_for: Callable[[str], Path], kernel: str, tmp_path: Path) -> WithDefect:
    """Carries out an experiment that plants a defect, in a lab of its own."""
    return runs_on(kernel, site_for(kernel), tmp_path)


def runs_on(kernel: str, site: Path, tmp_path: Path) -> WithDefect:
    def run(experiment: Path) -> Run:
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        argv = command("run", "--quiet", "--json", "--kernel", kernel, "--runs", str(tmp_path / "runs"))
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [*argv, str(experiment)], env=environment, capture_output=True, timeout=WITHIN, check=False
        )
        assert done.stdout, done.stderr.decode()
        (told,) = json.loads(done.stdout)["runs"]
        history = tmp_path / "runs" / told["experiment"] / "latest" / "history.jsonl"
        faults = [r for r in map(json.loads, history.read_text().splitlines()) if r["type"] == "Fault"]
        seen = [r["detail"] for r in faults if r["fault"] == "plant" and r["event"] == "evidence"]
        return Run({v["promise"]: v for v in told["verdicts"]}, seen[-1] if seen else "")

    return run


def smallest(defect: str) -> Path:
    """The experiment of `tests/lab/planted` that is for this defect."""
    return PLANTED / f"planted-{defect}.yaml"


def also(name: str, defect: str, folder: Path) -> Path:
    """An experiment of the catalogue in a kernel with this defect, and otherwise as it is."""
    (file,) = Path(experiments.__file__).parent.rglob(f"{name}.yaml")
    script = yaml.safe_load(file.read_text())
    script["script"].insert(0, {"do": "fault", "fault": "plant", "options": {"defect": defect}})
    copy = folder / file.name
    copy.write_text(yaml.safe_dump(script, sort_keys=False))
    return copy
