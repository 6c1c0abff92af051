# SPDX-License-Identifier: Apache-2.0
"""Everything of a run lives in one cgroup, and goes with it.

    <hierarchy>/sevchaos/                  ours alone; its own lock is held while a run's cgroup is made or looked for
    <hierarchy>/sevchaos/<name>-<pid>-<n>  a run's, with a lock (flock) on it for as long as its owner lives
    <hierarchy>/sevchaos/<...>/<cgroup>    a VMM's

A lock and not a pid says whether the owner lives: it cannot be mistaken, neither across pid namespaces nor when a pid
is used again.

Three times somebody cleans up. The runner does when a run ends. The warden, a process of its own session that was
forked before anything else and waits for the end of a pipe, does when the runner was killed. `sevchaos clean` does
when both were. None of them relies on cgroup.kill alone, which on some kernels passes over processes
(`Cgroup.destroy`). Agents die with the fork server and that with the runner in any case; the cgroup is what is left,
and the runner's instance of the kernel's tracer (`chaos.linux.tracefs`).

What a fault changes for the whole host has no owner that could die. The warden remembers how it was, and restores it;
if the warden was killed as well, nobody does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from chaos.cgroup.group import Cgroup
from chaos.errors import CleanupFailed, HostLacks
from chaos.linux.fd import OwnedFd
from chaos.linux.flock import lock, locked
from chaos.safety.survey import OURS

# What is killed is gone in milliseconds, except for what sleeps in the kernel and has to be woken up there first.
GONE_WITHIN = 30.0


class Claim:
    """A run's cgroup, and the lock that says its owner lives."""

    def __init__(self, cgroup: Cgroup, owner: OwnedFd) -> None:
        self.cgroup = cgroup
        self._lock = owner

    def give_up(self) -> None:
        """Remove the cgroup with all that is in it. Raises `CleanupFailed`."""
        try:
            self.cgroup.destroy(GONE_WITHIN)
        finally:
            self._lock.close()


def claim(hierarchy: Cgroup, name: str) -> Claim:
    """Make a cgroup for a run, whose children have the misc controller. Raises `HostLacks`."""
    ours = hierarchy.child(OURS)
    try:
        hierarchy.enable("misc")
        try:
            return _claim(ours, name)
        except FileNotFoundError:  # `clean` found our directory empty and removed it under us
            return _claim(ours, name)
    except OSError as error:
        raise HostLacks(
            f"no cgroup can be made in {ours.path}: {error.strerror}",
            remedy="become root; in a container, mount the unified hierarchy writable",
        ) from error


def _claim(ours: Cgroup, name: str) -> Claim:
    ours.path.mkdir(exist_ok=True)
    ours.enable("misc")
    with locked(ours.path):  # or it would be taken for a dead run's before it has its own
        cgroup = _create(ours, f"{name}-{os.getpid()}")
        owner = lock(cgroup.path)
    cgroup.enable("misc")
    return Claim(cgroup, owner)


def _create(ours: Cgroup, stem: str) -> Cgroup:
    for number in range(10_000):
        with contextlib.suppress(FileExistsError):
            return ours.create(f"{stem}-{number}")
    raise CleanupFailed(f"{ours.path} is full of what dead runs left", remedy="run `sevchaos clean`")


def abandoned(hierarchy: Cgroup) -> Iterator[Cgroup]:
    """The cgroups of runs whose owner is gone."""
    ours = hierarchy.child(OURS)
    if not ours.exists:
        return
    with locked(ours.path):
        groups = [group for group in ours.children() if _ownerless(group.path)]
    yield from groups


def _ownerless(path: Path) -> bool:
    try:
        lock(path).close()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def clean(hierarchy: Cgroup) -> tuple[Path, ...]:
    """Remove what dead runs left: their paths. What belongs to a live run stays. Raises `CleanupFailed`."""
    removed = []
    for group in abandoned(hierarchy):
        group.destroy(GONE_WITHIN)
        removed.append(group.path)
    with contextlib.suppress(OSError):  # busy while a run lives, missing if there never was one
        hierarchy.child(OURS).remove()
    return tuple(removed)
