# SPDX-License-Identifier: Apache-2.0
"""A stalled firmware command as a hold, over and over: is it reached every time, and what does a move do meanwhile?

    make bench, or: python bench/firmware_holds.py [--times N] [--kernel K]

In one run, in one lab: GUEST_STATUS of the source is stalled, a move of that source comes to wait behind it, every
counter is read, the command is released, and both operations answer. The source is a SEV-ES VM and the destination has
a vCPU too many, so that the move is refused in the end and can be tried again.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from chaos.errors import ExitCode
from chaos.experiment import Experiment, Order
from chaos.history import Done, End, Firmware, Held, Invoke, Observation, Record
from chaos.host import LabHost
from chaos.lab.session import Wish

MS = 1_000_000
TIMEOUT = 900.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--kernel", action="append", help="default: debian:6.1 and debian:6.12")
    options = parser.parse_args()
    missed = sum(show(kernel, options.times) for kernel in options.kernel or ("debian:6.1", "debian:6.12"))
    raise SystemExit(ExitCode.DEVIATED if missed else ExitCode.HELD)


def experiment(times: int) -> Experiment:
    script: list[dict[str, object]] = [{"do": "launch", "vm": "old"}, {"do": "launch", "vm": "new"}]
    for number in range(times):
        hold = f"psp-{number}"
        script += [
            {"do": "arm", "hold": hold, "firmware": {"command": "GUEST_STATUS"}},
            {"do": "call", "vm": "old", "operation": "guest_status", "wait": False},
            {"do": "hold", "vm": "old", "at": hold},
            {"do": "move", "source": "old", "destination": "new", "wait": False},
            {"do": "hold", "vm": "new", "at": "vm-locked"},
            {"do": "observe", "label": "held"},
            {"do": "release", "hold": hold},
            {"do": "join", "vm": "old"},
            {"do": "join", "vm": "new"},
        ]
    data = {
        "name": "firmware-holds",
        "why": "a bench",
        "promises": ["P8"],
        "vmms": {"source": {"cgroup": "source"}, "destination": {"cgroup": "destination"}},
        "vms": {
            "old": {"vmm": "source", "kind": "sev-es"},
            "new": {"vmm": "destination", "kind": "plain", "vcpus": 2},
        },
        "script": script,
    }
    return msgspec.convert(data, Experiment)


async def history(kernel: str, times: int) -> list[Record]:
    records: list[Record] = []
    host = LabHost(Wish(kernel=kernel), say=print)
    async with host.open(lambda line: None) as session:
        order = Order(experiment=experiment(times), seed=0, host="lab")
        await session.carry_out(order, record=records.append, timeout=TIMEOUT)
    return records


def show(kernel: str, times: int) -> int:
    """Print what was seen; how many holds were not reached, or not let go."""
    records = asyncio.run(history(kernel, times))
    end = records[-1]
    print(f"\n{kernel}: {times} times" + ("" if isinstance(end, End) and end.complete else f", cut short: {end}"))
    missed = 0
    for name, stalls in (("GUEST_STATUS of the source", True), ("the move of the source", False)):
        mine = [r for r in records if isinstance(r, Held) and (r.hold != "vm-locked") == stalls]
        reached = [held for held in mine if held.reached]
        missed += times - len(reached)
        print(f"  {name}: {len(reached)} of {times} reached")
        for (state, sleeping, stack), count in Counter((h.state, h.sleeping, h.stack) for h in reached).items():
            print(f"    {count}: state {state}, sleeping in {sleeping}; stack: {' < '.join(stack[:5])}")
    stalled = [r for r in records if isinstance(r, Firmware) and r.fault == "stall"]
    print(f"  the firmware, by its own word, stalled {len(stalled)} commands: {_counted(r.command for r in stalled)}")
    read = [r for r in records if isinstance(r, Observation) and r.label == "held"]
    print(f"  read meanwhile: {_counted(_charges(observation) for observation in read)}")
    for f in ("guest_status", "move"):
        after = list(_answers(records, f))
        missed += times - len(after)
        print(f"  {f} answered {len(after)} times: {_counted(_said(done) for done in after)}")
    waits = [(done.ended - done.began) / MS for done in _answers(records, "move")]
    if waits:
        print(f"  a move waited {statistics.median(waits):.1f} ms ({min(waits):.1f} to {max(waits):.1f})")
    return missed


def _answers(records: Sequence[Record], f: str) -> list[Done]:
    ops = {r.op for r in records if isinstance(r, Invoke) and r.f == f}
    return [r for r in records if isinstance(r, Done) and r.op in ops and r.outcome != "info"]


def _said(done: Done) -> str:
    return "ok" if done.outcome == "ok" else f"errno {done.errno}"


def _charges(observation: Observation) -> str:
    return ", ".join(f"{group} {observation.misc[group]['current']}" for group in ("source", "destination"))


def _counted(words: Iterable[str]) -> str:
    return "; ".join(f"{count} x {word}" for word, count in Counter(words).items())


if __name__ == "__main__":
    main()
