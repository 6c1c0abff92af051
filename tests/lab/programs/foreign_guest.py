# SPDX-License-Identifier: Apache-2.0
"""Be somebody else on this host: a SEV guest in a cgroup of its own lives, and a command is run beside it.

    foreign_guest.py COMMAND…

Prints what the guest's owner sees before and after as a JSON line: its charge, the status of its context and how far it
has counted, and the command's exit code. The guest counts on only while it is looked at: a lab has few CPUs. The
command's own output goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from chaos.kinds import Kind
from chaos.kvm.system import System
from chaos.linux.seqpacket import memory_file
from chaos.vmm import guest
from chaos.vmm.machine import Machine, OpenDevices

CGROUP = Path("/sys/fs/cgroup/somebody")
TICKS = 20
WITHIN = 60.0


def main(command: list[str]) -> int:
    CGROUP.mkdir()
    (CGROUP.parent / "cgroup.subtree_control").write_text("+misc")
    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    machine = launched()
    before = look(machine)
    done = subprocess.run(command, stdout=sys.stderr, check=False, preexec_fn=leave)
    print(json.dumps({"before": before, "after": look(machine), "code": done.returncode}))
    return 0


def launched() -> Machine:
    machine = Machine.create(OpenDevices(System.open()), Kind.SEV, 1, memory_file("somebody", guest.MEMORY).steal())
    machine.init("sev", "", flags=0, features=0, ghcb=0)
    machine.launch_start(0)
    machine.launch_update_data(1, machine.memory.start)
    machine.launch_measure()
    machine.sev.launch_finish()
    return machine


def leave() -> None:
    """The command is nobody's guest."""
    (CGROUP.parent / "cgroup.procs").write_text("0")


def look(machine: Machine) -> dict[str, object]:
    return {"charge": (CGROUP / "misc.current").read_text(), **machine.guest_status(), "ticked": ticked(machine)}


def ticked(machine: Machine) -> bool:
    """Whether the guest counts on from where it was, and its memory is as it left it."""
    began = machine.sample().ticks
    machine.runnable.resume(1)
    deadline = time.monotonic() + WITHIN
    while machine.sample().ticks < began + TICKS and time.monotonic() < deadline:
        time.sleep(0.01)
    machine.pause()
    now = machine.sample()
    return now.ticks >= began + TICKS and not now.stale and not now.ended


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
