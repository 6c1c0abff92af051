# SPDX-License-Identifier: Apache-2.0
"""Who removes what a run leaves when it is killed: a process that outlives it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.errors import CleanupFailed
from chaos.linux import process, tracefs
from chaos.linux.fd import OwnedFd
from chaos.safety.claim import GONE_WITHIN, Claim


class Warden:
    """A process that removes what it was told to guard, and restores what it was told to remember, should the runner
    end without having done so itself."""

    def __init__(self) -> None:
        """Forks. The calling process has one thread."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.pid = process.fork(lambda: _keep_watch(reader))
        os.close(reader)
        self._pipe = OwnedFd(writer)

    def guard(self, claimed: Claim) -> None:
        self._tell("guard", claimed.cgroup.path)

    def remember(self, path: Path, text: str) -> None:
        """`text` is to be written into this file of the kernel's, unless it is forgotten before."""
        self._tell("remember", path, text)

    def forget(self, path: Path, text: str) -> None:
        self._tell("forget", path, text)

    def _tell(self, *words: object) -> None:
        os.write(self._pipe.number, b"\t".join(os.fsencode(str(word)) for word in words) + b"\n")

    def dismiss(self) -> None:
        """Let it see for itself that nothing is left, and end."""
        if self._pipe.is_open:
            self._pipe.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _keep_watch(reader: int) -> int:
    os.setsid()
    process.leave_streams()
    os.dup2(1, 2)  # whoever reads the runner's stderr waits for the last process that has it
    process.keep_only((reader,))
    with open(reader, "rb") as told:
        guarded, remembered = _understood(os.fsdecode(line.rstrip(b"\n")) for line in told)
    failed = 0  # nobody listens any more; `sevchaos clean` will find what can be found
    for group in map(Cgroup.at, guarded):
        if group.exists:
            try:
                group.destroy(GONE_WITHIN)
            except (CleanupFailed, OSError):
                failed = 1
    for setting, text in reversed(remembered):
        try:
            with OwnedFd(os.open(setting, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)) as file:
                os.write(file.number, text.encode())
        except FileNotFoundError:
            pass  # it went with a cgroup
        except OSError:
            failed = 1
    try:
        tracefs.clean()
    except OSError:
        failed = 1
    return failed


def _understood(lines: Iterable[str]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The cgroups that are guarded, and what is remembered and was not forgotten."""
    guarded: list[Path] = []
    remembered: list[tuple[Path, str]] = []
    for line in lines:
        match line.split("\t"):
            case ["guard", path]:
                guarded.append(Path(path))
            case ["remember", path, text]:
                remembered.append((Path(path), text))
            case ["forget", path, text]:
                remembered.remove((Path(path), text))
    return guarded, remembered
