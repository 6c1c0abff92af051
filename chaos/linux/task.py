# SPDX-License-Identifier: Apache-2.0
"""Holds: how to see that an operation is stopped inside the kernel, and where.

The evidence is the kernel's own, in /proc/PID/task/TID: the system call it is in and its arguments (`syscall`), that
it sleeps (`stat`: in state D only a fatal signal reaches it), and the function it sleeps in (`wchan`, and `stack` for
the way there). All three are needed: a thread that sleeps somewhere else, or in another call, is not held.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chaos.linux.kallsyms import base_name

SYS_IOCTL = 16  # x86-64
NAMELESS: Mapping[int, str] = {}

# As far down as a stack is told in a message.
_WAY = 6


@dataclass(frozen=True, slots=True)
class Sleeper:
    """A thread at one moment. `call` is its system call's number and arguments, empty if it is in none; `stack` names
    functions, innermost first, empty if the host does not tell. `ioctls` are names of the ioctls that it may be in."""

    state: str
    wchan: str = ""
    stack: tuple[str, ...] = ()
    call: tuple[int, ...] = ()
    ioctls: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sleeping(self) -> str:
        """The kernel function it sleeps in, "" if the host does not tell."""
        return self.wchan or (self.stack[0] if self.stack else "")

    def in_ioctl(self, number: int) -> bool:
        return self.call[:1] == (SYS_IOCTL,) and self.call[2:3] == (number,)

    @property
    def called(self) -> str:
        """Its system call: "ioctl KVM_RUN", or by number; "" if it is in none, or the host does not tell."""
        if self.call[:1] != (SYS_IOCTL,):
            return f"system call {self.call[0]}" if self.call else ""
        number = self.call[2]
        return f"ioctl {self.ioctls.get(number, hex(number))}"

    def __str__(self) -> str:
        where = f"state {self.state}, {self.called or 'no system call'}, sleeping in {self.sleeping or '(not told)'}"
        way = " < ".join(self.stack[:_WAY])
        return f"{where} ({way})" if way else where


def look(pid: int, tid: int, proc: Path = Path("/proc"), *, ioctls: Mapping[int, str] = NAMELESS) -> Sleeper | None:
    """The thread as it is now, None if it is gone. An ioctl that `ioctls` does not name is told by its number.

    One that runs has no stack to be told, and is not asked for it: on 6.1 the kernel warns of whoever does while a
    function on that stack is traced on its return (rethook_find_ret_addr), as those of a move are.
    """
    task = proc / str(pid) / "task" / str(tid)
    try:
        state = parse_state((task / "stat").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return None
    if state == "R":
        return Sleeper(state=state, call=parse_syscall(_read(task / "syscall")), ioctls=ioctls)
    return Sleeper(
        state=state,
        wchan=parse_wchan(_read(task / "wchan")),
        stack=parse_stack(_read(task / "stack")),
        call=parse_syscall(_read(task / "syscall")),
        ioctls=ioctls,
    )


def _read(path: Path) -> str:
    """What is not there or may not be read is not known."""
    try:
        return path.read_text()
    except OSError:
        return ""


def parse_state(text: str) -> str:
    """Of `stat`: the letter after the name, which may itself hold brackets and blanks."""
    return text.rpartition(")")[2].split()[0]


def parse_wchan(text: str) -> str:
    name = text.strip()
    return "" if name == "0" else base_name(name)


def parse_stack(text: str) -> tuple[str, ...]:
    return tuple(base_name(found) for found in re.findall(r"^\[<\w+>\] ([^\s+]+)", text, re.MULTILINE))


def parse_syscall(text: str) -> tuple[int, ...]:
    """Number and six arguments; empty for "running" and for -1, a thread that sleeps in no call."""
    fields = text.split()
    if len(fields) < 7 or fields[0] == "-1":
        return ()
    return tuple(int(field, 0) for field in fields[:7])
