# SPDX-License-Identifier: Apache-2.0
"""Whether a source dies at one instant: a storm of ioctls on each source of a thousand moves.

    python bench/storm_moves.py [--moves 1000] [--chain 40] [--kernel K]… [--kind sev|sev-es]

A guest goes through a chain of VMs, to and fro between two VMMs in two cgroups. On each source eight threads make
ioctls before, during and after the move, and before that one that the kernel refuses (of the VM into itself), after
which nothing may have died. Then every descriptor of the source is asked again, and it is closed. The experiment is
written to a file and carried out by `sevchaos run --repeat`; what is told here is read from those runs' histories.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos.history import file
from chaos.history.records import Call, Done, History, Stormed
from chaos.lab.kernel.find import default_kernels

THREADS = 8
CALLS = (
    "KVM_GET_REGS", "KVM_RUN", "KVM_GET_SREGS", "KVM_SET_REGS", "KVM_GET_MP_STATE", "KVM_CHECK_EXTENSION",
    "KVM_GET_MSRS", "KVM_GET_CLOCK", "KVM_INTERRUPT",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--chain", type=int, default=40, help="moves in one run")
    parser.add_argument("--kernel", action="append", help="default: those that are tested with")
    parser.add_argument("--kind", choices=("sev", "sev-es"), default="sev")
    options = parser.parse_args()
    runs = -(-options.moves // options.chain)
    for kernel in options.kernel or default_kernels():
        with tempfile.TemporaryDirectory() as work:
            file = Path(work) / "storm-chain.yaml"
            file.write_text(json.dumps(experiment(options.chain, options.kind)))
            began = time.monotonic()
            command = ["run", str(file), "--kernel", kernel, "--repeat", str(runs), "--runs", work]
            done = subprocess.run(
                [sys.executable, "-m", "chaos.cli", *command, "--timeout", "3000", "--quiet", "--json"],
                stdout=subprocess.PIPE,
                check=False,
                text=True,
            )
            if done.returncode not in (0, 1, 2):
                raise SystemExit(f"sevchaos ended with {done.returncode}")
            show(kernel, options.kind, read(done.stdout), time.monotonic() - began)


def experiment(moves: int, kind: str) -> dict[str, Any]:
    names = [f"v{number}" for number in range(moves + 1)]
    script: list[dict[str, Any]] = [{"do": "launch", "vm": names[0]}]
    for source, destination in pairwise(names):
        script += [
            {"do": "launch", "vm": destination},
            {"do": "storm", "vm": source, "threads": THREADS, "calls": CALLS},
            {"do": "move", "source": source, "destination": source},
            {"do": "move", "source": source, "destination": destination},
            {"do": "calm", "vm": source},
            {"do": "ask", "vm": source},
            {"do": "close", "vm": source},
        ]
    return {
        "name": "storm-chain",
        "why": "If a source dies for one call before it dies for another, its VMM carries on with a guest not its own.",
        "promises": ["P3", "P8", "P9", "P12"],
        "vmms": {name: {"cgroup": name} for name in ("left", "right")},
        "vms": {
            name: {"vmm": ("left", "right")[number % 2], "kind": "plain" if number else kind, "vcpus": 2}
            for number, name in enumerate(names)
        },
        "script": [*script, {"do": "ask", "vm": names[-1]}],
    }


@dataclass
class Seen:
    """What the runs showed. `widths` are how closely the calls of a storm bound the instant, in ns."""

    outcomes: Counter[str] = field(default_factory=Counter)
    storms: int = 0
    moves: int = 0
    refused_moves: int = 0
    calls: int = 0
    inside: int = 0  # storms with calls answered before the death, and calls refused after it
    during: int = 0  # of these, with a call that began or ended while the move was under way
    across: int = 0  # of these, with an answered call that was under way when another was refused already
    widths: list[int] = field(default_factory=list)


def read(said: str) -> Seen:
    seen = Seen()
    for run in json.loads(said)["runs"]:
        seen.outcomes.update(f"{v['promise']} {v['outcome']}" for v in run["verdicts"] if v["listed"])
        told = file.read(Path(run["directory"]) / "history.jsonl")
        if told.damage:
            seen.outcomes["damaged history"] += 1
        for stormed, move in storms(told):
            count(seen, stormed, move)
        answers = [done for invoke, done in told.operations() if invoke.f == "move" and done is not None]
        seen.moves += sum(done.outcome == "ok" for done in answers)
        seen.refused_moves += sum(done.outcome == "fail" for done in answers)
    return seen


def storms(told: History) -> Iterator[tuple[Stormed, Done]]:
    """Each storm with the move that its VM died of."""
    moves = {
        invoke.args["source"]: done
        for invoke, done in told.operations()
        if invoke.f == "move" and done is not None and done.outcome == "ok"
    }
    for record in told.records:
        if isinstance(record, Stormed) and record.vm in moves:
            yield record, moves[record.vm]


def count(seen: Seen, stormed: Stormed, move: Done) -> None:
    seen.storms += 1
    seen.calls += sum(thread.calls for thread in stormed.threads)
    answered = [thread.answered for thread in stormed.threads if thread.answered is not None]
    refused = [thread.refused for thread in stormed.threads if thread.refused is not None]
    if not answered or not refused or any(thread.lost for thread in stormed.threads):
        return
    seen.inside += 1
    if any(inside(call, move) for call in (*answered, *refused)):
        seen.during += 1
        seen.across += max(call.ended for call in answered) > min(call.ended for call in refused)
    after = max(move.began, *(call.began for call in answered))
    seen.widths.append(min(move.ended, *(call.ended for call in refused)) - after)


def inside(call: Call, move: Done) -> bool:
    return move.began <= call.began <= move.ended or move.began <= call.ended <= move.ended


def show(kernel: str, kind: str, seen: Seen, seconds: float) -> None:
    print(f"\n{kernel}, {kind}, {seconds:.0f} s: {seen.moves} moves, {seen.refused_moves} more were refused")
    print(f"  {seen.storms} storms of {THREADS} threads on the sources, {seen.calls} ioctls")
    print(f"  {seen.inside} sources died inside their storm: calls were answered before, and failed with EIO after")
    print(f"  {seen.during} of them with calls that began or ended during the move, {seen.across} with one that was")
    print("      answered after another had failed, having begun before")
    if seen.widths:
        ordered = sorted(seen.widths)
        print(
            f"  the calls leave for the instant {statistics.median(ordered) / 1000:.0f} us (median),"
            f" {ordered[0] / 1000:.0f} to {ordered[-1] / 1000:.0f}"
        )
    print("  verdicts: " + ", ".join(f"{name} {number} times" for name, number in sorted(seen.outcomes.items())))


if __name__ == "__main__":
    main()
