# SPDX-License-Identifier: Apache-2.0
"""Opening a lab, and running programs in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from chaos.cache.entries import Say
from chaos.errors import InternalError, LabFailed, LabHung, QemuDied
from chaos.lab import snapshot
from chaos.lab.image import make_image
from chaos.lab.kernel.find import find_kernel
from chaos.lab.kernel.vmlinux import bootable
from chaos.lab.machine import BOOT_DEADLINE, RESTORE_DEADLINE, Lab, SerialLines, Spec, T, stopping
from chaos.lab.patience import first_of
from chaos.lab.protocol import Execute, ProgramExited, StdinEnd, Terminal
from chaos.lab.qemu import find_qemu

_CHUNK = 1 << 16
TIMER_LOST = "timer wakeup didn't happen"  # rcu_check_gp_kthread_expired_fqs_timer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A lab as a user asks for it. `memory` in bytes, None for what its kernel wants; `cold` forbids saved
    labs; `ccp` are parameters of that driver, by name, in order."""

    kernel: str
    sev_asids: int = 8
    es_asids: int = 7
    cpus: int = 2
    memory: int | None = None
    cold: bool = False
    ccp: tuple[tuple[str, str], ...] = ()


def make_spec(wish: Wish, *, say: Say) -> Spec:
    """Find or make all that a lab needs. Raises what its parts raise."""
    kernel = find_kernel(wish.kernel, say=say)
    return Spec(
        kernel=kernel,
        bootable=bootable(kernel),
        qemu=find_qemu(say=say),
        image=make_image(kernel, say=say),
        sev_asids=wish.sev_asids,
        es_asids=wish.es_asids,
        cpus=wish.cpus,
        memory=wish.memory or kernel.memory,
        ccp=wish.ccp,
    )


@contextlib.asynccontextmanager
async def open_lab(wish: Wish, *, say: Say, listener: Callable[[str], None] | None = None) -> AsyncIterator[Lab]:
    """A running lab whose agent waits for orders: restored, or booted (and then saved, unless `cold`)."""
    spec = make_spec(wish, say=say)
    saved = None if wish.cold else snapshot.find(spec)
    if saved is not None:
        async with stopping(Lab(spec, SerialLines(listener))) as lab:
            if await _restored(lab, saved, say):
                yield lab
                return
    async with contextlib.AsyncExitStack() as stack:
        lab = await _booted(spec, wish, stack, say, listener)
        if not wish.cold:
            await snapshot.save(lab)
        yield lab


async def _booted(
    spec: Spec, wish: Wish, stack: contextlib.AsyncExitStack, say: Say, listener: Callable[[str], None] | None
) -> Lab:
    """A QEMU that ends by itself while the kernel boots, when nobody's program has run yet, is started once more, and
    that is said: it was seen a few times on loaded machines, with SIGABRT. So is one whose kernel says that a timer
    never fired, seen once in hundreds of boots, at a load of five: a CPU slept for 20 s, and drivers gave up meanwhile.
    A kernel that panics is no such case."""
    for last in (False, True):
        say(f"booting {spec.kernel.release} with {_described(spec)}")
        async with contextlib.AsyncExitStack() as attempt:
            lab = await attempt.enter_async_context(stopping(Lab(spec, SerialLines(listener))))
            try:
                await lab.start()
                await lab.greet(BOOT_DEADLINE * spec.kernel.slowness, warm=not wish.cold)
                _must_have_sev(lab)
            except (QemuDied, TimerLost) as failed:
                if last:
                    raise
                words = failed.message.splitlines()
                say(f"{words[0].partition(':')[0]} before the lab had booted: {words[-1]}")
                continue
            await stack.enter_async_context(attempt.pop_all())
            return lab
    raise InternalError("a lab neither booted nor failed")


class TimerLost(LabFailed):
    """A lab whose drivers have given up since time stood still for a CPU of its."""


def _must_have_sev(lab: Lab) -> None:
    if lab.ready.sev:
        return
    remedy, console = "the console lines below say why; report them", lab.console.tail(60)
    for line in lab.console.lines:
        if TIMER_LOST in line:
            raise TimerLost(f"a CPU lost a timer\n{line.strip()}", remedy=remedy, console=console)
    message = "the lab came up without /dev/sev: the drivers did not accept the software PSP"
    raise LabFailed(message, remedy=remedy, console=console)


def _described(spec: Spec) -> str:
    version = ".".join(map(str, spec.qemu.version))
    return f"QEMU {version} (TCG, {spec.qemu.threads}-threaded), {spec.cpus} CPUs, {spec.memory >> 20} MiB"


async def _restored(lab: Lab, saved: snapshot.Snapshot, say: Say) -> bool:
    """Whether the lab runs again. A snapshot that is of no use is removed: a cold boot costs seconds, no more."""
    try:
        await snapshot.restore(lab, saved)
        await lab.greet(RESTORE_DEADLINE)
    except (OSError, msgspec.DecodeError, LabFailed) as error:
        say(f"the saved lab could not be restored ({error}); it is removed, booting anew")
        saved.path.unlink(missing_ok=True)
        return False
    return True


class Source(Protocol):
    """Where a program's input comes from; b"" is its end."""

    async def __call__(self) -> bytes: ...


Sink = Callable[[bytes], Awaitable[None]]


async def no_input() -> bytes:
    return b""


async def execute(
    lab: Lab,
    argv: Sequence[str],
    *,
    stdin: Source = no_input,
    stdout: Sink,
    stderr: Sink,
    terminal: Terminal | None = None,
    environment: Mapping[str, str] | None = None,
    warm: bool = False,
    timeout: float | None = None,
) -> ProgramExited:
    """Run a program in the lab to its end.

    Raises `LabHung` after `timeout` seconds (`chaos.lab.patience`), and what breaks the lab meanwhile.
    """
    order = Execute(argv=tuple(argv), environment=dict(environment or {}), terminal=terminal, warm=warm)
    lab.send(order)
    outputs = [_Output(lab.ports["stdout"].reader, stdout), _Output(lab.ports["stderr"].reader, stderr)]
    beside = [asyncio.create_task(_feed(lab, stdin)), *(asyncio.create_task(output.pump()) for output in outputs)]
    ending = asyncio.create_task(_ended(lab, argv[0], outputs))
    first = asyncio.create_task(_first(ending, beside))
    try:
        await first_of({first}, timeout, lab.kept_waiting)
        if first.done():
            return first.result()
        raise LabHung(
            f"{argv[0]} was not done after {timeout:g} s",
            remedy="give it longer with --timeout", console=await lab.interrogate(),
        )  # fmt: skip
    finally:
        for task in (first, ending, *beside):
            task.cancel()
        await asyncio.gather(first, ending, *beside, return_exceptions=True)


async def _first(ending: asyncio.Task[T], beside: Iterable[asyncio.Task[None]]) -> T:
    """What `ending` comes to; or what one of the others raises meanwhile, without which the end would be waited for in
    vain. A stream that breaks is none of these: what broke the lab is known in a moment."""
    waited: set[asyncio.Task[Any]] = {ending, *beside}
    while not ending.done():
        done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {ending}:
            failure = task.exception()
            if failure is not None and not isinstance(failure, ConnectionError):
                raise failure
    return ending.result()


async def _ended(lab: Lab, program: str, outputs: Sequence[_Output]) -> ProgramExited:
    """How it ended, when all that it wrote has come."""
    while not isinstance(message := await lab.receive(None, f"{program} to end"), ProgramExited):
        pass
    for output, count in zip(outputs, (message.stdout, message.stderr), strict=True):
        await lab.wait(output.reached(count), 60.0, f"the last of the output of {program}")
    return message


async def _feed(lab: Lab, source: Source) -> None:
    writer, sent = lab.ports["stdin"].writer, 0
    try:
        while data := await source():
            writer.write(data)
            sent += len(data)
            await writer.drain()
    finally:
        # Also when the program ended first: the agent then drops what is still on its way.
        lab.send(StdinEnd(count=sent))


class _Output:
    """One output stream: passed on as it comes, counted, so that its end can be waited for."""

    def __init__(self, reader: asyncio.StreamReader, sink: Sink) -> None:
        self._reader, self._sink = reader, sink
        self._count = 0
        self._moved = asyncio.Event()

    async def pump(self) -> None:
        """Until cancelled. A sink that is closed gets no more; the program need not know."""
        wanted = True
        while data := await self._reader.read(_CHUNK):
            if wanted:
                try:
                    await self._sink(data)
                except BrokenPipeError:
                    wanted = False
            self._count += len(data)
            self._moved.set()

    async def reached(self, count: int) -> None:
        while self._count < count:
            self._moved.clear()
            await self._moved.wait()


def write_to(fd: int) -> Sink:
    """A sink that writes to a descriptor of ours; it may block, so it does so in a thread."""

    async def sink(data: bytes) -> None:
        while data:
            data = data[await asyncio.to_thread(os.write, fd, data) :]

    return sink
