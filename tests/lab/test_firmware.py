# SPDX-License-Identifier: Apache-2.0
"""A broken firmware in the lab: what it does to a run, what it leaves, and that nothing of it meets the next one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec
import pytest

from chaos.controller.host import Session
from chaos.controller.lab_host import LabHost, LabSession
from chaos.errors import LabHung
from chaos.experiment.model import Experiment
from chaos.history.records import Done, End, Fault, Firmware, Held, Invoke, Observation, Record
from chaos.lab.session import Wish
from chaos.runner.order import Order

pytestmark = pytest.mark.lab

STATUS: dict[str, object] = {"do": "call", "vm": "old", "operation": "guest_status"}
TIMEOUT = 120.0
EIO, EBUSY, ETIMEDOUT = 5, 16, 110
HWERROR_PLATFORM = 19


def experiment(*script: dict[str, object]) -> Experiment:
    """One guest and an empty VM; the destination has a vCPU too many for a SEV-ES guest, so that no move succeeds."""
    data = {
        "name": "script",
        "why": "a test",
        "promises": ["P8"],
        "questions": "own",
        "vmms": {"source": {"cgroup": "source"}, "destination": {"cgroup": "destination"}},
        "vms": {
            "old": {"vmm": "source", "kind": "sev-es"},
            "new": {"vmm": "destination", "kind": "plain", "vcpus": 2},
        },
        "script": [{"do": "launch", "vm": "old"}, {"do": "launch", "vm": "new"}, *script],
    }
    return msgspec.convert(data, Experiment)


async def carry_out(session: Session, script: Sequence[dict[str, object]], timeout: float = TIMEOUT) -> list[Record]:
    records: list[Record] = []
    order = Order(experiment=experiment(*script), seed=3, host="lab", timeout=timeout)
    await session.carry_out(order, record=records.append)
    return records


def answers(records: Sequence[Record], f: str) -> list[tuple[int, int]]:
    """Errno and status of the firmware of each operation of this name, in order."""
    ops = [r.op for r in records if isinstance(r, Invoke) and r.f == f]
    dones = {r.op: (r.errno, r.firmware) for r in records if isinstance(r, Done)}
    return [dones[op] for op in ops]


def faults(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [(r.command, r.fault) for r in records if isinstance(r, Firmware) and r.fault]


def plan(text: str, **options: object) -> dict[str, object]:
    return {"do": "fault", "fault": "firmware", "options": {"plan": text, **options}}


def evidence(records: Sequence[Record]) -> list[tuple[bool | None, str]]:
    return [(r.struck, r.detail) for r in records if isinstance(r, Fault) and r.event == "evidence"]


def test_what_was_broken_in_one_run_is_whole_in_the_next(kernel: str) -> None:
    """In one lab: a stalled command with a move behind it, a plan that fails and one that never strikes, then nothing.

    The first run leaves its stall to be undone at the end, and the second its plan.
    """

    async def main() -> None:
        async with LabHost(Wish(kernel=kernel), say=print).open(lambda line: None) as session:
            stalled = await carry_out(
                session,
                [
                    {"do": "arm", "hold": "psp", "firmware": {"command": "GUEST_STATUS"}},
                    STATUS | {"wait": False},
                    {"do": "hold", "vm": "old", "at": "psp"},
                    {"do": "move", "source": "old", "destination": "new", "wait": False},
                    {"do": "hold", "vm": "new", "at": "vm-locked"},
                    {"do": "observe", "label": "held"},
                ],
            )
            failed = await carry_out(
                session,
                [plan("GUEST_STATUS#2=fail:HWERROR_PLATFORM; SEND_START=skip"), STATUS, STATUS, STATUS],
            )
            well = await carry_out(session, [STATUS, STATUS])
            assert session.spent == ""
        for records in (stalled, failed, well):
            assert isinstance(records[-1], End) and records[-1].complete, records[-1]

        held = [r for r in stalled if isinstance(r, Held)]
        assert [(r.reached, r.state) for r in held] == [(True, "D"), (True, "D")]
        assert "__sev_do_cmd_locked" in held[0].stack and held[1].sleeping == "sev_lock_two_vms"
        (seen,) = (r for r in stalled if isinstance(r, Observation) and r.label == "held")
        assert seen.misc["source"]["current"]["sev_es"] == 1 and seen.misc["destination"]["current"]["sev_es"] == 0
        assert seen.guests is None, "the question would have waited behind the stalled command"
        assert answers(stalled, "guest_status") == [(0, 0)]
        assert faults(stalled) == [("GUEST_STATUS", "stall")]

        assert answers(failed, "guest_status") == [(0, 0), (EIO, HWERROR_PLATFORM), (0, 0)]
        assert faults(failed) == [("GUEST_STATUS", "fail:HWERROR_PLATFORM")]
        ((took_effect, detail),) = evidence(failed)
        assert took_effect is False, "one of its failpoints did not"
        assert (
            "GUEST_STATUS#2=fail:HWERROR_PLATFORM struck at " in detail and "SEND_START=skip did not strike" in detail
        )
        at = float(detail.partition("struck at ")[2].partition(";")[0])
        (command,) = (r for r in failed if isinstance(r, Firmware) and r.fault)
        assert abs(command.t / 1e9 - at) < 0.01, "by the host's clock"

        assert faults(well) == []
        assert answers(well, "guest_status") == [(0, 0), (0, 0)]

    asyncio.run(main())


def test_a_dead_firmware_takes_its_lab_with_it(kernel: str) -> None:
    """The driver finds out after the patience it was given, and nothing of the run waits for more."""

    async def main() -> None:
        async with LabHost(Wish(kernel=kernel), say=print).open(lambda line: None) as session:
            dead = await carry_out(session, [plan("GUEST_STATUS#1=dead"), STATUS, STATUS])
            assert session.spent == "its firmware is dead"
        assert answers(dead, "guest_status") == [(ETIMEDOUT, 0), (EBUSY, 0)]
        (done, _) = (r for r in dead if isinstance(r, Done) and r.errno)
        assert 2 <= (done.ended - done.began) / 1e9 < 60
        assert evidence(dead)[0][0] is True
        assert [r.status for r in dead if isinstance(r, Firmware) and r.fault] == [-1]
        observed = [r.guests for r in dead if isinstance(r, Observation)]
        assert observed == [0, None]

    asyncio.run(main())


def test_a_run_that_is_given_up_leaves_no_plan(kernel: str) -> None:
    """A runner that never gets round to its undoing: the outside does it, and lets go what is stalled."""

    async def main() -> None:
        async with LabHost(Wish(kernel=kernel), say=print).open(lambda line: None) as session:
            assert isinstance(session, LabSession)
            psp = session.lab.psp
            with contextlib.suppress(LabHung):
                await carry_out(
                    session,
                    [
                        plan("LAUNCH_START=fail:RESOURCE_LIMIT; GUEST_STATUS=stall"),
                        {"do": "status", "vm": "old"},
                    ],
                    timeout=10,
                )
                raise AssertionError("a status that is stalled does not end")
            status = await psp.status()
            assert (status.pending, status.stalled, status.fired) == (False, False, ())
            await psp.quit()

    asyncio.run(main())
