# SPDX-License-Identifier: Apache-2.0
"""The host that a run was carried out on, as its directory keeps it."""

from __future__ import annotations

from typing import Literal

import msgspec


class HostDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run took place. `kernel_source` and `qemu` are "" on a local host; `ccp` are the parameters that a lab's
    driver was loaded with."""

    host: Literal["lab", "local"]
    kernel_source: str = ""
    release: str = ""
    qemu: str = ""
    asids: tuple[int, int] | None = None
    cpus: int = 0
    memory: int = 0
    ccp: dict[str, str] = {}
