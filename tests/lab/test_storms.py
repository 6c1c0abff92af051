# SPDX-License-Identifier: Apache-2.0
"""Storms through moves on stock kernels: of `experiments/`, and one whose VMM is killed under it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from chaos.errors import ExitCode
from chaos.history.records import Done, Exited, History, Stormed
from chaos.vmm.storm import MORE
from tests.lab.conftest import Once, Sevchaos
from tests.lab.told import Told, carried_out

pytestmark = pytest.mark.lab

THROUGH_MOVE = ("storm-through-move", "storm-through-move-es")

KILLED = """
name: killed-in-a-storm
why: What a storm was answered is known although its VMM was killed in the middle of it.
promises: [P3, P9, P12]
vmms: {source: {cgroup: source}, destination: {cgroup: destination}}
vms: {old: {vmm: source, kind: sev, vcpus: 2}, new: {vmm: destination, kind: plain, vcpus: 2}}
script:
  - {do: launch, vm: old}
  - {do: launch, vm: new}
  - {do: storm, vm: old, threads: 4, calls: [KVM_GET_REGS, KVM_RUN, KVM_GET_CLOCK]}
  - {do: move, source: new, destination: old}
  - {do: status, vm: old}  # time for some calls after the move
  - {do: fault, fault: kill, target: source}
"""


@pytest.fixture
def told(once: Once[Told], kernel: str, sevchaos: Sevchaos, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return once(kernel, lambda: carried_out(sevchaos, tmp_path_factory.mktemp("runs"), kernel, *THROUGH_MOVE))


def storm(read: History) -> Stormed:
    return next(record for record in read.records if isinstance(record, Stormed))


def move(read: History) -> Done:
    found = next(done for invoke, done in read.operations() if invoke.f == "move")
    assert found is not None
    return found


@pytest.mark.parametrize("name", THROUGH_MOVE)
def test_the_source_dies_at_one_instant_inside_the_storm_and_the_move(told: Told, name: str) -> None:
    """The checker's word, and a look of our own at what it rests on."""
    assert told.outcomes(name)["P3"] == "kept"
    read = told.history(name)
    stormed, moved = storm(read), move(read)
    assert len(stormed.threads) == 8
    answered = [thread.answered for thread in stormed.threads if thread.answered]
    refused = [thread.refused for thread in stormed.threads if thread.refused]
    assert len(answered) == 8 and refused
    slack = max(thread.clock_error for thread in stormed.threads)
    assert max(call.began for call in answered) <= min(call.ended for call in refused) + slack
    assert min(call.ended for call in refused) + slack >= moved.began
    for thread in stormed.threads:
        assert not thread.lost
        assert sum(thread.errnos.values()) == thread.calls
        assert thread.errnos.get("EIO", 0) <= MORE + 1
        assert set(thread.errnos) <= {"ok", "EINTR", "ENXIO", "EIO"}


def test_a_storm_whose_vmm_is_killed_is_read_from_outside(sevchaos: Sevchaos, kernel: str, tmp_path: Path) -> None:
    """The move into the VM is refused; nothing dies of it, and the storm goes on until the kill."""
    file = tmp_path / "killed-in-a-storm.yaml"
    file.write_text(KILLED)
    done = sevchaos("run", str(file), "--kernel", kernel, "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.KEPT, done.stderr.decode()  # P3 of `new`, the source, which is asked at the end
    read = Told(done.stdout).history("killed-in-a-storm")
    assert move(read).errno == errno.EINVAL
    exited = next(record for record in read.records if isinstance(record, Exited) and record.agent == "source")
    stormed = storm(read)
    assert stormed.seq > exited.seq
    assert len(stormed.threads) == 4
    for thread in stormed.threads:
        assert thread.ended == 0  # nobody ended it: its board was read after the process was gone
        assert thread.calls == sum(thread.errnos.values())
        assert thread.refused is None and not thread.lost
    assert max(thread.answered.ended for thread in stormed.threads if thread.answered) > move(read).ended
