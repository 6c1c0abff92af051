# SPDX-License-Identifier: Apache-2.0
"""The verbs about the catalogue and the faults: list, explain, plan, validate, new, and what --select chooses."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import experiments
from chaos import fault
from chaos.cli.explain_verb import explain_
from chaos.cli.list_verb import list_
from chaos.cli.new_verb import new_
from chaos.cli.plan_verb import plan_
from chaos.cli.run_verb import run_
from chaos.cli.validate_verb import validate_
from chaos.errors import ExitCode, UsageError
from chaos.experiment import load
from experiments.choosing import matches


def call(verb: click.Command, *arguments: str) -> Result:
    result = CliRunner().invoke(verb, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("expression", "true"),
    [
        ("kill", True),
        ("KILL", True),
        ("network", False),
        ("kill and not network", True),
        ("not (kill or network)", False),
        ("sev-es", True),
        ("source-in", True),
        ("p3 and resilience", True),
        ("p3 or nothing and nothing", True),
    ],
)
def test_what_an_expression_is_true_of(expression: str, true: bool) -> None:
    assert matches(expression, "kill-source-in-move", {"kill", "sev-es", "p3", "resilience"}) is true


@pytest.mark.parametrize("expression", ["", "kill and", "kill == 1", "f(x)", "'kill'", "kill; kill", "1", "((((", "\0"])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match="--select"):
        matches(expression, "name", frozenset())


@given(st.text(max_size=60))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        assert matches(text, "name", frozenset({"kill"})) in (True, False)
    except UsageError as error:
        assert error.remedy


def test_selecting_is_by_what_experiments_say() -> None:
    killing = experiments.select("kill")
    assert {"kill-source-in-move", "kill-destination-in-move"} <= set(killing)
    assert not set(killing) & set(experiments.select("not kill"))
    assert experiments.select(None) == experiments.catalogue()
    with pytest.raises(UsageError, match="no experiment is selected"):
        experiments.select("kill and not kill")


def test_running_nothing_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="nothing to run"):
        call(run_)


@pytest.mark.parametrize("name", fault.names())
def test_every_fault_explains_itself(name: str) -> None:
    told = json.loads(call(explain_, name, "--json").stdout)
    assert told["does"] and told["proof"] and told["needs"] and told["where"]
    text = call(explain_, name).stdout
    assert all(option["name"] in text for option in told["options"])
    assert name in call(list_, "faults").stdout


def test_an_experiment_is_explained_by_its_plan() -> None:
    shown = call(plan_, "kill-source-in-move").stdout
    assert call(explain_, "kill-source-in-move").stdout == shown
    assert "apply the fault kill to source" in shown and "puts to the test: P1" in shown
    with pytest.raises(UsageError, match="neither a fault nor an experiment"):
        call(explain_, "nobody")


def test_the_plan_for_machines_is_the_experiment() -> None:
    found = experiments.find("move-across-cgroups")
    assert load.decode(call(plan_, "move-across-cgroups", "--json").stdout_bytes) == found


def test_files_are_validated_each_by_itself(tmp_path: Path) -> None:
    good = experiments.catalogue()["move-across-cgroups"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: Bad\n")
    result = call(validate_, str(good), str(bad), str(tmp_path / "none.yaml"))
    assert result.return_value == ExitCode.USAGE
    assert "move-across-cgroups, " in result.stdout
    assert "bad.yaml: name:" in result.stderr and "none.yaml: No such file" in result.stderr
    assert call(validate_, str(good)).return_value == ExitCode.KEPT


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
def test_what_is_new_is_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    call(new_, "mine", "--kind", kind)
    written = load.load(Path("mine.yaml"))
    assert written.name == "mine" and written.vms["old"].kind == kind
    with pytest.raises(UsageError, match="is there already"):
        call(new_, "mine")
    with pytest.raises(UsageError, match="is no name"):
        call(new_, "../mine")
    with pytest.raises(UsageError, match="there is no fault"):
        call(new_, "other", "--fault", "nothing")
