# SPDX-License-Identifier: Apache-2.0
"""A migration: what a VMM upgrade does, phase by phase.

    phase       source                destination
    connect     connect               connect          each gets an end of a socket to the other
    pause       pause
    send-state  get_state ──────────▶                  plain SEV only; after the move the source answers EIO
    send-fd     send_fd   ──────────▶
    move                              move             the one ioctl
    load-state                        set_state
    resume                            run
    commit      commit    ◀────────── commit           the guest is mine and runs, you may let go
    abort       run                                    instead, when a phase up to the move has failed

Before the move a failure leaves the source what it was, so it is put back into its guest. After it the source is dead
and there is no way back: the destination has to be able to go on. The source's descriptors stay open for asking.

A phase that has no meaning for a guest is left out: a SEV-ES guest's registers move by themselves, a guest that does
not run needs no pause and no resume.
"""

from __future__ import annotations

from chaos.history import Done
from chaos.stage import Guest, Stage
from chaos.vmm import wire
from chaos.vmm.messages import Commit, Connect, GetState, Move, SendFd, SetState

PHASES = ("connect", "pause", "send-state", "send-fd", "move", "load-state", "resume", "commit", "abort")


def connect(stage: Stage, source: Guest, destination: Guest, *, phase: str = "") -> None:
    """Give the two VMMs a socket to each other. Raises `StepFailed`."""
    ours, theirs = wire.pair()
    with ours, theirs:
        stage.must(source, Connect(vm=source.name, peer=destination.name), fds=(ours.number,), phase=phase)
        stage.must(destination, Connect(vm=destination.name, peer=source.name), fds=(theirs.number,), phase=phase)


def send(stage: Stage, source: Guest, destination: Guest, *, phase: str = "") -> Done:
    return stage.must(source, SendFd(vm=source.name, to=destination.vmm.name), phase=phase)


def migrate(stage: Stage, source: Guest, destination: Guest) -> None:
    """Hand the guest over. Raises `StepFailed` for anything that fails but the move, whose refusal is an answer."""
    every = source.every
    carries_state = not stage.is_es(source)
    connect(stage, source, destination, phase="connect")
    if every is not None:
        stage.leave(source, phase="pause")
    if carries_state:
        stage.must(source, GetState(vm=source.name), phase="send-state")
    send(stage, source, destination, phase="send-fd")
    moved = stage.do(destination, Move(vm=destination.name, source=source.name), phase="move")
    if moved.outcome != "ok":
        if every is not None and source.vmm.alive:
            stage.enter(source, every, phase="abort")
        return
    if carries_state:
        stage.must(destination, SetState(vm=destination.name), phase="load-state")
    if every is not None:
        stage.enter(destination, every, phase="resume")
    stage.must(destination, Commit(vm=destination.name), phase="commit")
    stage.must(source, Commit(vm=source.name), phase="commit")
