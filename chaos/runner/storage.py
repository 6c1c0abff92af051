# SPDX-License-Identifier: Apache-2.0
"""The file in which the host keeps the firmware's state (`init_ex_path` of ccp), made unfit to keep it.

The driver reads it once, at the first INIT_EX after it was loaded, and writes it after each command that changes the
state. What it does with an error is the question, so what the file is like is an operation of the history.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from errno import EBUSY, EIO
from pathlib import Path

from chaos.errors import Unsupported
from chaos.fault import StorageState
from chaos.linux.program import call
from chaos.runner.operations import OperationLog

PARAMETER = Path("/sys/module/ccp/parameters/init_ex_path")
SIZE = 32 << 10  # NV_LENGTH of drivers/crypto/ccp/sev-dev.c
MOUNTED_WITHIN = 10.0


class StateFile:
    """`log` gets what is done to it."""

    def __init__(self, log: OperationLog, parameter: Path = PARAMETER) -> None:
        self._log = log
        self._parameter = parameter
        self._mend: ExitStack | None = None

    @property
    def file(self) -> Path:
        """Raises `Unsupported` if the firmware keeps its state by itself."""
        try:
            name = self._parameter.read_text().strip()
        except OSError:
            name = ""
        if not name.startswith("/") or Path(name).parent == Path("/"):
            raise Unsupported(
                "ccp was loaded without init_ex_path, or with one right below /: there is no folder to spoil",
                remedy="load it with that, or in an experiment: `ccp: {init_ex_path: /run/psp/state}`",
            )
        return Path(name)

    def spoil(self, how: StorageState) -> None:
        """Make it unfit, until `mend`. Raises OSError, also if it is unfit already."""
        if self._mend is not None:
            raise OSError(EBUSY, "the firmware's storage is spoiled already")
        folder, undo = self.file.parent, ExitStack()
        acts: dict[StorageState, Callable[[], None]] = {
            "missing": lambda: _take_away(folder, undo),
            "full": lambda: _cover(folder, "size=16k", undo),
            "read-only": lambda: _cover(folder, "ro", undo),
            "torn": lambda: _tear(self.file, undo),
        }
        self._log.record("storage", acts[how], state=how)
        self._mend = undo

    def mend(self) -> None:
        """As it was. Raises OSError."""
        if self._mend is not None:
            undo, self._mend = self._mend, None
            self._log.record("storage", undo.close, state="well")

    def takes(self) -> OSError | None:
        """What keeps anybody from writing the whole state beside the file, None if nothing does."""
        probe = self.file.with_name(".probe")
        try:
            probe.write_bytes(bytes(SIZE))
        except OSError as error:
            return error
        finally:
            with contextlib.suppress(OSError):  # that there is none can be refused as well
                probe.unlink()
        return None

    @property
    def torn(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.file.stat().st_size != SIZE
        return False


def _tear(file: Path, undo: ExitStack) -> None:
    """Leave the first half of it, as a host that loses its power leaves what it was writing."""
    whole = file.read_bytes()
    file.write_bytes(whole[: SIZE // 2])

    def make_whole() -> None:
        if file.stat().st_size != SIZE:  # the driver has not written it anew meanwhile
            file.write_bytes(whole)

    undo.callback(make_whole)


def _take_away(folder: Path, undo: ExitStack) -> None:
    away = folder.with_name(f"{folder.name}.away")
    folder.rename(away)
    undo.callback(away.rename, folder)


def _cover(folder: Path, options: str, undo: ExitStack) -> None:
    """Put an empty file system with these options in front of it."""
    _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    undo.callback(_run, "umount", str(folder))


def _run(*argv: str) -> None:
    call(*argv, within=MOUNTED_WITHIN, error=EIO)
