# SPDX-License-Identifier: Apache-2.0
"""Operations that are carried out aside: what is held in the kernel keeps nobody else, and nobody gets in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import pytest

from chaos.history.records import Value
from chaos.kvm.call import attempt, outside
from chaos.linux.seqpacket import Channel, pair
from chaos.vmm.agent import Agent
from chaos.vmm.machine import Machine
from chaos.vmm.messages import FROM_AGENT, REQUESTS, Begun, Close, Exit, Move, Operation, Reply, Request, Status

SECONDS = 20.0
NO_FD = -1


class Stub:
    """A VM whose GUEST_STATUS makes two system calls, the second of which is held for as long as the test wants."""

    def __init__(self) -> None:
        self.held, self.go_on = threading.Event(), threading.Event()
        self.between = 0
        self.mixed = False
        self.closed = False

    def guest_status(self) -> dict[str, Value]:
        self._touch()
        attempt(NO_FD, 0)
        self._touch()
        with outside():
            self.held.set()
            assert self.go_on.wait(SECONDS)
        self._touch()
        return {"handle": 7}

    def _touch(self) -> None:
        """What a thread does between its system calls. It gives Python's own lock up in the middle."""
        self.mixed |= self.between != 0
        self.between += 1
        time.sleep(0.0005)
        self.between -= 1

    def close(self) -> None:
        self.closed = True


class Answers:
    """Both ends of an agent's channel: what is sent to it, and what it says."""

    def __init__(self, agent: Agent, channel: Channel[Any], served: threading.Thread) -> None:
        self.agent, self.channel, self.served = agent, channel, served

    def ask(self, number: int, do: Operation, *, aside: bool = False) -> None:
        self.channel.send(Request(id=number, do=do, aside=aside))

    def next(self) -> Begun | Reply:
        message, fds = self.channel.receive(SECONDS)
        fds.close()
        return cast("Begun | Reply", message)


@pytest.fixture
def answers() -> Iterator[Answers]:
    ours, theirs = pair()
    channel: Channel[Any] = Channel.adopt(ours, FROM_AGENT)
    agent = Agent("source", Channel.adopt(theirs, REQUESTS))
    served = threading.Thread(target=agent.serve)
    served.start()
    yield Answers(agent, channel, served)
    channel.close()
    served.join(SECONDS)
    assert not served.is_alive()


def put(answers: Answers, name: str = "old") -> Stub:
    stub = Stub()
    answers.agent.machines[name] = cast(Machine, stub)
    return stub


def test_an_operation_held_in_the_kernel_keeps_nobody_else_from_being_answered(answers: Answers) -> None:
    stub, other = put(answers), put(answers, "other")
    other.go_on.set()
    answers.ask(1, Status(vm="old"), aside=True)
    begun = answers.next()
    assert isinstance(begun, Begun) and begun.id == 1
    assert begun.tid not in (0, threading.get_native_id(), answers.served.native_id)
    assert stub.held.wait(SECONDS)
    answers.ask(2, Status(vm="other"))
    answer = answers.next()
    assert isinstance(answer, Reply) and (answer.id, answer.value) == (2, {"handle": 7})
    stub.go_on.set()
    answer = answers.next()
    assert isinstance(answer, Reply) and (answer.id, answer.value) == (1, {"handle": 7})
    assert answer.began and answer.began <= answer.ended


def test_it_says_that_it_begins_once_and_only_if_asked_aside(answers: Answers) -> None:
    put(answers).go_on.set()
    answers.ask(1, Status(vm="old"))
    answers.ask(2, Status(vm="old"), aside=True)
    assert [type(answers.next()) for _ in range(3)] == [Reply, Begun, Reply]


def test_nobody_gets_in_between_what_another_does_to_a_vm(answers: Answers) -> None:
    assert not mixed(answers)


def test_without_turns_they_do(answers: Answers) -> None:
    answers.agent._turn = NoTurns()  # type: ignore[assignment]
    assert mixed(answers)


def mixed(answers: Answers) -> bool:
    """Whether of 60 operations, 40 of them aside, one found the VM in the middle of another."""
    stub = put(answers)
    stub.go_on.set()
    for number in range(60):
        answers.ask(number, Status(vm="old"), aside=number % 3 != 0)
    replies = [message for message in (answers.next() for _ in range(100)) if isinstance(message, Reply)]
    assert sorted(reply.id for reply in replies) == list(range(60))
    assert not any(reply.bug for reply in replies)
    return stub.mixed


class NoTurns(nullcontext[None]):
    def acquire(self) -> None:
        pass

    release = acquire


def test_a_vm_that_is_being_closed_is_nobody_elses(answers: Answers) -> None:
    stub = put(answers)
    held, go_on = threading.Event(), threading.Event()

    def close() -> None:
        held.set()
        assert go_on.wait(SECONDS)

    stub.close = close  # type: ignore[method-assign]
    answers.ask(1, Close(vm="old"), aside=True)
    assert isinstance(answers.next(), Begun)
    assert held.wait(SECONDS)
    answers.ask(2, Status(vm="old"))
    answer = answers.next()
    assert isinstance(answer, Reply) and answer.id == 2 and "has no VM 'old'" in answer.bug
    go_on.set()
    answer = answers.next()
    assert isinstance(answer, Reply) and answer.id == 1 and not answer.bug
    assert not answers.agent.machines


def test_a_vm_that_could_not_be_closed_is_still_there(answers: Answers) -> None:
    stub = put(answers)

    def close() -> None:
        raise TimeoutError("a vCPU is still in the guest")

    stub.close = close  # type: ignore[method-assign]
    answers.ask(1, Close(vm="old"))
    answer = answers.next()
    assert isinstance(answer, Reply) and "still in the guest" in answer.call
    assert list(answers.agent.machines) == ["old"]
    stub.close = lambda: None  # type: ignore[method-assign]


def test_a_bug_aside_is_told(answers: Answers) -> None:
    answers.ask(1, Move(vm="new", source="old"), aside=True)
    answer = answers.next()
    assert isinstance(answer, Reply) and "has no VM 'new'" in answer.bug


def test_an_agent_ends_whoever_is_held_in_the_kernel(answers: Answers) -> None:
    stub = put(answers)
    answers.ask(1, Status(vm="old"), aside=True)
    assert isinstance(answers.next(), Begun) and stub.held.wait(SECONDS)
    answers.ask(2, Exit())
    answer = answers.next()
    assert isinstance(answer, Reply) and answer.id == 2
    answers.served.join(SECONDS)
    assert not answers.served.is_alive() and stub.closed
    stub.go_on.set()
