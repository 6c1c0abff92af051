# SPDX-License-Identifier: Apache-2.0
"""Who looks after a migration, as a management layer does: tries again, or leaves the guest where it is.

    abandon   one attempt; if it fails before the move, the guest stays at the source
    retry     up to `attempts`; before each further one a destination whose VMM has died is started afresh, as a new
              process of the same name in the same cgroup and network, with its VM created again

After the move nothing is tried again: a source that died is not needed any more, and a destination that died has taken
the guest with it. What became of each attempt goes to the history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from chaos.experiment.steps import MigrateStep, Phase
from chaos.history.records import Handover
from chaos.runner.guests import Guest, Guests
from chaos.runner.migration.attempt import Attempt, AttemptEnded
from chaos.runner.operations import OperationLog
from chaos.vmm.messages import Whose


def supervise(
    guests: Guests, log: OperationLog, step: MigrateStep, before: Callable[[Phase], None], between: Callable[[], None]
) -> None:
    """Carry the step out; `between` is called before it is tried again.

    Raises `StepFailed` for what is no answer: a VMM that does not give any, or cannot be started again.
    """
    source, destination = guests.launched(step.source), guests.launched(step.destination)
    number = 0
    again = True
    while again:
        number += 1
        ended = Attempt(guests, source, destination, step.within, before).carry_out()
        log.write(
            Handover(
                t=log.now(), step=log.step, source=source.name, destination=destination.name,
                attempt=number, outcome=ended.outcome, phase=ended.phase, guest=ended.guest, why=ended.why,
                stood=ended.stood, source_says=_word(source), destination_says=_word(destination),
            )
        )  # fmt: skip
        again = tries_again(step, number, ended)
        if again and not destination.vmm.alive:
            guests.restart(destination.vmm.name)
            guests.create(destination)
        if again:
            between()


def _word(guest: Guest) -> Literal["", "mine", "theirs"]:
    """Who has the guest, as this side's VMM sees it. Raises `StepFailed` if it lives and does not answer."""
    told = guest.vmm.ask(Whose(vm=guest.name))
    word = told.get("whose") if told is not None else ""
    return "mine" if word == "mine" else "theirs" if word == "theirs" else ""


def tries_again(step: MigrateStep, attempt: int, ended: AttemptEnded) -> bool:
    """After the attempt of that number, from 1, has ended."""
    return step.supervise == "retry" and ended.outcome in ("aborted", "refused") and attempt < step.attempts
