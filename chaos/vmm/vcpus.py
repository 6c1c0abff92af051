# SPDX-License-Identifier: Apache-2.0
"""A vCPU in and out of the guest.

While the guest runs, a native thread (`chaos.native`) sits in KVM_RUN and takes note of what the guest says of itself.
A *stay* is from `resume` to `pause`. After `pause` the registers are whole: an instruction that the guest had left with
is finished.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from errno import EPROTO
from itertools import zip_longest

from chaos.errors import InternalError
from chaos.kvm.call import KernelError, made_otherwise
from chaos.kvm.numbers import ExitReason, exit_name
from chaos.kvm.structs import GENERAL, Regs
from chaos.kvm.vcpu import KvmVcpu
from chaos.native import Left, RunningVcpu, Seen, VcpuThread, Why
from chaos.vmm import guest

# A vCPU leaves the guest within an interrupt; this is for a machine that is badly overloaded.
PAUSE_WITHIN = 20.0
# ns out of the guest after each tick. A guest that ticks as fast as it can takes a CPU for itself, which others need.
REST = 500_000
_HALF = 1 << 32
_NOTHING = Seen(ticks=0, stale=0, first_tick=0, last_tick=0, sound=0, exits=0)


class VcpuPacer:
    """Lets one vCPU run, and takes it out. One thread at a time calls its methods."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu
        self._running: RunningVcpu | None = None
        self._seen = _NOTHING
        self._ended = ""
        self._stale_before = 0  # in earlier stays
        self.every = 0

    @property
    def running(self) -> bool:
        return self._running is not None

    @property
    def tid(self) -> int:
        """Its thread, 0 if it has none."""
        return self._running.tid if self._running is not None else 0

    @property
    def seen(self) -> Seen:
        """What the guest has said in this stay, or if it is out, in the last one."""
        return self._running.seen() if self._running is not None else self._seen

    @property
    def stale(self) -> int:
        """Ticks of all stays at which memory was stale."""
        return self._stale_before + self.seen.stale

    @property
    def sound(self) -> int:
        """Ticks of this stay before memory was stale, 0 if it was in an earlier one."""
        return 0 if self._stale_before else self.seen.sound

    @property
    def ended(self) -> str:
        """Why the stay ended by itself, "" if it did not."""
        left = self._running.left() if self._running is not None else None
        return self._reason(left) if left is not None else self._ended

    def resume(self, every: int | None = None, memory: int | None = None) -> None:
        """Let the guest run, leaving every `every` counts, as before if None. Raises `KernelError`.

        Where another makes the calls of the caller's thread, the first entry is made there too: the guest's own thread
        would make every one. What it says is to stand in the memory file `memory`, which was made for this stay by
        whoever wants to read it.
        """
        if self._running is not None:
            raise InternalError("the vCPU runs already")
        registers = self._vcpu.regs()
        if every is not None:
            self.every = every
            registers.rsi = guest.mask(every)
            self._vcpu.set_regs(registers)
        stale = self._enter_once() if self.every and made_otherwise() else 0
        self._stale_before, self._seen, self._ended = self.stale + stale, _NOTHING, ""
        self._running = VcpuThread(
            fd=self._vcpu.fd.number,
            area=ctypes.addressof(self._vcpu.shared),
            tick_port=guest.TICK_PORT,
            stale_port=guest.STALE_PORT,
            ticks=ticks_of(registers),
            rest=REST,
        ).start(memory=memory)

    def _enter_once(self) -> int:
        """Until the guest leaves by itself; how often it said that memory was stale. A tick is not counted: the next
        one says how many there were. Raises OSError if it left for anything else."""
        number = self._vcpu.run()
        if number:
            raise KernelError(number, "KVM_RUN")
        left = self._vcpu.shared
        port = left.io.port if left.exit_reason == ExitReason.IO else None
        if port not in (guest.TICK_PORT, guest.STALE_PORT):
            what = exit_name(left.exit_reason) if port is None else f"port {port:#x}"
            raise OSError(EPROTO, f"the guest's first entry ended with {what}, and no tick")
        return int(port == guest.STALE_PORT)

    def stop(self) -> None:
        """Ask the vCPU out of the guest; `pause` waits for it."""
        if self._running is not None:
            self._running.stop()

    def pause(self, within: float = PAUSE_WITHIN) -> None:
        """Bring the vCPU out of the guest, its registers whole unless it has `ended`. Raises TimeoutError."""
        if self._running is None:
            return
        self._running.stop()
        left = self._running.join(within)
        self._running, self._seen, self._ended = None, left.seen, self._reason(left)

    def _reason(self, left: Left) -> str:
        """Why the stay ended by itself, "" if it was stopped; an interrupt or exception by its vector."""
        at = self._vcpu.shared
        number = guest.vector(at.regs.rip, at.sregs.cs.base)
        if left.why is Why.PORT and left.detail == guest.VECTOR_PORT and number is not None:
            return f"an interrupt or exception that was not due, vector {number} at {at.regs.rcx & 0xFFFF:#x}"
        return left.reason

    @property
    def told(self) -> bool:
        """Whether KVM_RUN has left a copy of the registers of a vCPU that is out of the guest.

        `astray` and `torn` are False where it has not. They look at that copy and do not ask the vCPU, which a waiting
        move may have locked by now.
        """
        return bool(self._vcpu.shared.sregs.cs.present)  # not before the first stay, and not where they are encrypted

    def astray(self) -> bool:
        """Whether it has left its program."""
        left = self._vcpu.shared
        return self.told and not guest.at_home(left.regs.rip, left.sregs.cs.base)

    def torn(self, page: bytes | None) -> bool:
        """Whether its memory is not what its registers say: the guest has said so, or its `page` shows it."""
        readable = page is not None and self.told and not self._ended
        return self.seen.stale > 0 or (readable and not guest.agrees(page or b"", ticks_of(self._vcpu.shared.regs)))

    def registers(self) -> str:
        """As KVM_RUN left them, and with what exit, for a reader."""
        left = self._vcpu.shared
        general = (f"{name} {getattr(left.regs, name):x}" for name in GENERAL.split())
        segments = (f"{name} {getattr(left.sregs, name).base:x}" for name in ("cs", "ds", "ss"))
        control = (f"{name} {getattr(left.sregs, name):x}" for name in ("cr0", "cr3", "cr4", "efer"))
        exit_ = f"cs.l {left.sregs.cs.l} exit {left.exit_reason} {bytes(left.io).hex()}"
        return " ".join((*general, *segments, *control, exit_))

    def ticks(self) -> int:
        """The counter in the registers of a vCPU that is out of the guest."""
        return ticks_of(self._vcpu.regs())


class Team:
    """All vCPUs of a VM, in and out of the guest together."""

    def __init__(self, vcpus: Sequence[KvmVcpu]) -> None:
        self._vcpus = [VcpuPacer(vcpu) for vcpu in vcpus]

    @property
    def running(self) -> bool:
        return any(vcpu.running for vcpu in self._vcpus)

    @property
    def stale(self) -> int:
        return sum(vcpu.stale for vcpu in self._vcpus)

    @property
    def sound(self) -> tuple[int, ...]:
        return tuple(vcpu.sound for vcpu in self._vcpus)

    @property
    def ended(self) -> str:
        """Why the first of those that stopped by themselves did."""
        return next(filter(None, (vcpu.ended for vcpu in self._vcpus)), "")

    @property
    def seen(self) -> tuple[Seen, ...]:
        """What each vCPU's guest has said in this stay, or in the last one."""
        return tuple(vcpu.seen for vcpu in self._vcpus)

    @property
    def last_ticks(self) -> tuple[int, ...]:
        return tuple(seen.last_tick for seen in self.seen)

    def resume(self, every: int | None = None, memories: Sequence[int] = ()) -> None:
        """Let all run, each with its memory file if there are any. Raises `KernelError`; then none does."""
        try:
            for vcpu, memory in zip_longest(self._vcpus, memories[: len(self._vcpus)]):
                vcpu.resume(every, memory)
        except KernelError:
            self.pause()
            raise

    @property
    def threads(self) -> tuple[int, ...]:
        """The threads of those that were not joined, by number."""
        return tuple(vcpu.tid for vcpu in self._vcpus if vcpu.running)

    def stop(self) -> None:
        """Ask all out of the guest: their threads end."""
        for vcpu in self._vcpus:
            vcpu.stop()

    def pause(self) -> None:
        """Bring all out of the guest. Raises TimeoutError."""
        self.stop()
        for vcpu in self._vcpus:
            vcpu.pause()

    def astray(self) -> tuple[int, ...]:
        """The vCPUs, all out of the guest, that have left its program, by number."""
        return tuple(number for number, vcpu in enumerate(self._vcpus) if vcpu.astray())

    def torn(self, pages: Sequence[bytes]) -> tuple[int, ...]:
        """Those whose memory is not what their registers say, by number. No `pages` where they cannot be read."""
        vcpus = enumerate(zip_longest(self._vcpus, pages))
        return tuple(number for number, (vcpu, page) in vcpus if vcpu.torn(page))

    @property
    def stopped(self) -> tuple[int, ...]:
        """Those whose last stay ended by itself, by number."""
        return tuple(number for number, vcpu in enumerate(self._vcpus) if vcpu.ended)

    def registers(self, number: int) -> str:
        return self._vcpus[number].registers()

    def sample(self) -> tuple[tuple[int, ...], str]:
        """The counter of each vCPU and where they were read. Those of a guest that never leaves are taken out."""
        if self.running and all(vcpu.every for vcpu in self._vcpus):
            return tuple(seen.ticks for seen in self.seen), "exit"
        again = self.running
        self.pause()
        ticks = tuple(vcpu.ticks() for vcpu in self._vcpus)
        if again and not self.ended:
            self.resume()
        return ticks, "registers"


def ticks_of(registers: Regs) -> int:
    return int(registers.rdx % _HALF) * _HALF + int(registers.rbx % _HALF)
