# SPDX-License-Identifier: Apache-2.0
"""The runner as a program, on a machine that has no SEV: what it reads, what it writes, how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from chaos.errors import ExitCode, HostLacks
from chaos.experiment import load, model
from chaos.history.records import End, Header, Note, decode
from chaos.runner.order import Order
from chaos.safety.survey import Paths, hierarchy

ROOT = Path(model.__file__).parents[2]
FIRST = sorted((ROOT / "experiments" / "resilience").glob("*.yaml"))


def order(path: Path, seed: int = 1) -> bytes:
    return msgspec.json.encode(Order(experiment=load.load(path), seed=seed, host="local")) + b"\n"


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "chaos.runner.main", *arguments]
    return subprocess.run(argv, input=stdin, capture_output=True, timeout=60, check=False)


@pytest.fixture
def poor() -> None:
    """This machine must lack what a run needs."""
    try:
        hierarchy(Paths())
    except HostLacks:
        return
    if Path("/dev/sev").exists():
        pytest.skip("this machine may be able to run experiments")


@pytest.mark.usefixtures("poor")
def test_orders_are_carried_out_one_after_the_other_as_far_as_can_be() -> None:
    done = run(stdin=order(FIRST[0], seed=5) + b"\n" + order(FIRST[1]))
    assert (done.returncode, done.stderr) == (0, b"")
    records = [decode(line) for line in done.stdout.splitlines()]
    headers = [record for record in records if isinstance(record, Header)]
    assert [header.experiment for header in headers] == [path.stem for path in FIRST[:2]]
    assert headers[0].seed == 5 and headers[0].host == "local"
    ends = [record for record in records if isinstance(record, End)]
    assert len(ends) == 2 and records[-1] is ends[1]
    assert not ends[0].complete and ends[0].reason
    said = next(record for record in records if isinstance(record, Note) and record.topic == "error")
    assert said.text == ends[0].reason


@pytest.mark.parametrize("line", [b"{}\n", b"nonsense\n", b'{"experiment":{},"seed":1,"host":"lab"}\n'])
def test_what_is_no_order_is_refused(line: bytes) -> None:
    done = run(stdin=line)
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == b"" and done.stderr.startswith(b"this is no order: ")


def test_without_orders_there_is_nothing_to_say() -> None:
    assert run().returncode == 0
    assert run("--help").returncode == ExitCode.USAGE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_can_be_ended_at_any_time(number: int) -> None:
    """Also while it forks: both children are there, which is when a signal used to be lost."""
    argv = [sys.executable, "-m", "chaos.runner.main"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as runner:
        assert runner.stdin is not None and runner.stdout is not None and runner.stderr is not None
        runner.stdin.write(b"\n")
        runner.stdin.flush()
        while len(Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()) < 2:
            assert runner.poll() is None
        runner.send_signal(number)
        assert runner.wait(timeout=20) == ExitCode.INTERRUPTED
        assert runner.stdout.read() == b""
