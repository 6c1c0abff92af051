# SPDX-License-Identifier: Apache-2.0
"""A program of the system's, run to its end."""

from __future__ import annotations

import subprocess
from errno import ETIMEDOUT


def call(*argv: str, within: float, error: int) -> None:
    """Raises OSError: `error`, with what it said, if it fails; ETIMEDOUT after so many seconds."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=within, check=False)
    except subprocess.TimeoutExpired as late:
        raise OSError(ETIMEDOUT, str(late)) from late
    if done.returncode:
        raise OSError(error, f"{' '.join(argv)}: {done.stderr.strip()}")
