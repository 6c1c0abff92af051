# SPDX-License-Identifier: Apache-2.0
"""A run's only source of chance is its seed. Whoever leaves something to chance has a part of it, by name."""

from __future__ import annotations

import hashlib


def split(seed: int, name: str) -> int:
    """A seed of 63 bits for what bears this name: always the same, and unlike that of any other name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
