# SPDX-License-Identifier: Apache-2.0
"""What breaks a lab is named, each with its own exit code, and nothing is left behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.errors import ExitCode, QemuDied
from chaos.lab.kernel.find import default_kernels
from chaos.lab.machine import Lab
from chaos.lab.session import Wish, execute, open_lab
from tests.lab.conftest import DEADLINE, Sevchaos, command

ENDLESS = """
name: endless
why: A guest that is waited for longer than anybody waits for the run.
promises: [P5]
vmms: {source: {cgroup: source}}
vms: {old: {vmm: source, kind: sev}}
script:
  - {do: launch, vm: old}
  - {do: run, vm: old}
  - {do: count, vm: old, ticks: 1000000, within: 600}
"""

pytestmark = [pytest.mark.lab, pytest.mark.alone]


def test_a_panic_is_called_a_panic_and_shows_the_console(in_lab: Sevchaos, kernel: str) -> None:
    done = in_lab("sh", "-c", "echo c > /proc/sysrq-trigger", options=["--kernel", kernel])
    assert done.returncode == ExitCode.PANICKED
    text = done.stderr.decode()
    assert "the lab's kernel panicked: sysrq triggered crash" in text
    assert "the last lines of the lab's console" in text
    assert "sysrq: Trigger a crash" in text


def test_a_program_that_takes_too_long(in_lab: Sevchaos) -> None:
    done = in_lab("sleep", "1000", options=["--timeout", "2"])
    assert done.returncode == ExitCode.HUNG
    assert b"sleep was not done after 2 s" in done.stderr
    assert b"--timeout" in done.stderr


def test_a_lab_in_which_nothing_goes_on_says_what_it_is_at(sevchaos: Sevchaos, kernel: str, tmp_path: Path) -> None:
    """A task that sleeps where no signal wakes it, by the kernel's own word."""
    sleeper = "import ctypes, os; os._exit(0) if ctypes.CDLL(None).vfork() else os.read(os.pipe()[0], 1)"
    done = sevchaos("lab", "run", "--kernel", kernel, "--timeout", "10", "--", "python3", "-c", sleeper)
    assert done.returncode == ExitCode.HUNG
    said = done.stderr.decode()
    assert "sysrq: Show backtrace of all active CPUs" in said
    blocked = said.partition("sysrq: Show Blocked State")[2]
    assert "task:python" in blocked and "vfork" in blocked
    assert all(f"CPU {cpu} RIP=" in blocked.partition("QEMU: ")[2] for cpu in range(3))


def test_a_run_that_is_not_done_says_where_it_is(sevchaos: Sevchaos, tmp_path: Path) -> None:
    file = tmp_path / "endless.yaml"
    file.write_text(ENDLESS)
    done = sevchaos("run", str(file), "--timeout", "30", "--json", "--runs", str(tmp_path))
    assert done.returncode == ExitCode.UNKNOWN
    (run,) = json.loads(done.stdout)["runs"]
    assert run["verdicts"][0]["reason"].startswith(
        "the run is incomplete: the host broke: the run was not done after 30 s"
    )
    said = done.stderr.decode()
    assert 'the run was not done after 30 s\nits last record: {"' in said
    assert "most recent call first" in said and "in carry_out" in said
    console = Path(run["directory"]) / "console.log"
    assert "sysrq: Show Blocked State" in console.read_text()


def test_what_cannot_be_taken_of_a_programs_output_is_raised_and_its_end_not_waited_for() -> None:
    async def full(data: bytes) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    async def run() -> None:
        async with open_lab(Wish(kernel=default_kernels()[-1]), say=print) as lab:
            await execute(lab, ["sh", "-c", "echo here; sleep 1000"], stdout=full, stderr=full, timeout=60)

    with pytest.raises(OSError, match="the disk is full"):
        asyncio.run(run())


def test_a_machine_that_is_switched_off(in_lab: Sevchaos) -> None:
    done = in_lab("sh", "-c", "echo o > /proc/sysrq-trigger; sleep 100")
    assert done.returncode == ExitCode.QEMU_DIED
    assert b"QEMU ended (exit code 0, guest-shutdown)" in done.stderr


@pytest.mark.parametrize(("how", "words"), [("kbd", b"guest-reset)"), ("triple", b"guest-reset, a triple fault)")])
def test_a_machine_that_would_start_again(in_lab: Sevchaos, how: str, words: bytes) -> None:
    done = in_lab("sh", "-c", f"echo {how} > /sys/kernel/reboot/type; echo b > /proc/sysrq-trigger; sleep 100")
    assert done.returncode == ExitCode.QEMU_DIED
    assert b"QEMU ended (exit code 0, " + words in done.stderr
    assert b"CPU Reset" not in done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_a_qemu_that_ends_before_the_kernel_has_booted_is_started_once_more(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    greet, killed = Lab.greet, 0

    async def greeted(lab: Lab, deadline: float, *, warm: bool = False) -> None:
        nonlocal killed
        if killed < times:
            killed += 1
            lab._processes[-1].send_signal(signal.SIGABRT)
        await greet(lab, deadline, warm=warm)

    async def booted() -> bool:
        async with open_lab(Wish(kernel=default_kernels()[-1], cold=True), say=said.append) as lab:
            return lab.ready.sev

    monkeypatch.setattr(Lab, "greet", greeted)
    if times == 1:
        assert asyncio.run(booted())
    else:
        with pytest.raises(QemuDied, match="killed by SIGABRT"):
            asyncio.run(booted())
    assert [line.split()[0] for line in said if "QEMU" in line] == ["booting", "QEMU", "booting"]
    assert "QEMU ended (killed by SIGABRT) before the lab had booted" in " ".join(said)


@pytest.mark.parametrize(
    ("victim", "signum", "code", "words"),
    [
        ("qemu-system", signal.SIGKILL, ExitCode.QEMU_DIED, b"QEMU ended (killed by SIGKILL)\n"),
        ("qemu-system", signal.SIGTERM, ExitCode.QEMU_DIED, b"QEMU ended (exit code 0, host-signal): "),
        ("qemu-system", signal.SIGTERM, ExitCode.QEMU_DIED, b": terminating on signal 15 from pid "),
        ("chaos.lab.psp", signal.SIGKILL, ExitCode.PSP_DIED, b"software PSP"),
    ],
)
def test_a_part_that_dies_is_named(victim: str, signum: int, code: ExitCode, words: bytes) -> None:
    """With its last words, which QEMU says after the registers of every CPU."""
    with running_lab() as lab:
        os.kill(child_of(lab.pid, victim), signum)
        _, errors = lab.communicate(timeout=DEADLINE)
    assert lab.returncode == code
    assert words in errors and b"CR0=" not in errors


def test_no_memory_for_a_lab(sevchaos: Sevchaos) -> None:
    done = sevchaos("lab", "run", "--memory", "64G", "--", "true")
    assert done.returncode == ExitCode.NO_SPACE
    assert b"MiB are available" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="making a small disk takes root")
@pytest.mark.parametrize("megabytes", [40, 160], ids=["root file system", "snapshot"])
def test_a_full_disk(sevchaos: Sevchaos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    everything = snapshots_directory().parent
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=True, timeout=30)
    try:
        for kept in ("kernels", "modules", "tools", "native", "series.json"):  # all but what is made at start
            if (everything / kept).exists():
                (disk / kept).symlink_to(everything / kept)
        monkeypatch.setenv("SEVCHAOS_CACHE", str(disk))
        done = sevchaos("lab", "run", "--", "true")
        assert done.returncode == ExitCode.NO_SPACE, done.stderr.decode()
        assert b"is full" in done.stderr or b"free" in done.stderr
        assert list(disk.rglob("*.lab")) == [], "half a snapshot"
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)


def test_a_kernel_that_does_not_exist(sevchaos: Sevchaos) -> None:
    done = sevchaos("lab", "run", "--kernel", "debian:6.1.0-1-nothing", "--", "true")
    assert done.returncode in (ExitCode.HOST_LACKS, ExitCode.USAGE)
    assert b"what to do" in done.stderr


@pytest.mark.parametrize("kernel", ["6.1", "debian:", "/nonexistent"])
def test_a_kernel_that_cannot_be_one(sevchaos: Sevchaos, kernel: str) -> None:
    done = sevchaos("lab", "run", "--kernel", kernel, "--", "true")
    assert done.returncode in (ExitCode.USAGE, ExitCode.HOST_LACKS)
    assert b"what to do" in done.stderr


def test_a_damaged_snapshot_costs_a_cold_boot_and_no_more(in_lab: Sevchaos, tmp_path: Path) -> None:
    in_lab("true")
    newest = max(snapshots(), key=lambda path: path.stat().st_mtime)
    damaged = newest.with_suffix(".cut")
    newest.rename(damaged)
    newest.write_bytes(damaged.read_bytes()[:100_000])
    damaged.unlink()
    done = in_lab("echo", "fine")
    assert (done.returncode, done.stdout) == (0, b"fine\n")


@pytest.mark.parametrize(
    ("arguments", "longest"),
    [(("lab", "run", "-q", "--", "sleep", "60"), 1.2), (("run", "-q", "kill-destination-in-move"), 5.0)],
    ids=["lab run", "run"],
)
def test_sigkill_at_any_moment_leaves_nothing(arguments: tuple[str, ...], longest: float, tmp_path: Path) -> None:
    chance = random.Random(20261123)
    before = ours()
    for _ in range(10):
        victim = subprocess.Popen(
            command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path
        )
        time.sleep(chance.uniform(0.02, longest))  # the moment is what is tested here, not an event waited for
        victim.kill()
        victim.wait(timeout=DEADLINE)
    until(lambda: ours() == before, "processes, sockets and files of ours to be gone")


# -- looking at this machine ------------------------------------------------------------------------------


class running_lab:  # noqa: N801 - reads as a statement
    """A lab in which a program runs and has said so."""

    def __enter__(self) -> subprocess.Popen[bytes]:
        argv = command("lab", "run", "-q", "--", "sh", "-c", "echo here; sleep 1000")
        self.lab = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.lab.stdout is not None
        assert self.lab.stdout.readline() == b"here\n"
        return self.lab

    def __exit__(self, *_: object) -> None:
        self.lab.kill()
        self.lab.communicate()


def processes() -> Iterator[tuple[int, int, str]]:
    """Process id, parent and command line of every process that is no zombie."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                yield int(entry.name), int(fields[1]), words


def child_of(parent: int, words: str) -> int:
    return next(pid for pid, its_parent, line in processes() if its_parent == parent and words in line)


def ours() -> set[str]:
    """Everything of ours that could be left: processes, named sockets, shared memory files, temporary files."""
    found = {f"{pid} {line}" for pid, _, line in processes() if "sevchaos-lab" in line or "chaos.lab.psp" in line}
    found |= {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "sevchaos" in line}
    for directory in (Path("/dev/shm"), Path("/tmp")):
        found |= {str(path) for path in directory.glob("*sevchaos*")}
    cache = snapshots_directory().parent
    return found | {str(path) for path in cache.rglob(".*partial*")}


def snapshots_directory() -> Path:
    from chaos.cache import entries as cache

    return cache.entry_path("snapshots", "x").parent


def snapshots() -> list[Path]:
    return list(snapshots_directory().glob("*.lab"))


def until(condition: Callable[[], bool], what: str, deadline: float = 10.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"waited {deadline} s for {what}"
        time.sleep(0.05)
