# SPDX-License-Identifier: Apache-2.0
"""Two ends of a hand-over in one process, each in a thread where they wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from chaos.linux.seqpacket import pair
from chaos.vmm.peer import Peer

SECONDS = 20.0
LOCALHOST = "127.0.0.1"

T = TypeVar("T")
U = TypeVar("U")


def together(one: Callable[[], T], other: Callable[[], U]) -> tuple[T, U]:
    """What both return, once both are over. Raises what one of them raises, not that the other waited for it."""
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(one), threads.submit(other)
    if isinstance(first.exception(), TimeoutError):
        second.result()
    return first.result(), second.result()


def join(source: Peer, destination: Peer) -> None:
    """As a migration's phase `connect` does, for VMs that are called old and new."""
    ours, theirs = pair()
    port = destination.listen(theirs, LOCALHOST)
    together(
        lambda: source.connect(ours, LOCALHOST, port, "old", "new", within=SECONDS),
        lambda: destination.accept("new", "old", within=SECONDS),
    )
