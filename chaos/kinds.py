# SPDX-License-Identifier: Apache-2.0
"""What sorts of VM there are."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """What is launched in a VM. PLAIN is no context: the destination of a move. MIRROR has none either, nor vCPUs,
    until it becomes the mirror of another VM."""

    SEV = "sev"
    SEV_ES = "sev-es"
    PLAIN = "plain"
    MIRROR = "mirror"

    @property
    def owns(self) -> bool:
        """Whether it is launched with a context of its own."""
        return self in (Kind.SEV, Kind.SEV_ES)

    @property
    def key(self) -> str:
        """Under which key of the misc controller it is charged, if it owns a context."""
        return self.value.replace("-", "_")


# What INIT2 makes of a VM hangs on its type alone. A plain VM may have any: it is given its context by a move.
TYPES = {Kind.SEV: 2, Kind.SEV_ES: 3}
