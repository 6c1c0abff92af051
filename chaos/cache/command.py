# SPDX-License-Identifier: Apache-2.0
"""Running the tools that fetch and build: with a deadline, in one language, and never left behind.

A tool runs in a process group of its own, which is killed when the deadline passes or we are interrupted.
Should we be killed ourselves, the tool may live on for a while: it then holds the lock it was started under
(`keep`), so the next process waits for it instead of writing to the same files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chaos.errors import HostLacks, NoSpace

# An ordinary user's PATH on Debian has no sbin, where depmod lives.
_SBIN = ("/usr/sbin", "/sbin")
_SHOWN = 6  # words of a command
_FULL = ("no space left on device", "enough free space", "disk quota exceeded")


@dataclass(frozen=True, slots=True)
class CommandResult:
    """A tool that has ended. `output` is what it wrote to stdout and stderr, in the order it came."""

    argv: tuple[str, ...]
    status: int
    output: str

    @property
    def disk_full(self) -> bool:
        return self.status != 0 and any(word in self.output.lower() for word in _FULL)

    def last_lines(self, count: int = 8) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return "\n".join(lines[-count:]) or "(it wrote nothing)"


def find(name: str) -> str | None:
    """The path of a program, also of one that only root usually calls; None if it is not installed."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN]))


def tool(name: str, *, package: str, purpose: str) -> str:
    """The path of a program, or an error that names the package it is in."""
    found = find(name)
    if found is None:
        raise HostLacks(
            f"{name} is not installed; it is needed {purpose}",
            remedy=f"install it (Debian: apt-get install {package}), or run `make setup` in the source tree",
        )
    return found


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    keep: Sequence[int] = (),
    watch: Callable[[], None] | None = None,
    every: float = 5.0,
    merge: bool = True,
) -> CommandResult:
    """Run a tool to its end. `timeout` and `every` are seconds; `watch` is called every so often meanwhile.

    Raises HostLacks when the deadline passes. A status other than 0 is the caller's to judge. With `merge`
    off, stderr is dropped, for tools whose output is parsed.
    """
    process = subprocess.Popen(
        list(argv),
        cwd=cwd,
        # One language, because output is read; no questions, because nobody is there to answer.
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else subprocess.DEVNULL,
        process_group=0,
        pass_fds=tuple(keep),
    )
    deadline = time.monotonic() + timeout
    try:
        while True:
            wait = min(every if watch else timeout, max(0.0, deadline - time.monotonic()))
            try:
                output, _ = process.communicate(timeout=wait)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    raise HostLacks(
                        f"`{_shortened(argv)}` did not end within {timeout:.0f} s",
                        remedy="see whether the disk or the network hangs, then try again",
                    ) from None
                if watch is not None:
                    watch()
    finally:
        _end(process)
    return CommandResult(tuple(argv), process.returncode, output.decode(errors="replace"))


def _shortened(argv: Sequence[str]) -> str:
    """A command as somebody would tell it: without apt's many -o, and of many words the first ones."""
    words = [word for before, word in zip(("", *argv), argv, strict=False) if "-o" not in (before, word)]
    return " ".join(words[:_SHOWN]) + (f" … ({len(words) - _SHOWN} more)" if len(words) > _SHOWN else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the tool's process group, and reap the tool."""
    if process.returncode is None:
        # Not reaped yet, so the group's number cannot have gone to somebody else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def must(done: CommandResult, what: str, *, remedy: str, error: type[HostLacks] = HostLacks) -> CommandResult:
    """Give back `done` if it went well; else raise, as NoSpace when the disk was full."""
    if done.disk_full:
        raise NoSpace(
            f"the disk became full {what}: {done.last_lines(2)}",
            remedy="free some space (`sevchaos lab clean` and `kernel clean` help), then try again",
        )
    if done.status != 0:
        message = f"{done.argv[0]} failed {what} (status {done.status}):\n{done.last_lines()}"
        raise error(message, remedy=remedy)
    return done
