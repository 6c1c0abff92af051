# SPDX-License-Identifier: Apache-2.0
"""`sevchaos` on a SEV host as a container sees it: without /dev/kvm, then in a cgroup namespace. Prints as JSON
what was asked → [exit code, what was said]."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path

CLONE_NEWNS, CLONE_NEWCGROUP = 0x00020000, 0x02000000
MS_REC, MS_PRIVATE, MNT_DETACH = 0x4000, 0x40000, 2
HIERARCHY = Path("/sys/fs/cgroup")
_libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter() -> None:
    """A cgroup of our own becomes the root of what we see."""
    box = HIERARCHY / "box"
    box.mkdir()
    (box / "cgroup.procs").write_text(str(os.getpid()))
    must(_libc.unshare(CLONE_NEWNS | CLONE_NEWCGROUP))
    must(_libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
    must(_libc.umount2(bytes(HIERARCHY), MNT_DETACH))
    must(_libc.mount(b"none", bytes(HIERARCHY), b"cgroup2", 0, None))


def ask(*arguments: str) -> tuple[int, str]:
    argv = ["sevchaos", *arguments]
    done = subprocess.run(argv, cwd="/tmp", capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    run = ("run", "move-across-cgroups", "--host", "local", "--quiet")
    Path("/dev/kvm").rename("/dev/not-kvm")
    said = {"no kvm": ask(*run)}
    Path("/dev/not-kvm").rename("/dev/kvm")
    enter()
    said |= {"doctor": ask("doctor"), "run": ask(*run), "clean": ask("clean")}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
