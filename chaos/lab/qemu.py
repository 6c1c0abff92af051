# SPDX-License-Identifier: Apache-2.0
"""Which QEMU the lab runs on.

Any from 7.2 on will do. What differs is whether its TCG may run each virtual CPU in a thread of its own:
10.0 did so through everything that was tried, while 7.2 let Linux 6.12 die in `__schedule` with a stray
`int3` (a race in how it notices that code was patched). What lies between was not tried, so only 10.0 and
later get several threads; older ones run all virtual CPUs in one, which is slower and always right.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chaos.cache.command import run
from chaos.errors import HostLacks

PROGRAM = "qemu-system-x86_64"
OLDEST = (7, 2, 0)
OLDEST_MULTI = (10, 0, 0)
_REMEDY = (
    "install qemu-system-x86 (`make setup` in the source tree does; Fedora: qemu-system-x86-core), or set"
    " SEVCHAOS_QEMU to the program"
)

QemuVersion = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Qemu:
    path: Path
    version: QemuVersion
    threads: Literal["multi", "single"]  # for -accel tcg,thread=

    def __str__(self) -> str:
        return f"QEMU {'.'.join(map(str, self.version))} ({self.path}), TCG with {self.threads} threads"


def find_qemu(*, say: Callable[[str], None] | None = None) -> Qemu:
    """The QEMU to use: `$SEVCHAOS_QEMU` if that is set, else the newest on PATH.

    With `say`, a notice when it is too old for several threads. Raises HostLacks.
    """
    if own := os.environ.get("SEVCHAOS_QEMU"):
        found = shutil.which(own)
        if found is None:
            raise HostLacks(f"SEVCHAOS_QEMU names {own}, which is no program", remedy=_REMEDY)
        candidates = [Path(found)]
    else:
        candidates = _on_path()
    if not candidates:
        raise HostLacks(f"{PROGRAM} is not installed; the lab runs in it", remedy=_REMEDY)
    version, path = max(((_version(path), path) for path in candidates), key=lambda found: found[0])
    if version < OLDEST:
        raise HostLacks(
            f"{path} is QEMU {_dotted(version)}, and the lab needs {_dotted(OLDEST)} or later", remedy=_REMEDY
        )
    if version >= OLDEST_MULTI:
        return Qemu(path, version, "multi")
    if say is not None:
        say(
            f"QEMU {_dotted(version)} is older than {_dotted(OLDEST_MULTI)}: the lab runs its CPUs in one"
            " thread, which is slower (Debian 12's backports suite has a newer one)"
        )
    return Qemu(path, version, "single")


def _on_path() -> list[Path]:
    places = (Path(place or ".") for place in os.environ.get("PATH", os.defpath).split(os.pathsep))
    found = (shutil.which(PROGRAM, path=str(place)) for place in places)
    # Two names of one file, as /bin and /usr/bin are where they are merged, are one QEMU.
    unique: dict[str, Path] = {}
    for path in found:
        if path:
            unique.setdefault(os.path.realpath(path), Path(path))
    return list(unique.values())


def _version(path: Path) -> QemuVersion:
    """Ask the program, once in a process's life as long as the file stays the same."""
    stat = path.stat()
    return _ask(path, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _ask(path: Path, _mtime: int, _size: int) -> QemuVersion:
    done = run([str(path), "--version"], timeout=30)
    found = re.search(r"\bversion (\d+)\.(\d+)(?:\.(\d+))?", done.output)
    if done.status != 0 or found is None:
        raise HostLacks(
            f"`{path} --version` does not tell a version: {done.last_lines(2)}",
            remedy="reinstall it, or set SEVCHAOS_QEMU to another",
        )
    return int(found[1]), int(found[2]), int(found[3] or 0)


def _dotted(version: QemuVersion) -> str:
    return ".".join(map(str, version))
