# SPDX-License-Identifier: Apache-2.0
"""What a record says."""

from __future__ import annotations

import errno
import os
from errno import EBADF, EIO, ENOTTY

from chaos.history.records import Answer, Asked, Done, Fault, Invoke, Observation

Witness = Observation | Done | Asked
KEYS = ("sev", "sev_es")
NEW_KEYS = ("PEK_GEN", "PDH_GEN")
"""Commands of /dev/sev that have no buffer. They give the platform new keys, which are in the firmware's state."""
NO_LENGTH = ("PLATFORM_STATUS", *NEW_KEYS)
"""Those that are told no length."""
_U64 = 1 << 64


def owns(done: Done, *, numberless: bool = False) -> bool | None:
    """What an answer to GUEST_STATUS says: whether the VM owns a context. None if nothing can be said.

    KVM answers ENOTTY for a VM without a context before it looks at anything else, and a dead VM's EIO comes before
    the command is read. EIO with a firmware status is the firmware's refusal, so it was asked about a context. EBADF
    says so only of a VM whose context is `numberless`: it has lost the number of the descriptor of /dev/sev in a move
    (docs/findings/0001), or was not launched yet. Any other errno is an answer to another question.
    """
    if done.outcome == "info":
        return None
    if done.outcome == "ok":
        return True
    if done.errno == EIO:
        return done.firmware != 0
    if done.errno == ENOTTY:
        return False
    return True if done.errno == EBADF and numberless else None


def charged(value: int) -> int:
    """What a counter of the misc controller says. It is printed without its sign: one below zero reads 2**64 - 1."""
    return value - _U64 if value >= _U64 // 2 else value


def read(record: Witness) -> dict[tuple[str, str], int]:
    """What an observation read of (cgroup, key); nothing of any other record."""
    if not isinstance(record, Observation):
        return {}
    return {
        (cgroup, key): charged(files["current"].get(key, 0))
        for cgroup, files in record.misc.items()
        if "current" in files
        for key in sorted({*KEYS, *files["current"]})
    }


def refused_as_dead(answer: Answer) -> bool:
    """The firmware's own EIO carries its status."""
    return answer.errno == EIO and answer.firmware == 0


def said_dead(asked: Asked) -> bool | None:
    """What the answers say: that the VM is dead, that it is not, or (None) nothing that can be relied on."""
    answers = answers_of_open(asked)
    dead = {refused_as_dead(answer) for answer in answers}
    if len(dead) != 1 or any(answer.control == EIO for answer in answers):
        return None
    return dead.pop()


def answers_of_open(asked: Asked) -> tuple[Answer, ...]:
    """Without those of descriptors that answer EBADF to everything: they are closed, and say nothing of the VM."""
    still_open = {answer.fd for answer in asked.answers if answer.errno != EBADF}
    return tuple(answer for answer in asked.answers if answer.fd in still_open)


def levels(cgroup: str) -> tuple[str, ...]:
    """The cgroup and its ancestors, the run's own (".") first: a/b gives ".", "a", "a/b"."""
    if cgroup == ".":
        return (".",)
    parts = cgroup.split("/")
    return (".", *("/".join(parts[: depth + 1]) for depth in range(len(parts))))


def argument(invoke: Invoke, key: str) -> str:
    """An argument of the operation that names something, "" if it is not there."""
    value = invoke.args.get(key)
    return value if isinstance(value, str) else ""


def number(invoke: Invoke, key: str) -> int:
    """An argument of the operation that counts something, 0 if it is not there."""
    value = invoke.args.get(key)
    return value if isinstance(value, int) else 0


def names(invoke: Invoke, key: str) -> tuple[str, ...]:
    """An argument of the operation that names several things, none if it is not there."""
    value = invoke.args.get(key)
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else ()


def errname(number: int) -> str:
    """ "EIO" for 5, "ok" for 0, the number itself if it has no name."""
    return errno.errorcode.get(number, f"errno {number}") if number else "ok"


def fatal(fault: Fault) -> bool:
    """Whether it sends a fatal signal whatever it finds. Of others that may end a process, an OOM for one, only their
    evidence says that anybody was struck. Older runs do not say it; these were the ones."""
    return fault.fault in ("kill", "kill-both", "kill-cgroup") if fault.fatal is None else fault.fatal


def says_dead(done: Done) -> bool:
    """Whether the ioctl was turned away because its VM is dead. The firmware's own EIO carries its status."""
    return done.outcome == "fail" and done.errno == errno.EIO and done.firmware == 0


def ioctl_answered(done: Done) -> bool:
    """Whether what was refused was an ioctl: `get_state`, `set_state` and `move` also wait for a message."""
    call = done.value.get("call", "")
    return done.outcome == "ok" or call == "" or (isinstance(call, str) and call.startswith(("KVM_", "SEV_")))


def explained(done: Done) -> str:
    if done.outcome == "info":
        return "its process ended meanwhile"
    call = done.value.get("call", "")
    status = f", firmware status {done.firmware}" if done.firmware else ""
    return f"{call}: {errno.errorcode.get(done.errno, done.errno)} ({os.strerror(done.errno)}){status}"
