# SPDX-License-Identifier: Apache-2.0
"""The software PSP as a process. Everything reaches it by inherited file descriptors; nothing has a name on disk.

Its life hangs on two things, either of which ends it: the control channel (at end of file it exits, code 0) and its
parent (the kernel kills it when the thread that started it is gone). Interrupts from a terminal are ignored, since
they go to the parent as well, which decides.

The mailbox is polled, for want of anything that would wake us. A launch or a tear-down sends commands in bursts, so
after a command there is no pause for 5 ms, then one of 0.2 ms between looks, and after 0.2 s of quiet one of 1 ms:
looking 5,000 times a second costs near 10% of a CPU, and only the first command of a burst can tell the difference.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Final, NoReturn

import msgspec

from chaos.lab.psp import ivshmem, wire
from chaos.lab.psp.firmware import SoftwareFirmware
from chaos.lab.psp.mailbox import CommandRecord, Mailbox
from chaos.lab.psp.memory import Ram
from chaos.lab.psp.numbers import MAILBOX_SIZE, MAX_GUESTS
from chaos.lab.psp.plan import Firing
from chaos.lab.psp.state import Config

SPIN_NS: Final = 5_000_000
ALERT_NS: Final = 200_000_000
ALERT_S: Final = 0.0002
IDLE_S: Final = 0.001
POLLS_PER_LOOK: Final = 64  # while spinning, look at the control channel once in so many polls
TRACE_BACKLOG: Final = 100_000  # records kept for a controller that does not read
_PR_SET_PDEATHSIG: Final = 1
_READ: Final = 1 << 16


class Server:
    """One PSP with its control channel."""

    def __init__(self, options: argparse.Namespace) -> None:
        # A number of its own, and a low one: select takes none above 1023, and a controller may have thousands.
        self._control = socket.socket(fileno=os.dup(options.control_fd))
        os.close(options.control_fd)
        self._control.setblocking(False)
        self._in = bytearray()
        self._out = bytearray()
        self._done = False
        self._tracing = False
        self._trace: list[CommandRecord] = []
        self._lost = 0
        self._fired: list[Firing] = []
        self._loadable: bool = options.restore

        self._memory_fd = os.memfd_create("psp-mailbox", os.MFD_CLOEXEC)
        os.ftruncate(self._memory_fd, MAILBOX_SIZE)
        ram = mmap.mmap(options.ram_fd, os.fstat(options.ram_fd).st_size)
        self._ram = Ram(ram, below_4g=options.below_4g)
        self._interrupt_fd: int | None = None
        self._qemu = socket.socket(fileno=options.ivshmem_fd)
        config = Config(
            es_asids=options.es_asids,
            sev_asids=options.sev_asids,
            seed=options.seed,
            c_bit=options.c_bit,
            max_guests=options.max_guests,
            sees_wbinvd=options.watch_wbinvd,
            forgive_unrun=options.forgive_unrun,
        )
        self._mailbox = Mailbox(
            mmap.mmap(self._memory_fd, MAILBOX_SIZE),
            SoftwareFirmware(self._ram, config),
            interrupt=self._raise_interrupt,
            clock=time.monotonic_ns,
            on_record=self._on_record,
            on_firing=self._on_firing,
        )

    def run(self) -> None:
        """Serve until told to end."""
        if not self._loadable:
            self._start()
        last = time.monotonic_ns()
        polls = 0
        while not self._done:
            if self._mailbox.poll():
                last = time.monotonic_ns()
            quiet = time.monotonic_ns() - last
            if quiet < SPIN_NS:
                polls += 1
                if polls % POLLS_PER_LOOK:
                    os.sched_yield()  # on a busy machine the kernel we work for needs this CPU more
                    continue
                wait = 0.0
            else:
                if not self._out:  # what was sent before still waits to be read, so this may wait too
                    self._flush_trace()
                wait = ALERT_S if quiet < ALERT_NS else IDLE_S
            self._look(wait)

    def _start(self) -> None:
        self._interrupt_fd = ivshmem.greet(self._qemu, self._memory_fd)[0]
        self._send(wire.PspReady(pid=os.getpid()))

    def _raise_interrupt(self) -> None:
        if self._interrupt_fd is not None:
            os.eventfd_write(self._interrupt_fd, 1)

    # -- the control channel

    def _look(self, wait: float) -> None:
        """Wait up to `wait` seconds for the control channel, and serve it."""
        readable, writable, _ = select.select([self._control], [self._control] if self._out else [], [], wait)
        if writable:
            self._write()
        if readable:
            self._read()

    def _read(self) -> None:
        try:
            data = self._control.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._done = True
        self._in += data
        while not self._done and (end := self._in.find(b"\n")) >= 0:
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            self._serve(wire.decode_request(line))

    def _serve(self, request: wire.AnyRequest) -> None:
        self._flush_trace()  # whoever has a reply has all that ended before it
        try:
            reply = self._reply(request)
        except ValueError as error:
            reply = wire.PspFailed(request.id, str(error))
        self._send(reply)
        if isinstance(request, wire.Quit):
            self._done = True

    def _reply(self, request: wire.AnyRequest) -> wire.PspMessage:
        """Do what is asked. ValueError with the reason if it cannot be done."""
        match request:
            case wire.Save():
                return wire.SavedReply(request.id, self._save())
            case wire.Load():
                self._load(request.snapshot)
            case wire.SetPlan():
                self._fired.clear()
                self._mailbox.plan(request.plan)
            case wire.AddPlan():
                self._mailbox.add(request.plan)
            case wire.WithdrawPlan():
                self._mailbox.withdraw(request.name)
            case wire.ReleaseStalled():
                if not self._mailbox.release():
                    raise ValueError("no command is stalled")
            case wire.AskStatus():
                return self._status(request.id)
            case wire.Trace():
                self._tracing = request.on
            case wire.Wbinvd():
                self._mailbox.firmware.wbinvd_done = True
            case wire.Quit():
                pass
        return wire.PspDone(request.id)

    def _save(self) -> wire.PspSnapshot:
        return wire.PspSnapshot(
            version=1,
            registers=self._mailbox.contents(),
            firmware=self._mailbox.firmware.save(),
            sequence=self._mailbox.sequence,
            executed=dict(self._mailbox.executed),
        )

    def _load(self, snapshot: wire.PspSnapshot) -> None:
        if not self._loadable:
            raise ValueError("a snapshot is taken once, and only by a process started with --restore")
        firmware = SoftwareFirmware.load(self._ram, snapshot.firmware)
        here = self._mailbox.firmware.config
        if (firmware.config.es_asids, firmware.config.sev_asids) != (here.es_asids, here.sev_asids):
            raise ValueError("the snapshot has other numbers of ASIDs than the command line")
        self._mailbox.restore(snapshot.registers)
        self._mailbox.firmware = firmware
        self._mailbox.sequence = snapshot.sequence
        self._mailbox.executed.update(snapshot.executed)
        self._loadable = False
        self._start()

    def _status(self, request_id: int) -> wire.StatusReply:
        firmware = self._mailbox.firmware
        return wire.StatusReply(
            id=request_id,
            platform=firmware.platform.name,
            guest_count=len(firmware.guests),
            owned={guest.asid: guest.handle for guest in firmware.guests.values() if guest.asid},
            dirty=len(firmware.dirty),
            executed=dict(self._mailbox.executed),
            sequence=self._mailbox.sequence,
            pending=self._mailbox.pending,
            stalled=self._mailbox.stalled,
            held=self._mailbox.stalled_command,
            held_by=self._mailbox.stalled_by or "",
            dead=self._mailbox.dead,
            fired=tuple(self._fired),
        )

    # -- events

    def _on_record(self, record: CommandRecord) -> None:
        if not self._tracing:
            return
        if len(self._trace) < TRACE_BACKLOG:
            self._trace.append(record)
        else:
            self._lost += 1

    def _flush_trace(self) -> None:
        if self._trace or self._lost:
            self._send(wire.PspTraced(tuple(self._trace), self._lost))
            self._trace.clear()
            self._lost = 0

    def _on_firing(self, firing: Firing) -> None:
        self._fired.append(firing)
        self._send(wire.Fired(firing))

    def _send(self, message: wire.PspMessage) -> None:
        self._out += wire.encode(message)
        self._write()

    def _write(self) -> None:
        try:
            sent = self._control.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except (BrokenPipeError, ConnectionResetError):
            self._done = True
            return
        del self._out[:sent]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. ValueError if it is wrong."""
    parser = _Parser(prog="chaos.lab.psp", description="The software PSP of the lab.")
    parser.add_argument("--ivshmem-fd", type=int, required=True, help="stream socket to QEMU's ivshmem-doorbell")
    parser.add_argument("--ram-fd", type=int, required=True, help="the file behind the machine's memory")
    parser.add_argument("--control-fd", type=int, required=True, help="stream socket to the controller")
    parser.add_argument("--below-4g", type=int, help="bytes of memory under 4 GiB (default: all)")
    parser.add_argument("--es-asids", type=int, required=True, help="ASIDs for SEV-ES guests, from 1")
    parser.add_argument("--sev-asids", type=int, required=True, help="ASIDs for SEV guests, after those")
    parser.add_argument("--seed", type=int, default=0, help="of all keys and nonces")
    parser.add_argument("--c-bit", type=int, default=51, help="position of the C-bit in addresses")
    parser.add_argument("--max-guests", type=int, default=MAX_GUESTS, help="guest contexts there is room for")
    parser.add_argument("--forgive-unrun", action="store_true", help="no DF_FLUSH for an ASID whose guest never ran")
    parser.add_argument("--watch-wbinvd", action="store_true", help="DF_FLUSH needs a `wbinvd` request before it")
    parser.add_argument("--restore", action="store_true", help="wait for a `load` request before offering the device")
    return parser.parse_args(arguments)


def die_with_parent() -> None:
    """Have the kernel kill us when the thread that started us ends.

    A parent that ended before this ran is not noticed here, but its end of the control channel is closed by then.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")


def main() -> int:
    """The whole life of the process. 0 when it was told to end, else 70 and one line on standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    try:
        Server(parse()).run()
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        os.write(2, f"software PSP: {type(error).__name__}: {error}\n".encode())
        return 70
    return 0
