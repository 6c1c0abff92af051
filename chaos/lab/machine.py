# SPDX-License-Identifier: Apache-2.0
"""A running lab: QEMU, the software PSP beside it, and the agent inside.

Nothing of a running lab has a name on disk. Guest memory and the initial RAM disk are anonymous memory files, the
ports, the console, the monitor and the mailbox are socket pairs handed over by number, and both processes die
with the one that started them. So there is nothing to clean up, not even after SIGKILL.

    command line process ──┬── console, control, stdin, stdout, stderr, monitor ──▶ QEMU ──▶ agent
                           └── control ──▶ PSP ──▶ (ivshmem) QEMU; shares guest memory

Every wait goes through `Lab.wait`, which ends early when the lab breaks and names what was waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from qemu.qmp import EventListener, QMPClient

from chaos.errors import KernelPanicked, LabFailed, LabHung, NoSpace, PspDied, QemuDied
from chaos.lab import protocol
from chaos.lab.image import Image, initial_ram_disk
from chaos.lab.kernel.find import LabKernel
from chaos.lab.patience import first_of, kept_waiting
from chaos.lab.psp.client import PspControl
from chaos.lab.psp.wire import PspSnapshot as PspState
from chaos.lab.qemu import Qemu
from chaos.linux.process import die_with

T = TypeVar("T")

BOOT_DEADLINE: Final = 180.0  # seconds; a cold boot takes about ten on two slow cores
RESTORE_DEADLINE: Final = 30.0
START_DEADLINE: Final = 20.0
BELOW_4G: Final = 2 << 30  # where q35 stops putting memory below 4 GiB
_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
# What an oops begins with, some fifty lines before the panic that follows it.
_OOPS = re.compile(r"BUG: |Oops: |general protection fault|kernel BUG at |stack segment: |double fault: ")
_KEPT_LINES = 400
# A kernel that is asked what hangs (SysRq): say all of it on the console; what each CPU is at; every task that sleeps
# where no signal wakes it. The first announces itself so:
_SYSRQ_KEYS: Final = b"8lw"
_ASKED = re.compile(r"sysrq: Changing Loglevel")
_SILENT_AFTER: Final = 1.0  # seconds without a line, and the kernel is taken to have said what it had to say
_ANSWER_WITHIN: Final = 15.0
_AT = re.compile(r"^CPU#(\d+)|^(RIP=\w+).*(HLT=\d)", re.MULTILINE)
# What QEMU says with -d cpu_reset beside its own words: all registers of a CPU, when it starts and in a triple fault.
_TRIPLE_FAULT = "Triple fault"
_DUMPED = re.compile(r"CPU Reset|Triple fault|[A-Z][A-Z0-9]{1,4} ?=|.*TCG doesn't support requested feature")


@dataclass(frozen=True, slots=True)
class Spec:
    """What a lab is made of. `bootable` is the file QEMU starts, `memory` in bytes."""

    kernel: LabKernel
    bootable: Path
    qemu: Qemu
    image: Image
    sev_asids: int = 8
    es_asids: int = 7
    cpus: int = 2  # for programs; the machine has CPU 0 besides (docs/lab.md)
    memory: int = 1 << 30
    ccp: tuple[tuple[str, str], ...] = ()  # parameters of the driver, by name


class SerialLines:
    """The serial console: lines as they come, the last ones kept."""

    def __init__(self, listener: Callable[[str], None] | None = None) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.panic: str | None = None
        self.listener = listener
        self._heard = asyncio.Event()

    async def follow(self, reader: asyncio.StreamReader) -> None:
        rest = b""
        while data := await reader.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._line(line)
        if rest:
            self._line(rest)

    def _line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r")
        self.lines.append(line)
        self._heard.set()
        if found := _PANIC.search(line):
            self.panic = found[1]
        if self.listener is not None:
            self.listener(line)

    async def silence(self, seconds: float) -> None:
        """Return when no line has come for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._heard.clear()
                await asyncio.wait_for(self._heard.wait(), seconds)

    def tail(self, count: int = 25) -> tuple[str, ...]:
        """The last lines, oldest first; after a panic, from the oops before it on, or a little before it; of a kernel
        that was asked what hangs, all of its answer."""
        lines = tuple(self.lines)
        asked = next((number for number in reversed(range(len(lines))) if _ASKED.search(lines[number])), None)
        if asked is not None:
            return lines[max(0, asked - count) :]
        at = next((number for number, line in enumerate(lines) if _PANIC.search(line)), None)
        if at is None:
            return lines[-count:]
        oops = next((number for number in range(max(0, at - 100), at) if _OOPS.search(lines[number])), at)
        return lines[max(0, min(oops, at - 8)) : at + 2 * count]


@dataclass(frozen=True, slots=True)
class Port:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def _stream(end: socket.socket) -> Port:
    reader, writer = await asyncio.open_connection(sock=end, limit=1 << 20)
    return Port(reader, writer)


def _available_memory() -> int:
    with Path("/proc/meminfo").open() as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize


class Lab:
    """One lab. Use `running`; the methods are for when it runs."""

    def __init__(self, spec: Spec, console: SerialLines) -> None:
        self.spec = spec
        self.console = console
        self.memory = os.memfd_create("sevchaos-memory")
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: list[asyncio.subprocess.Process] = []
        self.ports: dict[str, Port] = {}
        self.monitor = QMPClient("lab")
        self._shutdown = EventListener("SHUTDOWN")
        self.monitor.register_listener(self._shutdown)
        self.psp: PspControl
        self.ready: protocol.LabReady

    # -- starting and ending ------------------------------------------------------------------------------

    async def start(self, *, psp_state: PspState | None = None, incoming: bool = False) -> None:
        """Start both processes. With `incoming`, QEMU waits to be told of the state of a saved machine.

        Raises `NoSpace` when the memory for it is not there.
        """
        needed, there = self.spec.memory // 2, _available_memory()
        if there < needed:
            raise NoSpace(
                f"a lab of {self.spec.memory >> 20} MiB wants about {needed >> 20} MiB of memory, "
                f"{there >> 20} MiB are available",
                remedy="end something, or make it smaller with --memory",
            )
        os.ftruncate(self.memory, self.spec.memory)
        mailbox_ours, mailbox_qemu = socket.socketpair()
        await self._start_psp(mailbox_ours, psp_state)
        await self._start_qemu(mailbox_qemu, incoming)

    async def _start_psp(self, mailbox: socket.socket, state: PspState | None) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "chaos.lab.psp",
            "--ivshmem-fd", str(mailbox.fileno()), "--ram-fd", str(self.memory),
            "--control-fd", str(theirs.fileno()), "--below-4g", str(BELOW_4G),
            "--sev-asids", str(self.spec.sev_asids), "--es-asids", str(self.spec.es_asids),
        ]  # fmt: skip
        if state is not None:
            command.append("--restore")
        process = await self._spawn(command, (mailbox.fileno(), self.memory, theirs.fileno()))
        mailbox.close()
        theirs.close()
        self.psp = await PspControl.open(ours)
        self._watch(self._psp_ended(process))
        if state is not None:
            await self.psp.load(state)

    async def _start_qemu(self, mailbox: socket.socket, incoming: bool) -> None:
        passed = {"mailbox": mailbox}
        for name in ("console", "monitor", *protocol.PORTS):
            ours, theirs = socket.socketpair()
            passed[name] = theirs
            if name == "monitor":
                monitor = ours
            else:
                self.ports[name] = await _stream(ours)
        disk = initial_ram_disk(self.spec.image)
        fds = {name: end.fileno() for name, end in passed.items()} | {"memory": self.memory, "disk": disk}
        process = await self._spawn(command_line(self.spec, fds, incoming=incoming), tuple(fds.values()))
        os.close(disk)
        for end in passed.values():
            end.close()
        following = asyncio.create_task(self.console.follow(self.ports["console"].reader))
        self._tasks.append(following)
        self._watch(self._qemu_ended(process, following))
        await self.wait(self.monitor.connect(monitor), START_DEADLINE, "QEMU's monitor")
        ignore = {"capability": "x-ignore-shared", "state": True}
        await self.monitor.execute("migrate-set-capabilities", {"capabilities": [ignore]})

    async def _spawn(self, command: Sequence[str], fds: Sequence[int]) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=fds, preexec_fn=partial(die_with, os.getpid()), start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def ran(self) -> float:
        """Seconds of CPU time that QEMU has had; without end once it has ended."""
        try:
            stat = Path(f"/proc/{self._processes[-1].pid}/stat").read_text()
        except OSError:
            return math.inf
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def kept_waiting(self) -> float:
        """How long QEMU has waited for a CPU, in seconds."""
        return kept_waiting(self._processes[-1].pid)

    async def greet(self, deadline: float, *, warm: bool = False) -> None:
        """Wait for the agent, set its clock; `warm` has it import what warm programs need."""
        self.send(protocol.LabHello(realtime=time.time_ns(), entropy=secrets.token_bytes(64), warm=warm))
        answer = await self.receive(deadline, "the agent's first word")
        if not isinstance(answer, protocol.LabReady):
            raise LabFailed(f"the agent began with {answer!r}", console=self.console.tail())
        self.ready = answer

    async def stop(self) -> None:
        """End both processes, whatever their state."""
        for task in self._tasks:
            task.cancel()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._processes:
            await process.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for port in self.ports.values():
            port.writer.close()
        if hasattr(self, "psp"):
            await self.psp.close()
        with contextlib.suppress(Exception):  # it reports, by raising, that QEMU is gone
            await self.monitor.disconnect()
        os.close(self.memory)
        if self._broken.done():
            self._broken.exception()  # seen, whether or not somebody waited for it

    # -- what can go wrong --------------------------------------------------------------------------------

    def _watch(self, waiting: Coroutine[Any, Any, LabFailed]) -> None:
        async def watch() -> None:
            failure = await waiting
            if not self._broken.done():
                self._broken.set_exception(failure)

        self._tasks.append(asyncio.create_task(watch()))

    async def _psp_ended(self, process: asyncio.subprocess.Process) -> LabFailed:
        assert process.stderr is not None
        words = (await process.stderr.read()).decode(errors="replace").strip()
        code = await process.wait()
        return PspDied(f"the software PSP ended ({_how(code)}){_said(words)}", console=self.console.tail())

    async def _qemu_ended(self, process: asyncio.subprocess.Process, following: asyncio.Task[None]) -> LabFailed:
        assert process.stderr is not None
        words = (await process.stderr.read()).decode(errors="replace").strip()
        code = await process.wait()
        await asyncio.wait([following], timeout=2)  # what it still had to say
        if self.console.panic is not None:
            return KernelPanicked(f"the lab's kernel panicked: {self.console.panic}", console=self.console.tail())
        why = "" if code else f", {await self._why_shut_down()}{', a triple fault' if _TRIPLE_FAULT in words else ''}"
        said = _said("\n".join(line for line in words.splitlines() if not _DUMPED.match(line)))
        return QemuDied(f"QEMU ended ({_how(code)}{why}){said}", console=self.console.tail())

    async def _why_shut_down(self) -> str:
        """QEMU's word for why it ended in order: `guest-shutdown`, or `guest-reset` where the lab would start again."""
        try:
            event = await asyncio.wait_for(self._shutdown.get(), 2)  # it was told before QEMU ended
        except TimeoutError:
            return "no reason given"
        told = event.get("data")
        return str(told["reason"]) if isinstance(told, dict) else "no reason given"

    async def wait(self, task: Awaitable[T], deadline: float | None, waited_for: str) -> T:
        """The result of `task`, within `deadline` seconds; raises what broke the lab if that comes first
        (`chaos.lab.patience`)."""
        running = asyncio.ensure_future(task)
        try:
            await first_of({running, self._broken}, deadline, self.kept_waiting)
            if running.done():
                return running.result()
            if self._broken.done():
                self._broken.result()
            raise LabHung(
                f"waited {deadline:g} s for {waited_for}, in vain",
                remedy="its console says where it is; report it, unless that is at work on a very slow machine",
                console=await self.interrogate(),
            )
        except (ConnectionError, asyncio.IncompleteReadError):
            # The stream broke; who ended is known in a moment.
            await asyncio.wait({self._broken}, timeout=5)
            if self._broken.done():
                self._broken.result()
            raise
        finally:
            running.cancel()

    async def interrogate(self) -> tuple[str, ...]:
        """What a lab in which nothing goes on is at: the end of its console, its kernel's answer to SysRq included, and
        where QEMU has each CPU. Whoever asks has a failure to report already, so a lab that cannot say raises nothing.
        """
        at: tuple[str, ...] = ()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_WITHIN):
                registers = await self.monitor.execute("human-monitor-command", {"command-line": "info registers -a"})
                at = (_where(str(registers)),)
                for key in _SYSRQ_KEYS:
                    await self.monitor.execute("chardev-send-break", {"id": "console"})
                    self.ports["console"].writer.write(bytes([key]))
                    await self.console.silence(_SILENT_AFTER)
        return self.console.tail() + at

    # -- talking to the agent -----------------------------------------------------------------------------

    def send(self, message: protocol.ToAgent) -> None:
        self.ports["control"].writer.write(protocol.encode(message))

    async def receive(self, deadline: float | None, waited_for: str) -> protocol.FromLabAgent:
        """The agent's next message."""
        line = await self.wait(self.ports["control"].reader.readuntil(b"\n"), deadline, waited_for)
        return protocol.decode_from_agent(line)


def _where(registers: str) -> str:
    """Of all that QEMU tells of its CPUs, which instruction each is at, and whether it is halted (HLT=1)."""
    found = _AT.findall(registers)
    return "QEMU:" + "".join(f" CPU {cpu}" if cpu else f" {rip} {halted}" for cpu, rip, halted in found)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _said(words: str) -> str:
    return f": {words}" if words else ""


def command_line(spec: Spec, fds: dict[str, int], *, incoming: bool) -> list[str]:
    """QEMU's arguments. `fds` are the inherited descriptors by what they are for."""
    shim = f"sevshim.sev_asids={spec.sev_asids} sevshim.es_asids={spec.es_asids}"
    # quiet keeps the slow serial console free for what matters: warnings and worse still come through.
    # tsc=reliable: the watchdog would otherwise now and then call TCG's clock unstable, a warning of no meaning.
    kernel_line = (
        "console=ttyS0 loglevel=5 panic=-1 nokaslr mitigations=off tsc=reliable sysrq_always_enabled "
        f"cryptomgr.notests rcupdate.rcu_expedited=1 {shim}"
    ) + "".join(f" ccp.{name}={value}" for name, value in spec.ccp)
    kernel_line += f" {spec.kernel.parameters}" if spec.kernel.parameters else ""
    command = [
        str(spec.qemu.path), "-nodefaults", "-no-user-config", "-display", "none", "-net", "none", "-no-reboot",
        "-d", "cpu_reset",  # so that it says when a triple fault was what ended it
        "-name", "sevchaos-lab",
        "-accel", f"tcg,thread={spec.qemu.threads}", "-cpu", "EPYC,+svm,+npt",
        "-machine", "q35,memory-backend=memory", "-smp", str(1 + spec.cpus), "-m", f"{spec.memory >> 20}M",
        "-object", f"memory-backend-file,id=memory,size={spec.memory},mem-path=/proc/self/fd/{fds['memory']},share=on",
        "-kernel", str(spec.bootable), "-initrd", f"/proc/self/fd/{fds['disk']}", "-append", kernel_line,
        "-chardev", f"socket,id=console,fd={fds['console']}", "-serial", "chardev:console",
        "-chardev", f"socket,id=monitor,fd={fds['monitor']}", "-mon", "chardev=monitor,mode=control",
        "-chardev", f"socket,id=mailbox,fd={fds['mailbox']}",
        "-device", "ivshmem-doorbell,chardev=mailbox,vectors=2,master=on",
        "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for port in protocol.PORTS:
        command += ["-chardev", f"socket,id={port},fd={fds[port]}"]
        command += ["-device", f"virtserialport,chardev={port},name={protocol.port_name(port)}"]
    if incoming:
        command += ["-incoming", "defer"]
    return command


@contextlib.asynccontextmanager
async def stopping(lab: Lab) -> AsyncIterator[Lab]:
    """Ends the lab when the block ends, however it ends."""
    try:
        yield lab
    finally:
        await asyncio.shield(lab.stop())
