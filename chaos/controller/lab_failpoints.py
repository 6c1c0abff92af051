# SPDX-License-Identifier: Apache-2.0
"""The outside of a lab: it answers what a run asks (`chaos.runner.questions`), and has the software PSP do it.

One of these is made for each run and settled at its end, when it also says whether the lab is as it was before: a
firmware that died, was reset, or has a context that nobody will ever take from it is not given to the next run.
"""

from __future__ import annotations

from collections.abc import Sequence

from chaos.controller.lab_witness import Clock
from chaos.errors import SevchaosError
from chaos.lab.psp import failpoints
from chaos.lab.psp.client import PspControl
from chaos.lab.psp.plan import FailpointPlan, FailpointRule, Firing
from chaos.lab.psp.wire import StatusReply
from chaos.runner import questions
from chaos.runner.questions import (
    ArmFailpoints,
    CouldNotBreak,
    FailpointCount,
    Granted,
    LookAtFailpoints,
    Looked,
    OutsideAnswer,
    OutsideQuestion,
    WithdrawFailpoints,
)


class PspFailpoints:
    """What a run wants of the firmware of its lab: failpoints, and how often they took effect."""

    def __init__(self, psp: PspControl, clock: Clock) -> None:
        self._psp = psp
        self._clock = clock
        self._armed: dict[str, tuple[FailpointRule, ...]] = {}
        self._places: dict[str, int] = {}
        self._count = 0
        self._before: StatusReply | None = None

    async def begin(self) -> int:
        """Before anything of the run is done; how many commands there have been."""
        await self._psp.plan(FailpointPlan())
        self._before = await self._psp.status()
        return self._before.sequence

    async def answer(self, question: OutsideQuestion) -> OutsideAnswer:
        try:
            answer = await self._answer(question)
        except (SevchaosError, ValueError) as error:
            answer = CouldNotBreak(reason=f"the firmware: {error}")
        return questions.numbered(answer, question.number)

    async def _answer(self, question: OutsideQuestion) -> OutsideAnswer:
        match question:
            case ArmFailpoints():
                await self._arm(question)
            case WithdrawFailpoints():
                await self._psp.withdraw(question.name)
            case LookAtFailpoints():
                return self._looked(question.name, await self._psp.status())
        return Granted()

    async def _arm(self, question: ArmFailpoints) -> None:
        if question.name in self._armed:
            raise ValueError(f"{question.name!r} is armed already")
        rules = failpoints.named(failpoints.parse(question.failpoints), question.name)
        await self._psp.add(FailpointPlan(rules=rules, seed=question.seed))
        self._armed[question.name] = rules
        self._places[question.name] = self._count
        self._count += len(rules)

    def _looked(self, name: str, status: StatusReply) -> Looked:
        first = self._places.get(name, 0)
        points = [
            self._point(rule, [firing for firing in status.fired if firing.rule == place and firing.applied])
            for place, rule in enumerate(self._armed.get(name, ()), start=first)
        ]
        return Looked(points=tuple(points), stalled=status.held if status.held_by == name else "")

    def _point(self, rule: FailpointRule, fired: Sequence[Firing]) -> FailpointCount:
        at = [firing.at_ns + self._clock.ahead for firing in fired]
        return FailpointCount(failpoint=str(rule), count=len(at), first=at[0] if at else 0, last=at[-1] if at else 0)

    async def settle(self) -> str:
        """Take everything back, and say why the lab is of no use to another run, "" if it is."""
        await self._psp.plan(FailpointPlan())
        after = await self._psp.status()
        if after.stalled:
            await self._psp.release()
        if after.dead:
            return "its firmware is dead"
        if self._before is None:
            return ""
        for what, was, now in (
            ("platform", self._before.platform, after.platform),
            ("guest contexts", self._before.guest_count, after.guest_count),
            ("ASIDs in use", self._before.owned, after.owned),
        ):
            if was != now:
                return f"its firmware is not as it was: {what} {now}, before {was}"
        return ""
