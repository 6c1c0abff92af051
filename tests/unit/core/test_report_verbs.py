# SPDX-License-Identifier: Apache-2.0
"""`sevchaos check` of a stored run, in every format."""

from __future__ import annotations

import errno
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from chaos.cli.check_verb import check_
from chaos.cli.run_verb import run_
from chaos.controller.directory import RunDirectory
from chaos.controller.host_description import HostDescription
from chaos.errors import UsageError
from chaos.history.file import Writer
from tests.unit.core.build import moved, shipped


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A run that deviated as finding 0001 says."""
    directory = RunDirectory.create(tmp_path, shipped("move-across-cgroups"), 7, HostDescription(host="lab"))
    writer = Writer(directory.history)
    for record in moved(status_error=errno.EBADF).records:
        writer.write(record)
    writer.close()
    return directory.path


def check(*arguments: str) -> Result:
    return CliRunner().invoke(check_, arguments, standalone_mode=False)


def test_every_format(stored: Path) -> None:
    text, as_json, junit, ktap = (check(str(stored), "--format", form) for form in ("text", "json", "junit", "ktap"))
    assert {result.return_value for result in (text, as_json, junit, ktap)} == {1}
    assert text.stdout.splitlines()[-1] == "the run: broken; 6 kept, 1 broken; exit code 1"
    assert json.loads(as_json.stdout)["runs"][0]["outcome"] == "broken"
    assert ET.fromstring(junit.stdout).attrib["failures"] == "1"
    assert ktap.stdout.startswith("KTAP version 1\n1..1\n")
    assert "this is finding 0001" in junit.stdout
    assert "this is finding 0001" in ktap.stdout


def test_text_unless_told_otherwise_and_json_for_short(stored: Path) -> None:
    assert check(str(stored)).stdout == check(str(stored), "--format", "text").stdout
    for arguments in (["--json"], ["--json", "--format", "json"]):
        assert check(str(stored), *arguments).stdout == check(str(stored), "--format", "json").stdout


def test_what_is_accepted_passes_in_no_format(stored: Path) -> None:
    junit, ktap = (check(str(stored), "--accept-known", "--format", form) for form in ("junit", "ktap"))
    assert (junit.return_value, ktap.return_value) == (0, 0)
    root = ET.fromstring(junit.stdout)
    excused = {
        case.attrib["name"].split()[0]
        for case in root.iter("testcase")
        if any("finding 0001" in skipped.attrib["message"] for skipped in case.iter("skipped"))
    }
    assert (root.attrib["failures"], root.attrib["errors"], excused) == ("0", "0", {"P5"})
    assert "ok 1 move-across-cgroups on 6.12.117 (lab) # XFAIL 1 known deviation" in ktap.stdout


@pytest.mark.parametrize("form", ["text", "junit", "ktap"])
def test_two_formats_at_once(form: str, stored: Path) -> None:
    result = check(str(stored), "--json", "--format", form)
    assert isinstance(result.exception, UsageError)
    result = CliRunner().invoke(run_, ["move-across-cgroups", "--json", "--format", form], standalone_mode=False)
    assert isinstance(result.exception, UsageError)  # before anything starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kernel", "debian:6.12"), "--kernel chooses a lab's kernel; --host local has its own"),
        (("--jobs", "2"), "--jobs is how many labs; --host local is one machine"),
        (("--fresh",), "--fresh is a lab for each run; --host local has none"),
    ],
)
def test_what_is_about_labs_is_refused_for_this_machine(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(run_, ["move-across-cgroups", "--host", "local", *options], standalone_mode=False)
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == message


def test_how_much_may_be_skipped_or_unknown(stored: Path) -> None:
    accepting = [str(stored), "--accept-known"]
    assert check(*accepting, "--max-skipped", "0", "--max-unknown", "0").return_value == 0
    assert check(str(stored), "--max-skipped", "0").return_value == 1
    skipped = stored.parent / "skipped"
    shutil.copytree(stored, skipped)
    lines = (skipped / "history.jsonl").read_text().splitlines()
    end = json.loads(lines[-1]) | {"seq": 2, "complete": False, "reason": "it was inlined"}
    note = end | {"type": "Note", "seq": 1, "topic": "skipped", "text": "it was inlined", "step": -1, "witness": ""}
    for key in ("complete", "reason"):
        del note[key]
    (skipped / "history.jsonl").write_text("\n".join((lines[0], json.dumps(note), json.dumps(end))) + "\n")
    both = check(*accepting, str(skipped))
    assert both.return_value == 0
    assert "1 of 2 runs were skipped as a whole" in both.stdout
    assert "6 kept, 7 skipped, 1 broken as known; exit code 0" in both.stdout.splitlines()[-1]
    assert check(str(skipped)).return_value == 4
    assert check(*accepting, str(skipped), "--max-skipped", "7").return_value == 0
    assert check(*accepting, str(skipped), "--max-skipped", "6").return_value == 2
    assert check(str(skipped), "--max-skipped", "6").return_value == 2
