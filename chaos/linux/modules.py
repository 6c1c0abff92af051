# SPDX-License-Identifier: Apache-2.0
"""Loading drivers anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from errno import EBUSY

from chaos.linux import kcsan
from chaos.linux.program import call

WITHIN = 120.0  # seconds; the driver of a PSP waits for it when it goes and when it comes


def reload(names: Sequence[str], parameters: Mapping[str, str]) -> None:
    """Unload these modules, the first one first, and load them in the opposite order, the last of them with these
    parameters. Raises OSError: EBUSY if one of them is in use, and then those that are gone are loaded again.

    KCSAN, where there is any, is aimed at them anew."""
    for number, name in enumerate(names):
        try:
            _modprobe("-r", name)
        except OSError:
            for gone in reversed(names[:number]):
                _modprobe(gone)
            raise
    *others, last = names
    _modprobe(last, *(f"{parameter}={value}" for parameter, value in parameters.items()))
    for name in reversed(others):
        _modprobe(name)
    kcsan.aim()


def _modprobe(*argv: str) -> None:
    call("modprobe", *argv, within=WITHIN, error=EBUSY)
