# SPDX-License-Identifier: Apache-2.0
"""What the operations of a sweep say themselves of the kernel's fault points on their way."""

from __future__ import annotations

from dataclasses import dataclass

from chaos.history.records import History


@dataclass(frozen=True, slots=True)
class Swept:
    """One operation, made again and again, on a VM or if `vm` is "" on the platform. `counts` are how many fault points
    there were each time that none was to fail, and it went well; `refused_counts` is how often it did not, which says
    nothing of how many there are. Of the others, `tried` are which point was to fail, by number from 1, `failed` those
    of them that did, and `refused` those that the operation was refused for."""

    vm: str
    operation: str
    counts: tuple[int, ...]
    refused_counts: int
    tried: frozenset[int]
    failed: frozenset[int]
    refused: frozenset[int]


def swept(history: History, step: int, vm: str, operation: str) -> Swept:
    """Of the step of this number in the script."""
    which = step, operation, vm
    made = [
        (int(str(done.value["fail_nth"])), done)
        for invoke, done in history.operations()
        if (invoke.step, invoke.f, invoke.args.get("vm", "")) == which and done is not None and "fail_nth" in done.value
    ]
    failed = [(nth, done) for nth, done in made if nth and done.value["struck"]]
    return Swept(
        vm,
        operation,
        counts=tuple(int(str(done.value["points"])) for nth, done in made if not nth and done.outcome == "ok"),
        refused_counts=sum(not nth and done.outcome != "ok" for nth, done in made),
        tried=frozenset(nth for nth, _ in made if nth),
        failed=frozenset(nth for nth, _ in failed),
        refused=frozenset(nth for nth, done in failed if done.errno),
    )
