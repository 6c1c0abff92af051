# SPDX-License-Identifier: Apache-2.0
"""What the pages show in blocks is what the program takes: experiments and steps, records, Python."""

from __future__ import annotations

import ast
from pathlib import Path

import msgspec
import pytest
import yaml

from chaos import convert, fault
from chaos.experiment import load
from chaos.experiment.steps import FaultStep, Step, walk
from chaos.history import records
from chaos.linux.kfault import Kfault
from tests.pages import blocks


def titled(language: str) -> list[pytest.ParameterSet]:
    return [pytest.param(text, id=f"{page}-{number}") for number, (page, text) in enumerate(blocks(language))]


@pytest.mark.parametrize("text", titled("yaml"))
def test_yaml_is_an_experiment_or_steps_of_one(text: str, tmp_path: Path) -> None:
    data = yaml.safe_load(text.replace("why: \u2026", "why: as shown"))
    if isinstance(data, dict) and "like" in data:
        path = Path(load.__file__).parents[2] / "experiments" / "resilience" / f"{data['like']}.yaml"
        assert path.exists()
        assert msgspec.convert(data, load.Likeness).like == data["like"]
    elif isinstance(data, dict):
        path = tmp_path / f"{data['name']}.yaml"
        path.write_text(text)
        assert load.load(path).script
    else:
        steps = convert.convert(data, tuple[Step, ...])
        assert steps
        for _, step in walk(steps):
            if isinstance(step, FaultStep):
                fault.find(step.fault, step.options)


@pytest.mark.parametrize("text", titled("json"))
def test_json_is_records(text: str) -> None:
    assert [records.decode(line.encode()) for line in text.splitlines()]


@pytest.mark.parametrize("text", titled("python"))
def test_python_is_python_and_names_what_there_is(text: str) -> None:
    tree = ast.parse(text)
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    for node in imported:
        module = __import__(node.module or "", fromlist=["_"])
        assert all(hasattr(module, name.name) for name in node.names)
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    called = {c.attr for c in calls if isinstance(c.value, ast.Name) and c.value.id == "kfault"}
    assert all(hasattr(Kfault, name) for name in called)
