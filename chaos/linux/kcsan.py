# SPDX-License-Identifier: Apache-2.0
"""What KCSAN reports, on a kernel that has it.

It is for the code under test: in the rest of a kernel it has much to say that is news to nobody. A race is told if both
its sides are in functions that were named to it. It keeps addresses: modules that are loaded anew have others.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from chaos.linux.kallsyms import PROC, kallsyms

_CONTROL = Path("kernel/debug/kcsan")
_RATE = Path("module/kcsan/parameters/skip_watch")
EVERY = 100
"""One access in so many is watched; KCSAN's own default is one in four thousand."""

_AIMED_AT = re.compile(r"^\S+ [tT] ([\w.]+)(?:\s+\[(?:kvm_amd|ccp)\])$|^\S+ [tT] (misc_[\w.]+)$", re.MULTILINE)


def aim(*, sys: Path = Path("/sys"), proc: Path = PROC) -> int:
    """Have it report races of kvm_amd, ccp and the misc controller. Returns how many functions were named, 0 where the
    kernel has no KCSAN. Raises OSError."""
    control = sys / _CONTROL
    if not control.exists():
        return 0
    names = {module or builtin for module, builtin in _AIMED_AT.findall(kallsyms(proc))}
    named = 0
    for name in sorted(names):
        with contextlib.suppress(OSError):  # a section's end, say, is in the list and is no function
            control.write_text(f"!{name}")
            named += 1
    control.write_text("whitelist")
    (sys / _RATE).write_text(str(EVERY))
    return named
