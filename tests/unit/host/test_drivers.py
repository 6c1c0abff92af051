# SPDX-License-Identifier: Apache-2.0
"""Loading drivers anew: in which order, and what is left when one of them does not go."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.experiment.steps import ReloadStep
from chaos.linux import modules
from chaos.runner.script import drivers
from chaos.runner.vmms import StepFailed

MODPROBE = """#!/bin/sh
echo "$@" >> {log}
case "$*" in {fails}) echo "modprobe: FATAL: Module is in use." >&2; exit 1;; esac
"""


@pytest.fixture
def modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has `modprobe` fail for what is given, and tells what it was called with."""
    log = tmp_path / "log"

    def failing(fails: str) -> Path:
        program = tmp_path / "modprobe"
        program.write_text(MODPROBE.format(log=log, fails=fails))
        program.chmod(0o755)
        return log

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return failing


def test_the_first_goes_first_and_comes_last_and_the_last_gets_the_parameters(modprobe: Any) -> None:
    log = modprobe("nothing")
    modules.reload(("kvm_amd", "ccp"), {"init_ex_path": "/run/psp/state", "psp_cmd_timeout": "7"})
    assert log.read_text().splitlines() == [
        "-r kvm_amd", "-r ccp", "ccp init_ex_path=/run/psp/state psp_cmd_timeout=7", "kvm_amd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fails", "called"),
    [("'-r kvm_amd'", ["-r kvm_amd"]), ("'-r ccp'", ["-r kvm_amd", "-r ccp", "kvm_amd"])],
)
def test_what_is_in_use_stays_and_what_is_gone_comes_back(modprobe: Any, fails: str, called: list[str]) -> None:
    log = modprobe(fails)
    with pytest.raises(OSError, match=rf"modprobe {fails.strip(chr(39))}: modprobe: FATAL: Module is in use"):
        modules.reload(("kvm_amd", "ccp"), {})
    assert log.read_text().splitlines() == called


class Run:
    """What the step wants of a run, and in which order it was done."""

    def __init__(self, *, there: bool = False) -> None:
        self.done: list[str] = []
        self.vm = SimpleNamespace(name="old", created=there, vmm=SimpleNamespace(alive=True))
        experiment = SimpleNamespace(vmms={"source": None, "destination": None}, ccp={"psp_cmd_timeout": "7"})
        self.guests = SimpleNamespace(all=(self.vm,), experiment=experiment, restart=self._said("restart"))
        platform = SimpleNamespace(close=lambda: self.done.append("close"), reopen=lambda: self.done.append("reopen"))
        self.ctx = SimpleNamespace(firmware=SimpleNamespace(platform=platform))
        self.log = SimpleNamespace(record=self._record)
        self.undo = ExitStack()

    def _said(self, what: str) -> Any:
        return lambda name: self.done.append(f"{what} {name}")

    def _record(self, f: str, act: Any, **args: str) -> None:
        self.done.append(f"{f} {args}")
        act()

    def none_under_way(self, why: str) -> None: ...


def carried_out(run: Run, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> list[str]:
    def reload(names: object, parameters: object) -> None:
        if fails:
            raise OSError(16, "Module ccp is in use")

    monkeypatch.setattr(modules, "reload", reload)
    executor = cast("Any", run)
    executor.vmms = type(
        "Vmms", (), {"__getitem__": lambda _, name: name, "end": lambda _, vmm: run._said("end")(vmm)}
    )()
    drivers.reload(executor, ReloadStep(ccp={"init_ex_path": "/run/psp/state"}))
    return run.done


def test_all_vmms_end_before_it_and_come_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"psp_cmd_timeout": "7", "init_ex_path": "/run/psp/state"}
    assert carried_out(Run(), monkeypatch) == [
        "end source", "end destination", "close", f"reload {parameters}", "reopen", "restart source",
        "restart destination",
    ]  # fmt: skip


def test_while_there_is_a_vm_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(there=True)
    with pytest.raises(StepFailed, match="old is there; close it"):
        carried_out(run, monkeypatch)
    assert run.done == []


def test_drivers_that_do_not_go_end_the_script_and_the_firmware_can_be_asked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run()
    with pytest.raises(StepFailed, match="could not be loaded anew: Module ccp is in use"):
        carried_out(run, monkeypatch, fails=True)
    assert run.done[-1] == "reopen"
