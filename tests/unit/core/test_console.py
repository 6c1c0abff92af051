# SPDX-License-Identifier: Apache-2.0
"""The console: what it shows twice, what only it shows, and how a run that breaks is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from chaos.controller.carry_out import carry_out
from chaos.controller.console import Heard, SerialConsole, unsaid
from chaos.controller.host_description import HostDescription
from chaos.errors import KernelPanicked
from chaos.history import file, records
from chaos.history.records import End, Header, History, Kernel, Record
from chaos.judge.verdict import Outcome
from chaos.runner.order import Order
from tests.unit.core.build import Builder, moved, shipped

AHEAD = 21_000_000  # nanoseconds


def header() -> Header:
    found = msgspec.structs.replace(Builder().records[0], log_ahead=AHEAD)
    assert isinstance(found, Header)
    return found


def kernel(microseconds: int, text: str) -> Kernel:
    return Kernel(t=microseconds * 1_000 + AHEAD, level=4, text=text)


def shown(lines: Sequence[str], *records: Record) -> list[tuple[int, str]]:
    """(own time in microseconds, text) of what only the console said."""
    found = unsaid([Heard(line, 5) for line in lines], (header(), *records))
    return [(line.t if line.t == 5 else (line.t - AHEAD) // 1_000, line.text) for line in found]


def test_what_the_log_has_said_is_not_said_again() -> None:
    lines = ["[    2.000001] a warning", "[    2.000002][  T123] another"]
    assert shown(lines, kernel(2_000_001, "a warning"), kernel(2_000_002, "another")) == []
    assert shown(lines, kernel(2_000_001, "a warning")) == [(2_000_002, lines[1])]
    assert shown(lines, kernel(2_000_003, "a warning"), kernel(2_000_002, "other")) == [
        (2_000_001, lines[0]), (2_000_002, lines[1])
    ]  # fmt: skip


def test_a_message_of_several_lines_and_of_bytes_that_do_not_print() -> None:
    lines = ["[    2.000001] one \\ two", "[    2.000001] thr\u00e9e\t"]
    assert shown(lines, kernel(2_000_001, r"one \x5c two\x0athr\xc3\xa9e\x09")) == []


def test_lines_without_a_time() -> None:
    assert shown(["", "   ", "said by a process", "said by both"], kernel(2_000_000, "said by both")) == [
        (5, "said by a process")
    ]


def test_what_was_said_before_the_run_and_shown_late_is_not_the_runs() -> None:
    began = (header().t - AHEAD) // 1_000
    line = f"[{began // 1_000_000:5d}.{began % 1_000_000:06d}]"
    early = f"[{(began - 1) // 1_000_000:5d}.{(began - 1) % 1_000_000:06d}]"
    assert shown([f"{early} before", f"{line} in it"]) == [(began, f"{line} in it")]


# -- a run that breaks ------------------------------------------------------------------------------------


class Panics:
    """A session that tells the first records of a whole run, and then its kernel's last words on the console."""

    spent = ""

    def __init__(self, console: SerialConsole, told: History) -> None:
        self._console, self._told = console, told

    async def carry_out(self, order: Order, *, record: Callable[[Record], None]) -> None:
        records = self._told.records[:20]
        for entry in (msgspec.structs.replace(records[0], log_ahead=AHEAD), *records[1:]):
            record(entry)
        record(Kernel(t=1_030_000_000 + AHEAD, level=1, text="BUG: kernel NULL pointer dereference, address: 08"))
        self._console.line("[    1.030000] BUG: kernel NULL pointer dereference, address: 08")
        self._console.line("[    1.031000] Kernel panic - not syncing: Fatal exception")
        raise KernelPanicked("the lab's kernel panicked: Fatal exception")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The directory of a run in which the kernel panicked."""
    console = SerialConsole()
    result = asyncio.run(
        carry_out(
            Panics(console, moved()), shipped("move-across-cgroups"), seed=7, where=HostDescription(host="lab"),
            runs=tmp_path, timeout=1.0, known=(), console=console, watch=lambda record: None,
        )
    )  # fmt: skip
    assert isinstance(result.broken, KernelPanicked)
    p12 = next(verdict for verdict in result.verdict.verdicts if verdict.promise == "P12")
    assert (p12.outcome, p12.signature) == (Outcome.BROKEN, "bug:kernel-NULL-pointer-dereference+panic")
    return result.directory


def test_a_panics_lines_are_in_the_history_once_and_the_end_comes_after_them(broken: Path) -> None:
    read = file.read(broken / "history.jsonl")
    assert read.damage == ""
    *_, bug, panic, end = read.records
    assert isinstance(bug, Kernel) and isinstance(end, End) and not end.complete
    assert isinstance(panic, records.Console)
    assert panic.text == "[    1.031000] Kernel panic - not syncing: Fatal exception"
    assert panic.t == 1_031_000_000 + AHEAD
    assert end.reason == "the host broke: the lab's kernel panicked: Fatal exception"


def test_the_logs_have_the_kernels_own_times(broken: Path) -> None:
    assert (broken / "dmesg.log").read_text().startswith("<1>[    1.030000] BUG: ")
    assert len((broken / "console.log").read_text().splitlines()) == 2
