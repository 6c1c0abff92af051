# SPDX-License-Identifier: Apache-2.0
"""The kernel's own fault injection, as far as it makes the nth fault point in a system call of one thread fail.

A fault point is an allocation (of the slab, or of pages) or a copy from or to the caller. A kernel has them with
CONFIG_FAULT_INJECTION and whatever of FAILSLAB, FAIL_PAGE_ALLOC and FAULT_INJECTION_USERCOPY is set; `sevchaos kernel
build` makes one (`+kasan`). Allocations that may wait are left alone unless the kernel is told otherwise, and so are
those of a single page; and it writes a stack for each point that it lets fail, which somebody else would take for an
oops. Pages of vmalloc() are let alone all the same (ignore-gfp-highmem): a page fault of the VMM's takes such too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

OWN = Path("/proc/thread-self/fail-nth")
_DEBUG = Path("/sys/kernel/debug")
_FOLDERS = {"failslab": "FAILSLAB", "fail_page_alloc": "FAIL_PAGE_ALLOC", "fail_usercopy": "FAULT_INJECTION_USERCOPY"}
SETTINGS: Mapping[Path, str] = {
    _DEBUG / "failslab" / "ignore-gfp-wait": "N",
    _DEBUG / "failslab" / "cache-filter": "N",
    _DEBUG / "fail_page_alloc" / "ignore-gfp-wait": "N",
    _DEBUG / "fail_page_alloc" / "min-order": "0",
    **{_DEBUG / folder / "verbose": "0" for folder in _FOLDERS},
}
"""What they are to be, as the kernel shows them."""


def lacking(own: Path = OWN, debug: Path = _DEBUG) -> str:
    """What this kernel lacks of it, as configuration options; "" if nothing."""
    options = [] if own.exists() else ["FAULT_INJECTION"]
    if own.exists() and not any((debug / folder).is_dir() for folder in _FOLDERS):
        return "FAULT_INJECTION_DEBUG_FS, or debugfs is not mounted"
    options += [option for folder, option in _FOLDERS.items() if not (debug / folder).is_dir()]
    return ", ".join(options)
