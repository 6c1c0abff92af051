# SPDX-License-Identifier: Apache-2.0
"""The process and its client: descriptors, handshake, control channel, life and death."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import time

import msgspec
import pytest

from chaos.errors import InternalError, LabHung, PspDied
from chaos.lab.psp import wire
from chaos.lab.psp.numbers import FirmwareCommand, FirmwareStatus
from chaos.lab.psp.plan import Fail, FailpointPlan, FailpointRule, Stall
from tests.unit.psp.host import FEATURE
from tests.unit.psp.machine import DEADLINE_S, Machine


def test_handshake_and_a_launch() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            assert await control.ready() == machine.process.pid
            assert machine.plug_in() == [0, 0, -1, 0, 0]
            assert machine.registers[FEATURE // 4] == 1
            await control.trace(True)
            machine.init()
            handle = machine.start()
            assert machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)[0] is FirmwareStatus.SUCCESS
            machine.measure(handle)
            assert machine.call(FirmwareCommand.LAUNCH_FINISH, "I", handle)[0] is FirmwareStatus.SUCCESS
            status = await control.status()
            assert (status.platform, status.guest_count, status.owned) == ("WORKING", 1, {4: handle})
            assert status.executed["LAUNCH_MEASURE"] == 1
            assert [record.command for record in control.records] == [
                "INIT",
                "DF_FLUSH",
                "LAUNCH_START",
                "ACTIVATE",
                "LAUNCH_MEASURE",
                "LAUNCH_FINISH",
            ]
            assert control.lost == 0
            await control.trace(False)
            machine.call(FirmwareCommand.DEACTIVATE, "I", handle)
            await control.status()
            assert len(control.records) == 6
            await control.quit()
            assert machine.process.wait(DEADLINE_S) == 0
            assert machine.process.communicate() == (b"", b"")

    asyncio.run(main())


def test_commands_sent_before_anybody_listens_to_control() -> None:
    """The device does not wait for the controller."""
    with Machine() as machine:
        machine.plug_in()
        machine.init()


def test_snapshot() -> None:
    """A second process goes on where the first one was: the same bytes as the first would have given."""

    async def main() -> None:
        with Machine() as first:
            control = await first.control()
            await control.ready()
            first.plug_in()
            first.init()
            handle = first.start()
            first.call(FirmwareCommand.ACTIVATE, "II", handle, 4)
            first.call(FirmwareCommand.LAUNCH_UPDATE_DATA, "I4xQI", handle, 0, 4096)
            snapshot = await control.save()
            ram = first.ram[:]
            measurement = first.measure(handle)
            await control.quit()
        text = msgspec.json.encode(snapshot)
        assert msgspec.json.decode(text, type=wire.PspSnapshot) == snapshot
        with Machine("--restore", "--seed", "7", ram=ram) as second:
            control = await second.control()
            with pytest.raises(LabHung, match="ready"):
                await control.ready(0.2)
            await control.load(msgspec.json.decode(text, type=wire.PspSnapshot))
            await control.ready()
            second.plug_in()
            assert bytes(second.registers.cast("B")) == _registers(snapshot)
            assert second.measure(handle) == measurement
            status = await control.status()
            assert status.sequence == snapshot.sequence + 1
            assert status.executed["LAUNCH_START"] == 1
            with pytest.raises(InternalError, match="once"):
                await control.load(snapshot)
            await control.quit()

    asyncio.run(main())


def _registers(snapshot: wire.PspSnapshot) -> bytes:
    import zlib

    return zlib.decompress(snapshot.registers)


def test_snapshots_that_do_not_fit() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            await control.ready()
            snapshot = await control.save()
            with pytest.raises(InternalError, match="--restore"):
                await control.load(snapshot)
            await control.quit()
        with Machine("--restore", sev=9) as machine:
            control = await machine.control()
            with pytest.raises(InternalError, match="numbers of ASIDs"):
                await control.load(snapshot)
            await control.quit()
        text = msgspec.json.encode(snapshot)
        with pytest.raises(msgspec.DecodeError, match="version"):
            msgspec.json.decode(text.replace(b'{"version":1', b'{"version":2'), type=wire.PspSnapshot)

    asyncio.run(main())


def test_a_plan_and_its_proof() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            machine.plug_in()
            machine.init()
            rules = (
                FailpointRule(Fail("INVALID_ASID"), command="ACTIVATE", times=1, name="no asid"),
                FailpointRule(Stall(), command="DEACTIVATE", name="hold"),
            )
            await control.plan(FailpointPlan(rules=rules))
            handle = machine.start()
            assert machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)[0] is FirmwareStatus.INVALID_ASID
            assert machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)[0] is FirmwareStatus.SUCCESS
            first = await control.next_firing()
            assert (first.name, first.command, first.action) == ("no asid", "ACTIVATE", "fail:INVALID_ASID")

            machine.submit(FirmwareCommand.DEACTIVATE, handle.to_bytes(4, "little"))
            assert (await control.next_firing()).name == "hold"
            status = await control.status()
            assert (status.pending, status.stalled) == (True, True)
            assert [firing.name for firing in status.fired] == ["no asid", "hold"]
            assert machine.answer(0.05) is None
            with pytest.raises(InternalError, match="held back"):
                await control.save()
            await control.release()
            assert machine.answer() is FirmwareStatus.SUCCESS
            with pytest.raises(InternalError, match="no command is stalled"):
                await control.release()

            await control.plan(FailpointPlan())
            assert (await control.status()).fired == ()
            with pytest.raises(LabHung, match="follow its plan"):
                await control.next_firing(0.05)
            await control.quit()

    asyncio.run(main())


def test_what_the_command_line_says_of_the_firmware() -> None:
    with Machine("--max-guests", "2", "--forgive-unrun") as machine:
        machine.plug_in()
        machine.init()
        handle = machine.start()
        for _ in range(2):
            assert machine.call(FirmwareCommand.ACTIVATE, "II", handle, 4)[0] is FirmwareStatus.SUCCESS
            assert machine.call(FirmwareCommand.DEACTIVATE, "I", handle)[0] is FirmwareStatus.SUCCESS
        machine.start()
        assert machine.call(FirmwareCommand.LAUNCH_START, "IIQI4xQI", *[0] * 6)[0] is FirmwareStatus.RESOURCE_LIMIT


def test_high_descriptors() -> None:
    """A controller with thousands of files passes numbers that select does not take."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most <= 3000:
        pytest.skip(f"this process may have {most} descriptors only")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    filler = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Machine() as machine:
            assert machine.control_socket.fileno() > 1023
            machine.plug_in()
            machine.control_socket.sendall(wire.encode(wire.Quit(1)))
            assert machine.process.wait(DEADLINE_S) == 0
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_wbinvd_by_control() -> None:
    async def main() -> None:
        with Machine("--watch-wbinvd") as machine:
            control = await machine.control()
            machine.plug_in()
            assert machine.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.WBINVD_REQUIRED
            await control.wbinvd()
            assert machine.call(FirmwareCommand.DF_FLUSH)[0] is FirmwareStatus.SUCCESS
            await control.quit()

    asyncio.run(main())


def test_a_controller_that_does_not_read() -> None:
    """Tracing never holds a command up; what the channel cannot take is kept, in order, and comes before the reply to
    what is asked meanwhile."""
    with Machine() as machine:
        machine.plug_in()
        lines = machine.control_socket.makefile("rb")
        machine.control_socket.sendall(wire.encode(wire.Trace(1, True)))
        assert [type(wire.decode_answer(lines.readline())) for _ in range(2)] == [wire.PspReady, wire.PspDone]
        for number in (3900, 100):
            for _ in range(number):
                assert machine.call(FirmwareCommand.NOP)[0] is FirmwareStatus.SUCCESS
            time.sleep(0.2)  # it is idle, and sends: the first are more than the channel takes
        machine.control_socket.sendall(wire.encode(wire.AskStatus(2)))
        time.sleep(0.2)  # it serves this with nobody reading
        sequences: list[int] = []
        while isinstance(message := wire.decode_answer(lines.readline()), wire.PspTraced):
            sequences += [record.sequence for record in message.records]
            assert message.lost == 0
        assert isinstance(message, wire.StatusReply)
        assert sequences == list(range(1, 4001))


# -- life and death


def test_it_ends_with_its_control_channel() -> None:
    with Machine() as machine:
        machine.plug_in()
        machine.control_socket.close()
        assert machine.process.wait(DEADLINE_S) == 0
        assert machine.process.communicate() == (b"", b"")


def test_it_ends_with_its_parent() -> None:
    """Killed by the kernel when the parent is killed, although its control channel stays open."""
    here, there = socket.socketpair()
    device, qemu = socket.socketpair()
    ram = os.memfd_create("test-ram")
    os.ftruncate(ram, 4096)
    script = (
        "import subprocess, sys, time\n"
        "fds = [int(fd) for fd in sys.argv[1:]]\n"
        "names = ['--control-fd', '--ivshmem-fd', '--ram-fd']\n"
        "options = [t for n, f in zip(names, fds) for t in (n, str(f))]\n"
        "command = [sys.executable, '-m', 'chaos.lab.psp', '--es-asids', '1', '--sev-asids', '1', *options]\n"
        "subprocess.Popen(command, pass_fds=fds)\n"
        "time.sleep(60)\n"
    )
    fds = (there.fileno(), device.fileno(), ram)
    parent = subprocess.Popen([sys.executable, "-c", script, *map(str, fds)], pass_fds=fds)
    try:
        here.settimeout(DEADLINE_S)
        ready = wire.decode_answer(here.recv(4096))
        assert isinstance(ready, wire.PspReady)
        child = os.pidfd_open(ready.pid)
    finally:
        parent.kill()
        parent.wait()
    there.close()
    poll = select.poll()
    poll.register(child)
    assert poll.poll(DEADLINE_S * 1000), "still alive"
    assert here.recv(4096) == b""
    for fd in (child, ram):
        os.close(fd)
    for end in (here, device, qemu):
        end.close()


def test_interrupts_from_a_terminal_are_the_parents_business() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            await control.ready()
            machine.process.send_signal(signal.SIGINT)
            await control.status()
            await control.quit()
            assert machine.process.wait(DEADLINE_S) == 0

    asyncio.run(main())


def test_whoever_waits_learns_of_the_death() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            await control.ready()
            firing = asyncio.create_task(control.next_firing())
            os.kill(machine.process.pid, signal.SIGSTOP)
            status = asyncio.create_task(control.status())
            await asyncio.sleep(0)
            machine.process.kill()
            for task in (status, firing):
                with pytest.raises(PspDied):
                    await task
            with pytest.raises(PspDied, match=r"closed its control channel|broke"):
                await control.save()
            with pytest.raises(PspDied):
                await control.next_firing()
            await control.close()

    asyncio.run(main())


def test_a_process_that_is_never_ready() -> None:
    async def main() -> None:
        with Machine("--no-such-option") as machine:
            control = await machine.control()
            with pytest.raises(PspDied):
                await control.ready()
            await control.close()

    asyncio.run(main())


def test_deadlines() -> None:
    async def main() -> None:
        with Machine() as machine:
            control = await machine.control()
            await control.ready()
            os.kill(machine.process.pid, signal.SIGSTOP)
            with pytest.raises(LabHung, match=r"waited 0\.1 s for the software PSP to answer status"):
                await control.status(0.1)
            os.kill(machine.process.pid, signal.SIGCONT)
            assert (await control.status()).sequence == 0, "the late answer is not taken for this one"
            await control.quit()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-option"], b"--no-such-option"),
        (["--es-asids", "-1"], b"es_asids"),
        (["--ram-fd", "0"], b"OSError"),
        (["--control-fd", "999"], b"OSError"),
    ],
)
def test_mistakes_are_one_line_and_a_code(arguments: list[str], words: bytes) -> None:
    with Machine(*arguments) as machine:
        out, err = machine.process.communicate(timeout=DEADLINE_S)
        assert machine.process.returncode == 70
        assert out == b""
        assert err.count(b"\n") == 1
        assert words in err, err


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"type":"explode","id":1}\n', b'{"type":"save"}\n'])
def test_nonsense_on_the_control_channel(line: bytes) -> None:
    """A controller of another version: no guessing."""
    with Machine() as machine:
        machine.plug_in()
        machine.control_socket.sendall(line)
        _, err = machine.process.communicate(timeout=DEADLINE_S)
        assert machine.process.returncode == 70
        assert err.count(b"\n") == 1


def test_messages_come_in_pieces() -> None:
    with Machine() as machine:
        machine.plug_in()
        for byte in wire.encode(wire.AskStatus(5)):
            machine.control_socket.sendall(bytes([byte]))
        machine.control_socket.settimeout(DEADLINE_S)
        lines = machine.control_socket.makefile("rb")
        assert isinstance(wire.decode_answer(lines.readline()), wire.PspReady)
        reply = wire.decode_answer(lines.readline())
        assert isinstance(reply, wire.StatusReply)
        assert reply.id == 5
