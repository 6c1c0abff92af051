# SPDX-License-Identifier: Apache-2.0
"""Versions of kernels, "6.12.117", and their order."""

from __future__ import annotations

import re


def series(kernel: str) -> str:
    """ "6.12" of "6.12.117", "" if that is no version of a kernel."""
    found = re.match(r"(\d+\.\d+)(?:\.|-|$)", kernel)
    return found.group(1) if found else ""


def order(kernel: str) -> tuple[int, int, int, int]:
    """By which versions of a kernel are put in order; a release candidate comes before what it is a candidate of."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(-rc\d+)?", kernel)
    if found is None:
        return 0, 0, 0, 0
    major, minor, patch = (int(number or 0) for number in found.groups()[:3])
    return major, minor, patch, 0 if found.group(4) else 1
