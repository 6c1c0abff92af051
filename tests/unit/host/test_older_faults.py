# SPDX-License-Identifier: Apache-2.0
"""Faults of somebody's own that were written for an older context: refused in one line that names what is there now.

`own_fault_6f20727` is the package of docs/own-faults.md as it was then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from chaos.errors import ExitCode, UsageError
from chaos.experiment.steps import FaultStep
from chaos.fault import GONE, Evidence, Fault, FaultContext, Target
from chaos.runner.fault_context import RunContext
from chaos.runner.script import require_all
from chaos.runner.script.applied import AppliedFault

PACKAGE = Path(__file__).parent / "own_fault_6f20727"


def sevchaos(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    info = site / "niceness-1.dist-info"
    info.mkdir(exist_ok=True)
    for name in ("niceness.py", "nice.yaml"):
        (site / name).write_text((PACKAGE / f"{name}.txt").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: niceness\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sevchaos.faults]\nrenice = niceness:Renice\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "chaos.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [("explain", "renice"), ("validate", "nice.yaml"), ("run", "nice.yaml")])
def test_the_example_of_6f20727_is_told_what_to_import(tmp_path: Path, arguments: tuple[str, str]) -> None:
    verb, what = arguments
    done = sevchaos(tmp_path, verb, str(tmp_path / what) if what.endswith(".yaml") else what)
    assert done.returncode == ExitCode.USAGE, done.stderr
    line, remedy = done.stderr.splitlines()
    assert "FaultContext" in line and "ctx.vmms[target] for scene.vmm(target)" in line
    assert "docs/own-faults.md" in remedy


@dataclass
class Old(Fault):
    """One that imports nothing that is gone, and says `verb` of its context."""

    TARGET: ClassVar[Target] = "vmm"
    PROOF: ClassVar[str] = "none"

    verb: str

    def require(self, ctx: FaultContext, target: str) -> None:
        if self.verb == "cgroup":
            ctx.cgroup(".")  # type: ignore[attr-defined]

    def apply(self, ctx: FaultContext, target: str) -> None:
        getattr(ctx, self.verb)

    def evidence(self, ctx: FaultContext, target: str) -> Evidence:
        return Evidence(True, "")

    def undo(self, ctx: FaultContext, target: str) -> str:
        return ""


def context() -> RunContext:
    return RunContext(None, None, None, None, None, None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", GONE)
def test_every_verb_that_is_gone_has_a_successor_that_is_named(verb: str) -> None:
    log: Any = SimpleNamespace(now=lambda: 0, write=lambda record: None)
    applied = AppliedFault("old", Old(verb=verb), "source", 0, context(), log)
    with pytest.raises(UsageError) as raised:
        applied.apply()
    assert GONE[verb] in str(raised.value.remedy) and verb in raised.value.message


def test_a_verb_that_there_never_was_is_a_bug_of_the_faults() -> None:
    log: Any = SimpleNamespace(now=lambda: 0, write=lambda record: None)
    with pytest.raises(AttributeError, match="nonsense"):
        AppliedFault("old", Old(verb="nonsense"), "source", 0, context(), log).apply()


def test_what_a_fault_requires_is_asked_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    step = FaultStep(fault="old", target="source")
    monkeypatch.setattr("chaos.runner.script.find", lambda name, options: Old(verb="cgroup"))
    with pytest.raises(UsageError, match="'cgroup', which is gone"):
        require_all((step,), context())
