# SPDX-License-Identifier: Apache-2.0
"""Files that are no experiments: each is refused by the command itself, in one screen, before anything is started."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import experiments
from chaos import cli
from chaos.controller.directory import RunDirectory
from chaos.errors import ExitCode, UsageError
from chaos.experiment import load
from tests.unit import broken
from tests.unit.mutation import mutated

SCREEN = 24
BROKEN = Path(broken.__file__).parent

Refused = Callable[[Path], str]


@pytest.fixture(params=["validate", "run", "plan"])
def refused(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Calls a verb on a file, as a user would; what was said. Whatever would start something is a failure."""
    here = tmp_path / "empty"
    here.mkdir()
    monkeypatch.chdir(here)

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("something was started")

    for place, name in ((subprocess, "Popen"), (asyncio, "create_subprocess_exec"), (os, "fork"), (asyncio, "run")):
        monkeypatch.setattr(place, name, started)
    monkeypatch.setattr(RunDirectory, "create", started)

    def call(path: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["sevchaos", request.param, str(path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, said = capsys.readouterr()
        assert (ended.value.code, out) == (ExitCode.USAGE, ""), said
        assert list(here.iterdir()) == []
        return said

    return call


def lines_on_screen(said: str) -> int:
    """Of 80 columns."""
    return sum(-(-len(line) // 80) for line in said.splitlines())


def test_every_broken_file_is_in_the_table() -> None:
    assert {path.name for path in BROKEN.glob("*.yaml")} == set(broken.SAID)
    assert len(broken.SAID) >= 50


@pytest.mark.parametrize("name", broken.SAID)
def test_a_broken_file_is_told_where_and_what_is_allowed(name: str, refused: Refused) -> None:
    said = refused(BROKEN / name)
    assert all(phrase in said for phrase in broken.SAID[name]), said
    assert "  what to do: " in said and ".yaml: " in said
    assert lines_on_screen(said) <= SCREEN
    assert said.replace("\n", "").isprintable()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to("/nowhere")


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def ten_megabytes(path: Path) -> None:
    path.write_bytes(b"name: x\n" + b"# more\n" * 1_500_000)


def a_terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


ODD: dict[Callable[[Path], None], str] = {
    Path.mkdir: "Is a directory",
    a_fifo: "is a pipe, not a file",
    a_socket: "No such device or address",
    a_loop: "Too many levels of symbolic links",
    nowhere: "No such file or directory",
    zeros: "is a device, not a file",
    memory: "Input/output error",
    ten_megabytes: "has more than 256 KiB",
    a_terabyte: "has more than 256 KiB",
}


@pytest.mark.parametrize("make", ODD, ids=lambda make: str(make.__name__))
def test_what_is_no_file_is_not_waited_for(make: Callable[[Path], None], refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    make(path)
    said = refused(path)
    assert ODD[make] in said and "odd.yaml" in said and lines_on_screen(said) <= SCREEN


def test_a_path_that_is_none(refused: Refused, tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / f"{'x' * 300}.yaml")
    with pytest.raises(UsageError, match="is no path: embedded null byte"):  # no argument of a command can have one
        load.load(Path("a\0b.yaml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.touch(mode=0)
    assert "Permission denied" in refused(path)


def test_a_mark_of_byte_order_is_no_harm(tmp_path: Path) -> None:
    good = experiments.catalogue()["move-across-cgroups"]
    path = tmp_path / "marked.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    assert load.load(path) == load.load(good)


def test_like_may_be_a_pipe_and_is_not_waited_for(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("name: odd\nwhy: a test\nlike: other\n")
    os.mkfifo(tmp_path / "other.yaml")
    assert "like: there is no other.yaml beside it" in refused(tmp_path / "odd.yaml")


# -- by chance ------------------------------------------------------------------------------------------------

CATALOGUE = [path.read_bytes() for path in experiments.catalogue().values()]
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 17, 1 << 64, 10**50, 1.5, float("nan"), float("inf"), "", "x", "old", "a" * 3000, "\x1b[31m",
    "\n", b"\xff", [], {}, ["x"], {"do": "launch"}, {"do": "nothing"}, {"do": "migrate", "before": {"move": [None]}},
)  # fmt: skip


def refused_or_good(path: Path) -> None:
    """It is one or the other, and what is said fits on a screen."""
    try:
        load.load(path)
    except UsageError as error:
        said = f"sevchaos: {error.message}\n  what to do: {error.remedy}"
        assert str(path) in said and error.remedy and lines_on_screen(said) <= SCREEN, said
        assert said.replace("\n", "").isprintable(), said


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [above, *(place for key, value in below for place in places(value, (*above, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_thing_changed_in_an_experiment(tmp_path: Path, data: st.DataObject) -> None:
    """A key renamed or left out, a value of another kind: anywhere in any experiment of the catalogue."""
    whole = yaml.safe_load(data.draw(st.sampled_from(CATALOGUE)))
    *above, last = data.draw(st.sampled_from(places(whole)[1:]))
    changed = whole
    for part in above:
        changed = changed[part]
    change = data.draw(st.sampled_from(["value", "away", "key"] if isinstance(changed, dict) else ["value", "away"]))
    if change == "value":
        changed[last] = data.draw(st.sampled_from(ODD_VALUES))
    else:
        value = changed.pop(last)
        if change == "key":
            changed[data.draw(st.sampled_from(["x", "Old", "", "vm", "do", "\x1b", "a" * 300]))] = value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(whole))
    refused_or_good(path)


MILLION = 1_000_000


def test_a_million_random_bytes(tmp_path: Path) -> None:
    """Nonsense, nonsense of YAML's own characters, and experiments with bytes changed, lost, doubled and swapped."""
    chance = random.Random(4)
    path = tmp_path / "random.yaml"
    fed = 0
    while fed < MILLION:
        kind = chance.random()
        if kind < 0.3:
            data = chance.randbytes(chance.choice([1, 10, 1000, 100_000]))
        elif kind < 0.5:
            data = "".join(chance.choices("ab:-{}[],'\"\n #&*!|>%@`?.0~<", k=chance.choice([10, 100, 1000]))).encode()
        else:
            data = mutated(chance.choice(CATALOGUE), chance)
        path.write_bytes(data)
        refused_or_good(path)
        fed += len(data)
