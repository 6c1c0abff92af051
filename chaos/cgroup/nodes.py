# SPDX-License-Identifier: Apache-2.0
"""cgroupspy, taught the unified hierarchy and the misc controller.

cgroupspy has no types; what is not typed stays in this file. It knows the tree (`Node`), a group's files as attributes
of a controller object (`Controller`) and how one file's text becomes a value (`BaseFileInterface`): three places to
extend. Two of its habits are not ours: it builds plain `Node`s for children, and takes "no permission" for "not there".
"""

from __future__ import annotations

import os
from pathlib import Path

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, FlagFile, ListFile
from cgroupspy.nodes import Node

UNIFIED = b"unified"


class KeyedFile(BaseFileInterface):  # type: ignore[misc]
    """Lines of "key value". A value of "max" is None: no limit."""

    def sanitize_get(self, value: str) -> dict[str, int | None]:
        pairs = (line.rsplit(None, 1) for line in value.splitlines() if line.strip())
        return {key: None if number == "max" else int(number) for key, number in pairs}

    def sanitize_set(self, value: dict[str, int | None]) -> str:
        """One pair: the kernel takes one key a write."""
        ((key, number),) = value.items()
        return f"{key} {'max' if number is None else number}"


class MaxFile(BaseFileInterface):  # type: ignore[misc]
    """A number, or "max", which is None: no limit."""

    def sanitize_get(self, value: str) -> int | None:
        return None if value.strip() == "max" else int(value)

    def sanitize_set(self, value: int | None) -> str:
        return "max" if value is None else str(value)


class QuotaFile(BaseFileInterface):  # type: ignore[misc]
    """cpu.max: so many microseconds of every period, the first None for no limit."""

    def sanitize_get(self, value: str) -> tuple[int | None, int]:
        quota, period = value.split()
        return None if quota == "max" else int(quota), int(period)

    def sanitize_set(self, value: tuple[int | None, int]) -> str:
        quota, period = value
        return f"{'max' if quota is None else quota} {period}"


class SwitchFile(ListFile):  # type: ignore[misc]
    """cgroup.subtree_control: a list to read, and "+name" or "-name" to write."""

    readonly = False

    def sanitize_set(self, value: str) -> str:
        return value


class UnifiedController(Controller):  # type: ignore[misc]
    """The core files of a cgroup, and those of its misc controller."""

    controllers = ListFile("cgroup.controllers")
    subtree_control = SwitchFile("cgroup.subtree_control")
    threads = ListFile("cgroup.threads", readonly=True)
    events = KeyedFile("cgroup.events", readonly=True)
    stat = KeyedFile("cgroup.stat", readonly=True)
    kill = FlagFile("cgroup.kill", writeonly=True)
    freeze = FlagFile("cgroup.freeze")

    cpu_max = QuotaFile("cpu.max")
    cpu_stat = KeyedFile("cpu.stat", readonly=True)

    memory_current = MaxFile("memory.current", readonly=True)
    memory_high = MaxFile("memory.high")
    memory_max = MaxFile("memory.max")
    memory_swap_max = MaxFile("memory.swap.max")
    memory_events = KeyedFile("memory.events", readonly=True)

    misc_capacity = KeyedFile("misc.capacity", readonly=True)
    misc_current = KeyedFile("misc.current", readonly=True)
    misc_max = KeyedFile("misc.max")
    misc_peak = KeyedFile("misc.peak", readonly=True)
    misc_events = KeyedFile("misc.events", readonly=True)
    misc_events_local = KeyedFile("misc.events.local", readonly=True)


class UnifiedNode(Node):  # type: ignore[misc]
    """A cgroup of the unified hierarchy, whose every node has the one controller object."""

    CONTROLLERS = {UNIFIED: UnifiedController}  # noqa: RUF012 - the base class spells it so

    def _get_controller_type(self) -> bytes:
        return UNIFIED

    def create_cgroup(self, name: str) -> UnifiedNode:
        """Raises FileExistsError: a group that is already there belongs to somebody else."""
        node = UnifiedNode(name, parent=self)
        os.mkdir(node.full_path)  # noqa: PTH102 - cgroupspy's paths are bytes
        self.children.append(node)
        return node


def path_of(node: UnifiedNode) -> Path:
    return Path(os.fsdecode(node.full_path))


def read_keyed(node: UnifiedNode, file: str) -> dict[str, int | None] | None:
    """A keyed file by its attribute's name; None if this kernel or this cgroup has none. Raises OSError."""
    try:
        value: dict[str, int | None] = getattr(node.controller, file)
    except FileNotFoundError:
        return None
    return value


def write(node: UnifiedNode, file: str, value: object) -> None:
    """Raises OSError."""
    setattr(node.controller, file, value)


def read_list(node: UnifiedNode, file: str) -> tuple[str, ...]:
    return tuple(str(item) for item in getattr(node.controller, file))
