# SPDX-License-Identifier: Apache-2.0
"""The agent inside the lab: runs one program at a time for the command line process outside.

One thread and one `poll`, because it forks: a warm program starts as a fork of this process, with the engine
already imported. It speaks `chaos.lab.protocol` over virtio-serial ports and trusts whoever is on the other side,
who owns the machine anyway.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from chaos.lab import protocol
from chaos.lab.protocol import (
    Execute,
    LabHello,
    LabReady,
    Ping,
    Pong,
    ProgramExited,
    Resize,
    Signal,
    Started,
    StdinEnd,
    Terminal,
)
from chaos.linux import kcsan, tracefs

CHUNK = 1 << 16
# Imported before the lab is saved, so that a restored lab starts them in no time.
WARM = ("chaos.runner.main", "pyroute2")
# How long, in seconds, output still in the pipes may take to come out once the program has ended.
LINGER = 0.05


def open_port(port: str) -> int:
    for candidate in Path("/sys/class/virtio-ports").iterdir():
        if (candidate / "name").read_text().strip() == protocol.port_name(port):
            return os.open(f"/dev/{candidate.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"the lab has no port {protocol.port_name(port)}")


@dataclass(slots=True)
class Pump:
    """Moves bytes from `source` to `sink`, holding at most one chunk. `sink` -1 drops them."""

    source: int
    sink: int
    waiting: bytes = b""
    moved: int = 0
    ended: bool = False

    def interests(self) -> list[tuple[int, int]]:
        if self.waiting:
            return [(self.sink, select.POLLOUT)]
        return [] if self.ended else [(self.source, select.POLLIN)]

    def step(self) -> None:
        """Do what can be done without waiting."""
        try:
            if not self.waiting and not self.ended:
                self.waiting = self._read()
            if self.waiting and self.sink < 0:
                self.waiting = b""
            if self.waiting:
                self.waiting = self.waiting[os.write(self.sink, self.waiting) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.sink, self.waiting = -1, b""

    def _read(self) -> bytes:
        try:
            data = os.read(self.source, CHUNK)
        except OSError as error:
            if error.errno != errno.EIO:  # a pseudo-terminal whose other side is gone
                raise
            data = b""
        self.ended = not data
        self.moved += len(data)
        return data


@dataclass(slots=True)
class Input(Pump):
    """The pump of standard input: the port never ends by itself, the host says how many bytes there are."""

    total: int | None = None

    def interests(self) -> list[tuple[int, int]]:
        return [] if self.finished else Pump.interests(self)

    @property
    def finished(self) -> bool:
        return self.total is not None and self.moved >= self.total and not self.waiting

    def _read(self) -> bytes:
        if self.total is not None and self.moved >= self.total:
            return b""
        data = os.read(self.source, CHUNK)
        if not data:  # a port whose other side is not connected reads as empty
            raise BlockingIOError
        self.moved += len(data)
        return data


@dataclass(slots=True)
class RunningProgram:
    """A running child. `pidfd` becomes readable when it has ended."""

    pid: int
    pidfd: int
    stdin: Input
    outputs: tuple[Pump, ...]
    terminal: int | None
    closing: list[int] = field(default_factory=list)

    def close_stdin(self) -> None:
        if self.stdin.sink >= 0 and self.terminal is None:
            os.close(self.stdin.sink)
            self.closing.remove(self.stdin.sink)
        elif self.stdin.sink >= 0:
            os.write(self.stdin.sink, b"\x04")
        self.stdin.sink = -1


class LabAgent:
    def __init__(self) -> None:
        self.ports = {name: open_port(name) for name in protocol.PORTS}
        self.buffer = b""
        self.program: RunningProgram | None = None
        self.draining: Input | None = None

    def serve(self) -> None:
        while True:
            self._wait()
            for line in self._lines():
                self._handle(protocol.decode_to_agent(line))
            if self.draining is not None:
                self.draining.step()
                if self.draining.finished:
                    self.draining = None
            if self.program is not None:
                self._advance(self.program)

    # -- waiting and reading ------------------------------------------------------------------------------

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.ports["control"], select.POLLIN)
        wanted: dict[int, int] = {}
        if self.draining is not None:
            wanted.update(self.draining.interests())
        if self.program is not None:
            for pump in (self.program.stdin, *self.program.outputs):
                for fd, events in pump.interests():
                    wanted[fd] = wanted.get(fd, 0) | events
            poll.register(self.program.pidfd, select.POLLIN)
        for fd, events in wanted.items():
            poll.register(fd, events)
        ready = poll.poll()
        # A port without a listener reports a hang-up for as long as that lasts; do not spin on it.
        if all(events & (select.POLLHUP | select.POLLERR) and not events & select.POLLIN for _, events in ready):
            time.sleep(0.002)

    def _lines(self) -> list[bytes]:
        with contextlib.suppress(BlockingIOError):
            self.buffer += os.read(self.ports["control"], CHUNK)
        *lines, self.buffer = self.buffer.split(b"\n")
        return lines

    def _say(self, message: protocol.FromLabAgent) -> None:
        data = protocol.encode(message)
        while data:
            try:
                data = data[os.write(self.ports["control"], data) :]
            except BlockingIOError:
                select.select([], [self.ports["control"]], [], 1.0)

    # -- messages -----------------------------------------------------------------------------------------

    def _handle(self, message: protocol.ToAgent) -> None:
        match message:
            case LabHello():
                time.clock_settime_ns(time.CLOCK_REALTIME, message.realtime)
                Path("/dev/urandom").write_bytes(message.entropy)
                if message.warm:
                    warm()
                version = Path("/proc/version").read_text().strip()
                sev = Path("/dev/sev").exists()
                self._say(LabReady(release=os.uname().release, version=version, sev=sev))
            case Ping():
                self._say(Pong(monotonic=time.monotonic_ns()))
            case Execute():
                self._start(message)
            case StdinEnd():
                target = self.program.stdin if self.program else self.draining
                if target is not None:
                    target.total = message.count
            case Signal() if self.program is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.program.pid, message.number)
            case Resize() if self.program is not None and self.program.terminal is not None:
                resize(self.program.terminal, message.terminal)

    def _start(self, order: Execute) -> None:
        try:
            self.program = start(order, self.ports)
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self.draining = Input(self.ports["stdin"], -1)
            self._say(ProgramExited(code=code, stdout=0, stderr=0, reason=f"{order.argv[0]}: {error.strerror}"))
            return
        self._say(Started(pid=self.program.pid))

    def _advance(self, program: RunningProgram) -> None:
        program.stdin.step()
        for pump in program.outputs:
            pump.step()
        if program.stdin.finished and program.stdin.sink >= 0:
            program.close_stdin()
        if not select.select([program.pidfd], [], [], 0)[0]:
            return
        self._finish(program)

    def _finish(self, program: RunningProgram) -> None:
        status = os.waitid(os.P_PID, program.pid, os.WEXITED)
        assert status is not None
        code = status.si_status if status.si_code == os.CLD_EXITED else 128 + status.si_status
        for pump in program.outputs:
            drain(pump)
        out, err = program.outputs[0].moved, sum(pump.moved for pump in program.outputs[1:])
        self.draining = Input(self.ports["stdin"], -1, moved=program.stdin.moved, total=program.stdin.total)
        if self.draining.finished:
            self.draining = None
        for fd in {program.pidfd, *program.closing}:
            os.close(fd)
        self.program = None
        self._say(ProgramExited(code=code, stdout=out, stderr=err))


def warm() -> None:
    """Do what takes long and need be done only once. Not for a lab that is not saved: it would wait for it."""
    for name in WARM:
        importlib.import_module(name)
    with contextlib.suppress(tracefs.NoTracing):  # a runner will say so
        tracefs.prepare()


def drain(pump: Pump) -> None:
    """Move what is still in the pipe. Stops when no more comes: a child left in the background may hold it open."""
    while pump.interests():
        fd, events = pump.interests()[0]
        poll = select.poll()
        poll.register(fd, events)
        if not poll.poll(None if events == select.POLLOUT else LINGER * 1000):
            return
        pump.step()


def resize(terminal: int, size: Terminal) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


def start(order: Execute, ports: dict[str, int]) -> RunningProgram:
    """Fork the program. Raises OSError if it cannot be executed."""
    ends = _terminal_ends(order.terminal) if order.terminal else _pipe_ends()
    report_read, report_write = os.pipe()  # closes on exec; carries the errno if there is none
    pid = os.fork()
    if pid == 0:
        _become(order, ends, report_write)
    os.close(report_write)
    for fd in set(ends.child):
        os.close(fd)
    with os.fdopen(report_read, "rb") as report:
        failure = b"" if order.warm else report.read()
    if failure:
        os.waitpid(pid, 0)
        for fd in set(ends.ours):
            os.close(fd)
        number = int(failure)
        raise OSError(number, os.strerror(number))
    for fd in set(ends.ours):
        os.set_blocking(fd, False)
    stdin = Input(ports["stdin"], ends.ours[0])
    outputs = [Pump(ends.ours[1], ports["stdout"])]
    if order.terminal is None:
        outputs.append(Pump(ends.ours[2], ports["stderr"]))
    return RunningProgram(
        pid=pid, pidfd=os.pidfd_open(pid), stdin=stdin, outputs=tuple(outputs),
        terminal=ends.ours[0] if order.terminal else None, closing=sorted(set(ends.ours)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ends:
    """The three standard streams, the child's side and ours."""

    child: tuple[int, int, int]
    ours: tuple[int, int, int]


def _pipe_ends() -> Ends:
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
    return Ends(child=(in_read, out_write, err_write), ours=(in_write, out_read, err_read))


def _terminal_ends(size: Terminal) -> Ends:
    ours, child = pty.openpty()
    resize(ours, size)
    return Ends(child=(child, child, child), ours=(ours, ours, ours))


def _become(order: Execute, ends: Ends, report: int) -> NoReturn:
    """In the child: never returns."""
    code = 125
    try:
        os.setsid()
        for number, fd in enumerate(ends.child):
            os.dup2(fd, number)
        if order.terminal is not None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.environ.update(order.environment)
        os.chdir(order.directory)
        # Python ignores one of these, and a shell's background job, which the agent is, the other two.
        for ignored in (signal.SIGPIPE, signal.SIGINT, signal.SIGQUIT):
            signal.signal(ignored, signal.SIG_DFL)
        if order.warm:
            os.closerange(3, 4096)
            main_function = importlib.import_module(order.argv[0]).main
            code = int(main_function(list(order.argv[1:])) or 0)
            sys.stdout.flush()
        else:
            os.execvp(order.argv[0], order.argv)
    except OSError as error:
        if order.warm:
            _print_error(error)
        else:
            os.write(report, str(error.errno).encode())
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        _print_error(error)
    finally:
        os._exit(code)


def _print_error(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)
    sys.stderr.flush()


def stay_off_the_first_cpu() -> None:
    """No program of the lab runs on CPU 0, and so no guest.

    Whatever CPU loads FPU registers, QEMU clears a bit in the first CPU's flags, and not atomically. When that CPU
    leaves a guest at the same time, one of the two changes is lost, and it may go on in the lab's kernel with the
    guest's nested paging (docs/lab.md).
    """
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})


def main() -> None:
    stay_off_the_first_cpu()
    kcsan.aim()
    LabAgent().serve()
