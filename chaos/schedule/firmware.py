# SPDX-License-Identifier: Apache-2.0
"""The firmware as a run can break it: commands failed, delayed, stalled, and what a stalled one looks like from inside.

No program on a host can break the firmware under it, so the outside is asked to (`chaos.outside`); where the firmware
is a real one the answer is no, and that is `Unsupported`.

A stalled command holds whoever sent it. The driver sends one command at a time and waits for its answer with a mutex of
its own held (`sev_cmd_mutex`), in a sleep that no signal ends; an ioctl on a VM keeps that VM's `kvm->lock` as well. So
two witnesses must agree: the kernel, that the thread sleeps there, and the firmware, that it has the command and does
not answer. The driver's patience is limited: after `psp_cmd_timeout` seconds, 100 unless the module was told otherwise,
it takes the firmware for dead, for good.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from chaos.errors import InternalError
from chaos.kvm.numbers import Ioctl
from chaos.kvm.sev import Platform
from chaos.outside import Arm, Look, Looked, Outside, Withdraw
from chaos.schedule.holds import SYS_IOCTL, Sleeper

PATIENCE = Path("/sys/module/ccp/parameters/psp_cmd_timeout")

# Where the driver waits for an answer; which of the two has a name of its own is the compiler's choice.
PLACES = frozenset({"sev_wait_cmd_ioc", "__sev_do_cmd_locked"})


class Firmware:
    """`seed` is the run's. Failpoints are known by names, which are the run's own."""

    def __init__(self, outside: Outside, seed: int) -> None:
        self._outside = outside
        self._seed = seed

    def arm(self, name: str, failpoints: str) -> None:
        """Follow these failpoints (docs/firmware.md) from now on. Raises what `Outside.ask` does."""
        # Of the run's seed and the name, so that two plans of one run have luck of their own.
        seed = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:8]
        self._outside.ask(Arm(name=name, failpoints=failpoints, seed=int.from_bytes(seed, "little") >> 1))

    def withdraw(self, name: str) -> None:
        """Follow them no more, and let the command go that one of them stalls. May be called twice."""
        self._outside.ask(Withdraw(name=name))

    def look(self, name: str) -> Looked:
        """What they have done so far."""
        answer = self._outside.ask(Look(name=name))
        if not isinstance(answer, Looked):
            raise InternalError(f"the outside answered {answer!r} to look")
        return answer


def waits_for_answer(sleeper: Sleeper) -> bool:
    """Whether the thread sleeps in the driver, in an ioctl on a VM or in none (a close has no ioctl)."""
    in_ioctl = sleeper.call[:1] == (SYS_IOCTL,)
    on_vm = sleeper.call[2:3] == (Ioctl.KVM_MEMORY_ENCRYPT_OP,)
    return sleeper.state == "D" and sleeper.sleeping in PLACES and (on_vm or not in_ioctl)


def set_patience(seconds: int, platform: Platform, parameter: Path = PATIENCE) -> int:
    """Have the driver wait so many seconds for an answer; returns how many it did.

    It looks at the parameter only when a command was answered, so one is sent: how the platform is.
    """
    before = int(parameter.read_text())
    parameter.write_text(f"{seconds}\n")
    platform.status()
    return before
