# SPDX-License-Identifier: Apache-2.0
"""Migrations between real VMMs in network namespaces, on a KVM without SEV.

The guests are plain VMs on one memory. The move is the only thing that needs SEV: here it does nothing and succeeds,
unless a test wants the kernel to be asked, which refuses it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos.experiment.model import Experiment, Vm
from chaos.experiment.model import Vmm as VmmSpec
from chaos.experiment.steps import MigrateStep, Phase
from chaos.history import records
from chaos.history.records import Handover, Invoke, Record
from chaos.kinds import Kind
from chaos.kvm import vm as kvm_vm
from chaos.kvm.vcpu import KvmVcpu
from chaos.linux.loop import LOOK_AGAIN, Loop
from chaos.netns import link
from chaos.runner.guests import Guests
from chaos.runner.migration.attempt import AttemptEnded
from chaos.runner.migration.supervisor import supervise, tries_again
from chaos.runner.network import Network, between
from chaos.runner.operations import OperationLog
from chaos.runner.recorder import Recorder
from chaos.runner.vmms import StepFailed, VmmProcesses
from chaos.vmm.messages import Sample
from chaos.vmm.server import ForkServer
from tests.unit.host.conftest import Nowhere

needs = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs root and KVM"
)
SECONDS = 20.0
VCPUS = 2
UP_TO_THE_MOVE: tuple[Phase, ...] = ("connect", "pause", "send-state", "send-fd", "move")
AFTER_IT: tuple[Phase, ...] = ("load-state", "resume", "commit", "confirm")


class House:
    """Two VMMs, `old` in one of them running, `new` created in the other."""

    def __init__(self, stack: ExitStack) -> None:
        self.log = Path(tempfile.mkstemp()[1])
        stack.callback(self.log.unlink)
        fd = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        stack.callback(os.close, fd)
        server = ForkServer()
        stack.callback(server.close)
        groups: Any = {"a": Nowhere(), "b": Nowhere()}
        self.operations = OperationLog(Recorder(fd))
        vmms = VmmProcesses(server, Loop(), self.operations)
        self.guests = Guests(_experiment(), vmms, executes_es=False, cgroups=groups)
        stack.callback(self.guests.clear)
        stack.callback(vmms.close)
        self.guests.network = Network.lay(between([("source", "destination")]))
        self.guests.start()
        for name in ("old", "new"):
            self.guests.create(self.guests[name])
        self.guests.enter(self.guests["old"], 1)
        self.counts("old")

    def counts(self, name: str, further: int = 20) -> int:
        """Wait until every vCPU has counted so many further; the least of their counters."""
        vm = self.guests[name]
        first: list[tuple[int, ...]] = []

        def counted() -> bool:
            sampled = self.guests.vmms.ask(vm.vmm, Sample(vm=name)).sampled
            assert sampled is not None and not sampled.ended and not sampled.stale
            first.append(sampled.each)
            return all(now - then >= further for now, then in zip(sampled.each, first[0], strict=True))

        self.guests.vmms.loop.wait(counted, SECONDS, f"{name} to count", look=LOOK_AGAIN)
        return min(first[-1])

    def stands(self, name: str) -> tuple[int, ...]:
        """The counters of a guest that is out."""
        sampled = self.guests.vmms.ask(self.guests[name].vmm, Sample(vm=name)).sampled
        assert sampled is not None and sampled.where == "registers"
        return sampled.each

    def kill(self, name: str) -> None:
        vmm = self.guests.vmms[name]
        signal.pidfd_send_signal(vmm.pidfd, signal.SIGKILL)
        assert vmm.wait_end(SECONDS)

    def migrate(self, do: dict[Phase, Callable[[], object]] | None = None, **options: object) -> list[Handover]:
        """What became of each attempt. `do` is done once before a phase."""
        left = dict(do or {})
        step = MigrateStep(source="old", destination="new", **options)  # type: ignore[arg-type]

        def before(phase: Phase) -> None:
            if phase in left:
                left.pop(phase)()

        supervise(self.guests, self.operations, step, before, lambda: None)
        return [record for record in self.records() if isinstance(record, Handover)]

    def records(self) -> list[Record]:
        return [records.decode(line) for line in self.log.read_bytes().splitlines()]

    def phases(self) -> list[str]:
        return list(dict.fromkeys(r.phase for r in self.records() if isinstance(r, Invoke) and r.phase))


def _experiment() -> Experiment:
    return Experiment(
        name="by-hand",
        why="",
        promises=("P5",),
        vmms={"source": VmmSpec(cgroup="a"), "destination": VmmSpec(cgroup="b")},
        vms={
            "old": Vm(vmm="source", kind=Kind.PLAIN, vcpus=VCPUS),
            "new": Vm(vmm="destination", kind=Kind.PLAIN, vcpus=VCPUS),
        },
        script=(),
    )


@pytest.fixture
def refusing() -> Iterator[House]:
    """A house on a kernel that refuses every move: this one, on a CPU without SEV."""
    with ExitStack() as stack:
        yield House(stack)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """A house whose VMMs think that they have moved."""
    monkeypatch.setattr(kvm_vm.KvmVm, "move_context_from", lambda *_, **__: None)
    with ExitStack() as stack:
        yield House(stack)


# -- one attempt ----------------------------------------------------------------------------------------------


@needs
def test_the_guest_goes_on_at_the_destination(house: House) -> None:
    before = house.counts("old")
    (ended,) = house.migrate()
    assert (ended.outcome, ended.phase, ended.guest, ended.why) == ("committed", "confirm", "new", "")
    assert (ended.source_says, ended.destination_says) == ("theirs", "mine")
    assert house.phases() == [*UP_TO_THE_MOVE, *AFTER_IT]
    assert len(ended.stood) == VCPUS and min(ended.stood) > 0
    assert house.counts("new") > before


@needs
def test_a_move_that_is_refused_leaves_the_guest_at_the_source(refusing: House) -> None:
    before = refusing.counts("old")
    (ended,) = refusing.migrate()
    assert (ended.outcome, ended.phase, ended.guest) == ("refused", "move", "old")
    assert (ended.source_says, ended.destination_says) == ("mine", "theirs")
    assert "KVM_ENABLE_CAP MOVE_ENC_CONTEXT_FROM: EINVAL" in ended.why
    assert refusing.phases() == [*UP_TO_THE_MOVE, "abort"]
    assert len(ended.stood) == VCPUS and min(ended.stood) > 0
    assert refusing.counts("old") > before


@needs
@pytest.mark.parametrize("phase", UP_TO_THE_MOVE)
def test_a_destination_that_dies_before_the_move_is_not_missed(house: House, phase: Phase) -> None:
    before = house.counts("old")
    (ended,) = house.migrate({phase: lambda: house.kill("destination")})
    assert (ended.outcome, ended.guest, ended.destination_says) == ("aborted", "old", "")
    assert ended.source_says == ("" if phase == "connect" else "mine")  # it was in no migration yet
    assert house.phases()[-1] == "abort"
    assert house.counts("old") > before


@needs
@pytest.mark.parametrize("phase", UP_TO_THE_MOVE)
def test_with_retry_the_guest_gets_there_all_the_same(house: House, phase: Phase) -> None:
    before = house.counts("old")
    pid = house.guests.vmms["destination"].pid
    first, second = house.migrate({phase: lambda: house.kill("destination")}, supervise="retry")
    assert (first.outcome, first.attempt, first.guest) == ("aborted", 1, "old")
    assert (second.outcome, second.attempt, second.guest) == ("committed", 2, "new")
    assert house.guests.vmms["destination"].pid != pid
    assert house.counts("new") > before
    told = [r for r in house.records() if isinstance(r, Invoke) and r.f == "spawn" and r.agent == "destination"]
    assert len(told) == 2


@needs
@pytest.mark.parametrize("phase", AFTER_IT)
def test_a_destination_that_dies_after_the_move_takes_the_guest_with_it(house: House, phase: Phase) -> None:
    (ended,) = house.migrate({phase: lambda: house.kill("destination")}, supervise="retry", attempts=5)
    assert (ended.outcome, ended.phase, ended.guest) == ("lost", phase, "")
    assert "the VMM of new is dead" in ended.why
    # Nothing asked this kernel whether the source is dead, which it is not. What the destination said last was heard.
    assert ended.source_says == ("theirs" if phase == "confirm" else "mine")


@needs
@pytest.mark.parametrize("phase", ("connect", "pause", "send-state", "send-fd"))
def test_a_source_that_dies_with_its_descriptor_has_lost_the_guest(house: House, phase: Phase) -> None:
    (ended,) = house.migrate({phase: lambda: house.kill("source")}, supervise="retry")
    assert (ended.outcome, ended.phase, ended.guest, ended.why) == ("lost", phase, "", "the VMM of old is dead")


@needs
@pytest.mark.parametrize("phase", ("move", *AFTER_IT))
def test_a_source_that_dies_after_its_descriptor_was_sent_is_not_missed(house: House, phase: Phase) -> None:
    before = house.counts("old")
    (ended,) = house.migrate({phase: lambda: house.kill("source")})
    last = "confirm" if phase == "confirm" else "commit"
    assert (ended.outcome, ended.phase, ended.guest) == ("committed", last, "new")
    assert (ended.source_says, ended.destination_says) == ("", "mine")
    assert ended.why == "the VMM of old is dead"
    assert house.counts("new") > before


@needs
@pytest.mark.parametrize(
    ("phase", "ended_in", "why"),
    [
        ("connect", "connect", "connect of old: waited 0.3 s to connect to 192.0.2."),
        ("send-state", "send-state", "get_state of old: waited 0.3 s to hear that the state of the vCPUs arrived"),
    ],
)
def test_a_network_that_is_gone(house: House, phase: Phase, ended_in: str, why: str) -> None:
    before = house.counts("old")
    end = house.guests.network.interfaces["source", "destination"].end
    (ended,) = house.migrate({phase: lambda: link.set_up(end, False)}, within=0.3)
    assert (ended.outcome, ended.phase, ended.guest) == ("aborted", ended_in, "old")
    assert why in ended.why or "Network is unreachable" in ended.why
    assert house.counts("old") > before
    link.set_up(end, True)
    link.wait_running(house.guests.network.interfaces["destination", "source"].end)
    assert house.migrate(within=SECONDS)[-1].outcome == "committed"
    assert house.counts("new") > before


@needs
def test_a_confirmation_that_does_not_arrive(house: House) -> None:
    end = house.guests.network.interfaces["source", "destination"].end
    (ended,) = house.migrate({"commit": lambda: link.set_up(end, False)}, within=0.3)
    assert (ended.outcome, ended.phase, ended.guest) == ("committed", "confirm", "new")
    assert "waited 0.3 s to hear that the source lets go" in ended.why
    house.counts("new")


@needs
def test_a_destination_that_does_not_take_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "KVM_SET_REGS")

    monkeypatch.setattr(kvm_vm.KvmVm, "move_context_from", lambda *_, **__: None)
    monkeypatch.setattr(KvmVcpu, "set_xcrs", refuse)
    with ExitStack() as stack:
        (ended,) = House(stack).migrate(supervise="retry")
        assert (ended.outcome, ended.phase, ended.guest) == ("lost", "load-state", "")
        assert "set_state of new: KVM_SET_REGS: EINVAL" in ended.why


@needs
@pytest.mark.parametrize("phase", ("connect", "send-state", "send-fd", "move"))
def test_a_guest_that_was_paused_stands_still_whatever_becomes_of_the_attempts(house: House, phase: Phase) -> None:
    old, new = house.guests["old"], house.guests["new"]
    house.guests.leave(old)
    stood = house.stands("old")
    first, second = house.migrate({phase: lambda: house.kill("destination")}, supervise="retry")
    assert (first.outcome, first.guest, second.outcome, second.guest) == ("aborted", "old", "committed", "new")
    assert not {"pause", "resume"} & {*house.phases()}
    assert (old.paused, old.running, new.paused, new.running) == (False, False, True, False)
    assert house.stands("new") == stood
    house.guests.enter(new, 1)
    assert house.counts("new") > min(stood)


@needs
def test_a_guest_that_was_paused_stands_at_its_source_when_the_move_was_refused(refusing: House) -> None:
    old = refusing.guests["old"]
    refusing.guests.leave(old)
    stood = refusing.stands("old")
    ended = refusing.migrate(supervise="retry", attempts=3)
    assert [each.outcome for each in ended] == ["refused"] * 3
    assert old.paused and not old.running and refusing.stands("old") == stood
    assert not refusing.guests["new"].paused


# -- who looks after it ---------------------------------------------------------------------------------------


@needs
def test_the_third_attempt_succeeds_after_two_that_failed_in_other_phases(house: House) -> None:
    dead = {phase: lambda: house.kill("destination") for phase in ("send-state", "move")}
    ended = house.migrate(dead, supervise="retry", attempts=3)  # type: ignore[arg-type]
    assert [(each.outcome, each.phase) for each in ended] == [
        ("aborted", "send-state"),
        ("aborted", "move"),
        ("committed", "confirm"),
    ]
    house.counts("new")


@needs
def test_a_refusal_is_tried_again_as_often_as_it_may_be(refusing: House) -> None:
    ended = refusing.migrate(supervise="retry", attempts=3)
    assert [(each.attempt, each.outcome) for each in ended] == [(1, "refused"), (2, "refused"), (3, "refused")]
    assert len([r for r in refusing.records() if isinstance(r, Invoke) and r.f == "spawn"]) == 2
    refusing.counts("old")


@pytest.mark.parametrize(
    ("supervise", "attempt", "outcome", "again"),
    [
        ("abandon", 1, "aborted", False),
        ("abandon", 1, "refused", False),
        ("retry", 1, "aborted", True),
        ("retry", 2, "refused", True),
        ("retry", 3, "aborted", False),
        ("retry", 1, "committed", False),
        ("retry", 1, "lost", False),
    ],
)
def test_when_it_is_tried_again(supervise: str, attempt: int, outcome: str, again: bool) -> None:
    step = MigrateStep(source="old", destination="new", supervise=supervise, attempts=3)  # type: ignore[arg-type]
    assert tries_again(step, attempt, AttemptEnded(outcome, "move", "old")) is again  # type: ignore[arg-type]


@needs
def test_what_is_done_before_a_phase_may_fail_the_step(house: House) -> None:
    def fail() -> None:
        raise StepFailed("no")

    with pytest.raises(StepFailed, match="no"):
        house.migrate({"move": fail})
