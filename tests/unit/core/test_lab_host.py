# SPDX-License-Identifier: Apache-2.0
"""A run in a lab that does not end by itself, and a lab that is kept waiting."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos import fault
from chaos.controller import lab_host
from chaos.controller.lab_host import LabSession
from chaos.controller.lab_witness import Clock
from chaos.errors import LabFailed, LabHung, PspDied
from chaos.history.records import End, Fault, Firmware, Invoke, Note, Record
from chaos.lab.machine import Lab, SerialLines, Spec
from chaos.lab.patience import kept_waiting
from chaos.lab.psp.mailbox import CommandRecord

SAW = CommandRecord(sequence=1, command="INIT", handle=None, status=0, start_ns=5, end_ns=6)


class Psp:
    """What a session wants of the software PSP. It gives what it saw when its trace is ended, or `dies` then."""

    def __init__(self, *, dies: bool = False, lost: int = 0) -> None:
        self.records: list[CommandRecord] = []
        self.lost = 0
        self._dies, self._loses = dies, lost

    async def plan(self, plan: object) -> None: ...

    async def status(self) -> object:
        return SimpleNamespace(sequence=0, guests=(), dead=False, state="INIT", held=None, fired=())

    async def trace(self, on: bool) -> None:
        if on:
            return
        if self._dies:
            raise PspDied("the software PSP ended")
        self.records.append(SAW)
        self.lost = self._loses


def session_of(
    psp: Psp, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None, *says: Record
) -> LabSession:
    """One whose run says this, and then ends or fails."""

    async def settle(self: object) -> str:
        return ""

    async def ask(order: object, keep: object, runner: object, **others: object) -> End:
        for record in says:
            cast("Any", keep)(record)
        if failure is not None:
            raise failure
        return End(t=9, complete=True)

    async def interrogate() -> tuple[str, ...]:
        return ("where it is",)

    monkeypatch.setattr("chaos.controller.lab_failpoints.PspFailpoints.settle", settle)
    lab = SimpleNamespace(psp=psp, ran=lambda: 0.0, kept_waiting=lambda: 0.0, interrogate=interrogate)
    return LabSession(cast("Any", lab), Clock(ahead=0, doubt=0), cast("Any", SimpleNamespace(ask=ask)), cast("Any", 0))


def carried_out(psp: Psp, failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What is told of a run that ends so; a LabHung is passed over."""
    session = session_of(psp, monkeypatch, failure)
    told: list[Record] = []
    try:
        asyncio.run(session.carry_out(cast("Any", None), record=told.append))
    except LabHung as hung:
        assert hung.console == ("where it is",)
    return told


def test_a_run_that_hangs_keeps_what_the_firmware_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    told = carried_out(Psp(lost=2), LabHung("the run was not done"), monkeypatch)
    assert [type(record) for record in told] == [Note, Firmware]
    assert isinstance(told[1], Firmware)
    assert told[1].command == "INIT"


def test_a_firmware_that_has_ended_too_does_not_hide_that_the_run_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carried_out(Psp(dies=True), LabHung("the run was not done"), monkeypatch) == []


def test_a_run_of_which_the_firmware_cannot_be_asked_any_more_is_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PspDied):
        carried_out(Psp(dies=True), None, monkeypatch)


def of_operation(f: str) -> Record:
    return Invoke(t=1, op=1, f=f, agent="source", pid=7, step=0)


def of_fault(name: str) -> Record:
    return Fault(t=1, fault=name, event="apply", step=0, target="")


@pytest.mark.parametrize(
    ("says", "spent"),
    [
        ((), ""),
        ((of_operation("move"), of_fault("kill")), ""),
        ((of_operation("reload"),), "the drivers were loaded anew"),
        ((of_operation("storage"),), "the firmware's storage was spoiled"),
        ((of_fault("kernel-return"),), "a kernel function was made to return something else"),
        ((of_fault("platform-reset"),), "the platform was reset"),
    ],
)
def test_what_nobody_undoes_is_the_last_that_a_lab_carries_out(
    says: tuple[Record, ...], spent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(Psp(), monkeypatch, None, *says)
    asyncio.run(session.carry_out(cast("Any", None), record=lambda record: None))
    assert session.spent == spent


def test_a_lab_whose_clock_was_compared_long_ago_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_host, "COMPARED_FOR", -1.0)
    session = session_of(Psp(), monkeypatch)
    asyncio.run(session.carry_out(cast("Any", None), record=lambda record: None))
    assert session.spent == "its clock was compared long ago"


def test_there_are_such_operations_and_faults() -> None:
    assert set(lab_host._FOR_GOOD) - {"storage", "reload"} <= set(fault.names())


def waited(kept: list[float], monkeypatch: pytest.MonkeyPatch, *, answers_after: float) -> str:
    """What a wait of 50 ms for an answer that comes after so many seconds comes to, where looks at how long QEMU was
    kept waiting finds the next number."""

    async def wait() -> str:
        lab = Lab(cast("Spec", SimpleNamespace()), SerialLines())
        looks = iter(kept)
        monkeypatch.setattr(lab, "kept_waiting", lambda: next(looks))
        monkeypatch.setattr(lab, "interrogate", lambda: asyncio.sleep(0, ()))
        try:
            return await lab.wait(asyncio.sleep(answers_after, "answered"), 0.05, "an answer")
        except LabFailed as failed:
            return failed.message
        finally:
            await lab.stop()

    return asyncio.run(wait())


def test_the_time_for_which_qemu_got_no_cpu_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes far too late in one, and never in the other."""
    assert waited([1.0, 1.0], monkeypatch, answers_after=5) == "waited 0.05 s for an answer, in vain"
    assert waited([1.0, 9.0], monkeypatch, answers_after=0.3) == "answered"


def test_how_long_a_process_waited_for_a_cpu() -> None:
    """Of a process that is there, by the kernel; of one that has ended nobody knows."""
    own = max(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat"))
    assert kept_waiting(os.getpid()) >= own / 1e9
    assert kept_waiting(1 << 22) == 0
