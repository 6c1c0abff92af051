# SPDX-License-Identifier: Apache-2.0
"""The run directory: `ROOT/EXPERIMENT/UTC-TIME-SEED/`, and `latest` beside it.

experiment.json   what was carried out          history.jsonl   what happened, flushed as it did
host.json         where                         console.log     the lab's serial console
dmesg.log         the kernel's log              verdict.json    written last, and whole or not at all
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EINVAL
from pathlib import Path

import msgspec

from chaos.controller.host_description import HostDescription
from chaos.errors import NoSpace, UsageError
from chaos.experiment import load
from chaos.experiment.model import Experiment
from chaos.history import file
from chaos.history.records import FORMAT, History
from chaos.judge.verdict import RunVerdict

VERDICT_FORMAT = 2  # of verdict.json; 1 had no number, and said held and deviated for kept and broken


@dataclass(frozen=True, slots=True)
class RunDirectory:
    path: Path

    @classmethod
    def create(cls, root: Path, of: Experiment, seed: int, host: HostDescription) -> RunDirectory:
        """Make a new one and say in it what is about to be done. Raises `NoSpace` or `UsageError`."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        try:
            path = _fresh(root / of.name, f"{stamp}-{seed}")
            (path / "experiment.json").write_bytes(msgspec.json.format(load.encode(of)))
            (path / "host.json").write_bytes(msgspec.json.format(msgspec.json.encode(host)))
        except OSError as error:
            if error.errno in (28, 122):  # ENOSPC, EDQUOT
                raise NoSpace(f"the disk of {root} is full", remedy="free some, or give another --runs") from error
            raise UsageError(f"{root}: {error.strerror}", remedy="give a directory to write to by --runs") from error
        link = root / of.name / "latest"
        with contextlib.suppress(OSError):  # a convenience; two runs at once may race for it
            replacement = link.with_name(f".latest.{os.getpid()}")
            replacement.symlink_to(path.name)
            replacement.replace(link)
        return cls(path)

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    def write_verdict(self, verdict: RunVerdict) -> None:
        partial = self.path / ".verdict.json"
        told = msgspec.to_builtins(verdict)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode({"format": VERDICT_FORMAT, **told})) + b"\n")
        partial.replace(self.path / "verdict.json")

    def read(self) -> tuple[Experiment, History]:
        """What was carried out, and what happened. Raises `UsageError` if this is no run directory, or one of another
        format: what a history of another format lacks or means otherwise, nobody here knows."""
        try:
            ordered = self.path / "experiment.json"
            for path in (ordered, self.history):
                if path.exists() and not path.is_file():  # a pipe would be waited for
                    raise OSError(EINVAL, f"{path.name} is no file")
            stated = file.format_of(self.history)
            if stated != FORMAT:
                raise UsageError(
                    f"{self.path} has a history of format {stated}, this version reads {FORMAT}",
                    remedy="judge it with the version of sevchaos that stored it",
                )
            return load.decode(ordered.read_bytes()), file.read(self.history)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(
                f"{self.path} is no run directory: {error}", remedy="give the path that `sevchaos run` printed"
            ) from error


def _fresh(parent: Path, name: str) -> Path:
    """Two runs may begin in one second; the second one gets a number."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        path = parent / (f"{name}.{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise UsageError(f"{parent} holds a thousand runs of one second", remedy="move them away")
