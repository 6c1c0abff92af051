# SPDX-License-Identifier: Apache-2.0
"""A vCPU in and out of the guest.

While the guest runs, a thread of its own sits in KVM_RUN. It is taken out with `immediate_exit` and a signal: the flag
is for the moment before the system call, the signal for the moment inside it, so neither order of the two can be lost.
The signal's handler does nothing; it is Python's, which is installed without SA_RESTART and interrupts the call of the
very thread the signal is sent to.

After an exit for port I/O the instruction is finished by the next KVM_RUN only, so `pause` makes that call with
`immediate_exit` before anybody may read registers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chaos.errors import InternalError
from chaos.kvm.call import KernelError
from chaos.kvm.numbers import Exit, exit_name
from chaos.kvm.structs import Regs
from chaos.kvm.vcpu import Vcpu
from chaos.vmm import guest

SIGNAL = signal.SIGUSR1
# A vCPU leaves the guest within an interrupt; this is for a machine that is badly overloaded.
PAUSE_WITHIN = 20.0
_HALF = 1 << 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.tgkill.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int)
_libc.tgkill.restype = ctypes.c_int


def install_signal() -> None:
    """Once a process, from its main thread."""
    signal.signal(SIGNAL, lambda number, frame: None)


@dataclass(slots=True)
class Progress:
    """What the guest has said of itself. `ended` is why it stopped by itself, "" if it has not."""

    ticks: int = 0
    stale: int = 0
    ended: str = ""


class Driver:
    """Drives one vCPU. Its methods are called from one thread, the agent's main one."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._thread: threading.Thread | None = None
        self._stop = False
        self.progress = Progress()
        self.every = 0
        self.ever_ran = False

    @property
    def running(self) -> bool:
        return self._thread is not None

    def resume(self, every: int | None = None) -> None:
        """Let the guest run, leaving every `every` counts, as before if None. Raises `KernelError`."""
        if self._thread is not None:
            raise InternalError("the vCPU runs already")
        registers = self._vcpu.regs()
        if every is not None:
            self.every = every
            registers.rsi = guest.mask(every)
            self._vcpu.set_regs(registers)
        self.progress.ticks = ticks_of(registers)
        self.progress.ended = ""
        self.ever_ran = True
        self._start(self._loop)

    def _start(self, body: Callable[[], None]) -> None:
        self._stop = False
        self._vcpu.shared.immediate_exit = 0
        self._thread = threading.Thread(target=body, name="vcpu", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the vCPU out of the guest; `pause` waits for it."""
        if self._thread is not None:
            self._stop = True
            self._vcpu.shared.immediate_exit = 1
            assert self._thread.native_id is not None
            _libc.tgkill(os.getpid(), self._thread.native_id, SIGNAL)  # ESRCH: it has left by itself

    def pause(self, within: float = PAUSE_WITHIN) -> None:
        """Bring the vCPU out of the guest, its registers whole. Raises TimeoutError, or `KernelError`."""
        thread = self._thread
        if thread is None:
            return
        self.stop()
        thread.join(within)
        if thread.is_alive():
            raise TimeoutError(f"the vCPU did not leave KVM_RUN within {within:g} s of a signal")
        self._thread = None
        if self.progress.ended:
            self._vcpu.shared.immediate_exit = 0
        else:
            self._vcpu.complete()

    def ticks(self) -> int:
        """The counter in the registers of a vCPU that is out of the guest."""
        return ticks_of(self._vcpu.regs())

    def _loop(self) -> None:
        while not self._stop:
            error = self._vcpu.run()
            if error == errno.EINTR:
                continue
            if error:
                self.progress.ended = f"KVM_RUN: {errno.errorcode.get(error, error)}"
                return
            if not self._handle():
                return

    def _handle(self) -> bool:
        """Take note of an exit; whether the guest may go on."""
        shared = self._vcpu.shared
        if shared.exit_reason == Exit.INTR:
            return True
        if shared.exit_reason != Exit.IO:
            self.progress.ended = exit_name(shared.exit_reason)
            return False
        said = int.from_bytes(self._vcpu.data(shared.io.data_offset, shared.io.size), "little")
        match shared.io.port:
            case guest.TICK_PORT:
                self.progress.ticks = unwrapped(self.progress.ticks, said)
            case guest.STALE_PORT:
                self.progress.stale += 1
            case port:
                self.progress.ended = f"an access to port {port:#x}, which the guest does not make"
                return False
        return True


class Team:
    """All vCPUs of a VM, in and out of the guest together."""

    def __init__(self, vcpus: Sequence[Vcpu]) -> None:
        self._drivers = [Driver(vcpu) for vcpu in vcpus]

    @property
    def running(self) -> bool:
        return any(driver.running for driver in self._drivers)

    @property
    def stale(self) -> int:
        return sum(driver.progress.stale for driver in self._drivers)

    @property
    def ended(self) -> str:
        """Why the first of those that stopped by themselves did."""
        return next((driver.progress.ended for driver in self._drivers if driver.progress.ended), "")

    def resume(self, every: int | None = None) -> None:
        """Let all run. Raises `KernelError`; then none does."""
        try:
            for driver in self._drivers:
                driver.resume(every)
        except KernelError:
            self.pause()
            raise

    def pause(self) -> None:
        """Bring all out of the guest. Raises TimeoutError, or `KernelError`."""
        for driver in self._drivers:
            driver.stop()
        for driver in self._drivers:
            driver.pause()

    def sample(self) -> tuple[tuple[int, ...], str]:
        """The counter of each vCPU and where they were read. Those of a guest that never leaves are taken out."""
        if self.running and all(driver.every for driver in self._drivers):
            return tuple(driver.progress.ticks for driver in self._drivers), "exit"
        again = self.running
        self.pause()
        ticks = tuple(driver.ticks() for driver in self._drivers)
        if again and not self.ended:
            self.resume()
        return ticks, "registers"


def ticks_of(registers: Regs) -> int:
    return int(registers.rdx % _HALF) * _HALF + int(registers.rbx % _HALF)


def unwrapped(before: int, low: int) -> int:
    """The counter whose low half is `low`, given an earlier value less than a wrap ago."""
    high = before // _HALF
    return (high + (low < before % _HALF)) * _HALF + low
