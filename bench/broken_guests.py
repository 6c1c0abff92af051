# SPDX-License-Identifier: Apache-2.0
"""How often a guest breaks by itself: no move, no fault, exits as fast as they come. `docs/lab.md` says what for.

    sevchaos lab run --copy bench/broken_guests.py -- python3 broken_guests.py --kind sev --seconds 60

The guest is let in and taken out again, and then looked at: whether it has left its program, whether its memory is what
its registers say, and whether it has ended by itself, as one does that takes an interrupt or exception. The first that
is broken is shown with its registers and replaced by another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

from chaos.errors import ExitCode
from chaos.kinds import Kind
from chaos.kvm.system import System
from chaos.linux.seqpacket import memory_file
from chaos.vmm import guest, vcpus
from chaos.vmm.machine import Machine, OpenDevices


@contextmanager
def running(host: OpenDevices, kind: Kind, vcpus: int) -> Iterator[Machine]:
    """A guest, ready to be let in."""
    with memory_file("guest", guest.MEMORY) as memory:
        machine = Machine.create(host, kind, vcpus, memory.number, lanes=vcpus)
        try:
            if kind is Kind.SEV:
                machine.init(kind.key, "", flags=0, features=0, ghcb=0)
                machine.launch_start(0)
                machine.launch_update_data(vcpus, machine.memory.start)
                machine.launch_measure()
                machine.sev.launch_finish()
            yield machine
        finally:
            machine.close()


def stay(machine: Machine, seconds: float) -> tuple[int, str]:
    """Exits of one stay in the guest, and what is wrong with it then, "" if nothing."""
    machine.runnable.resume(1)
    time.sleep(seconds)
    told = machine.pause()
    exits = sum(seen.exits for seen in machine.runnable.seen)
    return exits, str(told) if told["astray"] or told["torn"] or told["ended"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("plain", "sev"), default="sev")
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--stay", type=float, default=0.05, help="seconds between two looks")
    parser.add_argument("--fresh", action="store_true", help="another VM for each stay")
    parser.add_argument("--rest", type=int, default=0, help="ns out of the guest after each exit")
    options = parser.parse_args()
    vcpus.REST = options.rest
    host, end = OpenDevices(System.open()), time.monotonic() + options.seconds
    exits = stays = broken = vms = 0
    while time.monotonic() < end:
        vms += 1
        with running(host, Kind(options.kind), options.vcpus) as machine:
            wrong, last = "", False
            while not wrong and not last:
                count, wrong = stay(machine, options.stay)
                exits, stays, broken = exits + count, stays + 1, broken + bool(wrong)
                last = options.fresh or time.monotonic() >= end
        if wrong:
            print(wrong, flush=True)
    print(f"{options.kind}: {exits} exits, {stays} stays, {vms} VMs, {broken} broken")
    raise SystemExit(ExitCode.UNKNOWN if broken else 0)


if __name__ == "__main__":
    main()
